"""Whatever goes wrong while writing, the target holds what it held before, or the complete new file."""

import contextlib
import errno
import io
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from core_builders import make_adapter, make_concept
from core_hostile import names_in, several

import engram_core.merge
from engram_core import (
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    AdapterWriteError,
    ConceptNotFoundError,
    ConflictError,
    InputError,
    TargetExistsError,
    extract_concepts,
    extract_file,
    find_conflicts,
    merge_adapters,
    merge_files,
    open_adapter,
)

BOTH = ("clip_l", "t5")
FIRST = several()
SECOND = make_adapter(
    *(make_concept(f"z{index}", (900 + index, 901 + index), streams=BOTH, seed=index) for index in range(60))
)
OLD = b"what was here before"

Write = Callable[..., object]


@pytest.fixture
def a(tmp_path: Path) -> Path:
    path = tmp_path / "a.safetensors"
    FIRST.save(path)
    return path


@pytest.fixture
def b(tmp_path: Path) -> Path:
    path = tmp_path / "b.safetensors"
    SECOND.save(path)
    return path


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "target.safetensors"


@pytest.fixture(params=["save", "merge", "extract"])
def write(request: pytest.FixtureRequest, a: Path, b: Path) -> Write:
    """Each of the functions that write a file, as function of the target."""
    if request.param == "save":
        return lambda target, **options: SECOND.save(target, **options)
    if request.param == "merge":
        return lambda target, **options: merge_files([a, b], target, **options)
    return lambda target, **options: extract_file(b, SECOND.names()[3:], target, **options)


def expect_failure(
    write: Write, target: Path, kind: type[Exception], *words: str, old: bytes | None = None, **options: Any
) -> None:
    """A write fails with a message, and nothing but the old target is there afterwards."""
    if old is not None:
        target.write_bytes(old)
    with pytest.raises(kind) as caught:
        write(target, **options)
    assert str(caught.value).isprintable()
    for word in words:
        assert word in str(caught.value)
    assert names_in(target.parent) == ([] if old is None else [target.name])
    if old is not None:
        assert target.read_bytes() == old


# The target


def test_an_existing_target_is_refused_and_kept(write, target):
    words = str(target), "exists already; choose another name or allow overwriting (--force)"
    expect_failure(write, target, TargetExistsError, *words, old=OLD)
    with pytest.raises(FileExistsError):
        write(target)


def test_an_existing_target_is_replaced_when_asked_for(write, target):
    write(target)
    expected = target.read_bytes()
    target.write_bytes(OLD)
    write(target, overwrite=True)
    assert target.read_bytes() == expected
    assert names_in(target.parent) == [target.name]
    open_adapter(target).check()


def test_an_existing_target_is_refused_before_any_source_is_read(target, tmp_path):
    target.write_bytes(OLD)
    with pytest.raises(TargetExistsError):
        merge_files([tmp_path / "missing"], target)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_target(write, target, overwrite):
    target.mkdir()
    words = "is a folder; give the name of a file" if overwrite else "exists already"
    with pytest.raises(AdapterWriteError, match=words):
        write(target, overwrite=overwrite)
    assert names_in(target.parent) == [target.name]
    assert names_in(target) == []


def test_no_such_folder(write, target):
    missing = target.parent / "no such"
    with pytest.raises(AdapterWriteError) as caught:
        write(missing / "x.safetensors")
    assert str(caught.value) == f"{missing / 'x.safetensors'}: there is no folder {missing}; create it first"
    assert names_in(target.parent) == []


def test_a_file_is_no_folder(write, target, a):
    with pytest.raises(AdapterWriteError, match=r"there is no folder .*create it first"):
        write(a / "x.safetensors")


def test_a_null_byte_in_the_target(write, target):
    expect_failure(write, target.parent / "nul\0.safetensors", AdapterWriteError, r"nul\x00", "null byte")


@pytest.mark.skipif(sys.platform == "win32", reason="about file systems with names of 255 bytes")
def test_a_name_that_is_too_long(write, target):
    expect_failure(write, target.parent / ("x" * 256), AdapterWriteError, "name too long", "nothing was changed")


@pytest.mark.skipif(sys.platform == "win32", reason="about file systems with names of 255 bytes")
@pytest.mark.parametrize("name", ["x" * 255, "é" * 127, "🙂" * 63])
def test_the_longest_name_is_no_trouble_for_the_temporary_file(write, target, name):
    write(target.parent / name)
    assert names_in(target.parent) == [name]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_without_write_permission(write, target):
    target.parent.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        expect_failure(write, target, AdapterWriteError, "Permission denied", "nothing was changed")
    finally:
        target.parent.chmod(stat.S_IRWXU)


def test_a_folder_in_which_no_file_can_be_created(write, target, monkeypatch):
    def refuse(*args: Any, **options: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    expect_failure(write, target, AdapterWriteError, str(target), "cannot be written: Permission denied")


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_a_link_that_leads_nowhere_is_something_that_exists(write, target):
    target.symlink_to("nowhere")
    with pytest.raises(TargetExistsError):
        write(target)
    assert target.is_symlink()
    write(target, overwrite=True)
    assert not target.is_symlink()
    open_adapter(target).check()


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_overwriting_a_link_keeps_what_it_leads_to(write, target, tmp_path):
    other = tmp_path / "other"
    other.write_bytes(OLD)
    target.symlink_to(other)
    write(target, overwrite=True)
    assert other.read_bytes() == OLD
    open_adapter(target).check()


@pytest.mark.skipif(sys.platform == "win32", reason="about permissions")
def test_the_result_is_as_readable_as_any_new_file(write, target):
    write(target)
    (target.parent / "new").touch()
    assert target.stat().st_mode == (target.parent / "new").stat().st_mode


# A target that appears meanwhile


@pytest.fixture(params=["links", "no links"])
def links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems with and without hard links."""
    if request.param == "no links":

        def refuse(*args: Any, **options: Any) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)


def test_without_hard_links_all_is_the_same(write, target, links):
    write(target)
    open_adapter(target).check()
    assert names_in(target.parent) == [target.name]


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(OLD), lambda path: path.symlink_to("nowhere")])
def test_a_target_that_appears_during_a_merge_is_kept(a, b, target, links, make):
    def progress(done: int, total: int) -> None:
        if done == total:
            make(target)

    with pytest.raises(TargetExistsError, match="exists already"):
        merge_files([a, b], target, progress=progress)
    assert names_in(target.parent) == [target.name]
    assert target.is_symlink() or target.read_bytes() == OLD


def test_a_folder_that_appears_during_a_merge_is_kept(a, b, target, links):
    def progress(done: int, total: int) -> None:
        target.mkdir(exist_ok=True)

    with pytest.raises(AdapterWriteError):
        merge_files([a, b], target, progress=progress)
    with pytest.raises(AdapterWriteError):
        merge_files([a, b], target, progress=progress, overwrite=True)
    assert names_in(target.parent) == [target.name]


def test_a_target_folder_that_disappears_during_a_merge(a, b, target):
    def progress(done: int, total: int) -> None:
        for leftover in target.parent.iterdir():
            leftover.unlink()
        with contextlib.suppress(FileNotFoundError):
            target.parent.rmdir()

    with pytest.raises(AdapterWriteError, match="cannot be written"):
        merge_files([a, b], target, progress=progress)


# A full disk


@contextlib.contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Writing beyond `limit` bytes of a file writes what fits and then fails, as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(params=["reserving", "not reserving"])
def reserving(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems that can and cannot reserve space."""
    if request.param == "not reserving":

        def refuse(*args: Any) -> None:
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")

        monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.99, 1])
@pytest.mark.parametrize("old", [None, OLD])
def test_no_room_for_the_file(write, target, reserving, share, old):
    trial = target.with_name("trial")
    write(trial)
    size = trial.stat().st_size
    trial.unlink()
    if old is not None:
        target.write_bytes(old)
    with file_size_limit(min(int(share * size), size - 1)), pytest.raises(AdapterWriteError) as caught:
        write(target, overwrite=True)
    assert str(caught.value) == f"{target}: cannot be written: File too large; nothing was changed"
    assert names_in(target.parent) == ([] if old is None else [target.name])
    assert (target.read_bytes() if target.exists() else None) == old
    write(target, overwrite=True)
    assert target.stat().st_size == size


def test_space_is_reserved_before_any_work(a, b, target, monkeypatch):
    def refuse(descriptor: int, offset: int, length: int) -> None:
        assert length > 5000
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse, raising=False)

    def progress(done: int, total: int) -> None:
        raise AssertionError("nothing was to be copied")

    words = "cannot be written: No space left on device; nothing was changed"
    for old in (None, OLD):
        expect_failure(
            lambda target, **options: merge_files([a, b], target, progress=progress, **options),
            target, AdapterWriteError, words, old=old, overwrite=True,
        )  # fmt: skip


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, check=False)
    except FileNotFoundError:
        pytest.skip("needs mount")
    if done.returncode:
        pytest.skip("needs the right to mount a file system")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("old", [None, OLD])
def test_a_disk_that_is_really_full(write, tiny_disk, reserving, old):
    target = tiny_disk / "target.safetensors"
    words = "No space left on device", "nothing was changed"
    expect_failure(write, target, AdapterWriteError, *words, old=old, overwrite=old is not None)


@pytest.mark.parametrize("moment", ["fsync", "chmod", "link", "replace"])
@pytest.mark.parametrize("old", [None, OLD])
def test_a_disk_that_fails_at_the_end(write, target, monkeypatch, moment, old):
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    if moment == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    elif moment == "chmod":
        monkeypatch.setattr(Path, "chmod", fail)
    else:
        monkeypatch.setattr(os, "link", fail)
        monkeypatch.setattr(Path, "replace", fail)
    words = "cannot be written: Input/output error; nothing was changed"
    expect_failure(write, target, AdapterWriteError, words, old=old, overwrite=old is not None)


class ShortWrites(io.FileIO):
    """A file that takes a few bytes a call, as the system does with more than 2 GiB."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "w+b")
        self.calls = 0

    def write(self, data: Any) -> int:
        self.calls += 1
        return super().write(bytes(data[:100])) or 0


def test_a_system_that_writes_less_than_it_was_given(write, target, monkeypatch):
    write(target)
    expected = target.read_bytes()
    target.unlink()
    opened: list[ShortWrites] = []

    def open_short(*, dir: Path, prefix: str, suffix: str, **options: Any) -> ShortWrites:  # noqa: A002
        opened.append(ShortWrites(str(dir / f"{prefix}x{suffix}")))
        return opened[0]

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", open_short)
    write(target)
    assert target.read_bytes() == expected
    assert opened[0].calls > len(expected) // 100


# Interruptions


@pytest.mark.parametrize("old", [None, OLD])
def test_an_interrupted_copy_leaves_nothing(a, b, target, old):
    def interrupt(done: int, total: int) -> None:
        assert len(names_in(target.parent)) == 1 + (old is not None), "a temporary file lies beside the target"
        raise KeyboardInterrupt

    for write in (
        lambda target, **options: merge_files([a, b], target, progress=interrupt, **options),
        lambda target, **options: extract_file(a, ["bee"], target, progress=interrupt, **options),
    ):
        expect_failure(write, target, KeyboardInterrupt, old=old, overwrite=old is not None)


@pytest.mark.parametrize("moment", ["fsync", "chmod", "link"])
def test_an_interruption_at_the_end_leaves_nothing(write, target, monkeypatch, moment):
    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path if moment == "chmod" else os, moment, interrupt)
    expect_failure(write, target, KeyboardInterrupt)


KILLED = """
import sys, time
from engram_core import merge_files
def progress(done, total):
    print("copying", flush=True)
    time.sleep(60)
merge_files(sys.argv[2:], sys.argv[1], overwrite=True, progress=progress)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("old", [None, OLD])
def test_a_killed_merge_leaves_nothing_under_the_targets_name(a, b, target, old):
    if old is not None:
        target.write_bytes(old)
    command = [sys.executable, "-c", KILLED, str(target), str(a), str(b)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "copying\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    left = [name for name in names_in(target.parent) if name != target.name]
    assert [name.startswith(f".{target.name}.") and name.endswith(".tmp") for name in left] == [True]
    assert (target.read_bytes() if target.exists() else None) == old
    merge_files([a, b], target, overwrite=True)
    open_adapter(target).check()


# Sources


def test_a_bad_source_leaves_the_target_as_it_was(a, target, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"bad")
    again = tmp_path / "again.safetensors"
    make_adapter(make_concept("ant", (1, 2), streams=BOTH)).save(again)
    cases: list[tuple[type[Exception], Write]] = [
        (AdapterFormatError, lambda target, **options: merge_files([a, bad], target, **options)),
        (AdapterReadError, lambda target, **options: merge_files([a, tmp_path / "missing"], target, **options)),
        (InputError, lambda target, **options: merge_files([], target, **options)),
        (InputError, lambda target, **options: merge_files([a], target, on_conflict="any", **options)),
        (ConceptNotFoundError, lambda target, **options: extract_file(a, ["fox"], target, **options)),
        (InputError, lambda target, **options: extract_file(a, [], target, **options)),
    ]
    for kind, write in cases:
        expect_failure(write, target, kind, old=OLD, overwrite=True)
    with pytest.raises(ConflictError):
        merge_files([a, again], target, overwrite=True)
    assert target.read_bytes() == OLD


def changed(path: Path) -> bytes:
    """Return a file's content with one bit of one vector changed."""
    data = bytearray(path.read_bytes())
    data[open_adapter(path).container.tensors["clip_l.vectors"].start] ^= 1
    return bytes(data)


def rewrite(path: Path) -> None:
    """Change a file in place; its size stays."""
    data = changed(path)
    time.sleep(0.02)  # beyond the resolution of the file's time of change
    path.write_bytes(data)


def replace_file(path: Path) -> None:
    """Give the name to another file of the same size and age."""
    before = path.stat()
    other = path.with_name("other")
    other.write_bytes(changed(path))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(path)


CHANGES: list[tuple[Callable[[Path], object], str]] = [
    (Path.unlink, "cannot be opened again: No such file or directory"),
    (rewrite, "was changed since it was opened; open it again"),
    (replace_file, "was changed since it was opened; open it again"),
    (lambda path: path.write_bytes(b""), "was changed since it was opened; open it again"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot be opened again: Is a directory"),
]


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed")
@pytest.mark.parametrize(("change", "words"), CHANGES)
def test_a_source_that_changes_between_indexing_and_copying(a, b, target, change, words):
    def progress(done: int, total: int) -> None:
        if done < total:  # a is copied, b is not
            change(b)

    write = lambda target, **options: merge_files([a, b], target, progress=progress, **options)  # noqa: E731
    expect_failure(write, target, AdapterReadError, f"{b}: {words}", old=OLD, overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed")
@pytest.mark.parametrize("change", [rewrite, replace_file])
def test_a_source_that_changed_since_it_was_opened_is_never_mixed(a, b, change):
    """The index is of one version of the file: the vectors of another must not be copied beside it."""
    adapter, other = open_adapter(a), open_adapter(b)
    change(a)
    for call in (
        lambda: extract_concepts(adapter, ["elk"]),
        lambda: merge_adapters([adapter, other]),
        lambda: merge_adapters([other, adapter]),
    ):
        with pytest.raises(AdapterReadError, match="was changed since it was opened; open it again"):
            call()


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed")
def test_a_source_that_changed_is_not_compared_either(a, tmp_path):
    same = tmp_path / "same.safetensors"
    FIRST.save(same)
    adapters = [open_adapter(a), open_adapter(same)]
    assert find_conflicts(adapters) == []
    replace_file(same)
    with pytest.raises(AdapterReadError, match="was changed since it was opened"):
        find_conflicts(adapters)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be changed")
def test_a_source_that_changes_while_it_is_copied(a, b, target, monkeypatch):
    read = engram_core.merge._read

    def read_and_change(*args: Any) -> Any:
        monkeypatch.setattr(engram_core.merge, "_read", read)
        data = read(*args)
        rewrite(a)
        return data

    monkeypatch.setattr(engram_core.merge, "_read", read_and_change)
    write = lambda target, **options: merge_files([a, b], target, **options)  # noqa: E731
    expect_failure(write, target, AdapterReadError, f"{a}: was changed since it was opened", old=OLD, overwrite=True)


class FailingReads(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


def test_a_source_that_cannot_be_read_is_not_taken_for_the_target(a, b, target, monkeypatch):
    system_open = Path.open

    def open_failing(path: Path, *args: Any, **options: Any) -> Any:
        return FailingReads(path) if path == b else system_open(path, *args, **options)

    monkeypatch.setattr(Path, "open", open_failing)
    write = lambda target, **options: merge_files([a, b], target, **options)  # noqa: E731
    expect_failure(write, target, AdapterReadError, f"{b}: cannot be read: Input/output error")


@pytest.mark.parametrize("order", [0, 1])
def test_a_source_may_be_the_target(a, b, order):
    expected = merge_adapters([FIRST, SECOND]).to_bytes()
    merge_files([a, b], (a, b)[order], overwrite=True)
    assert (a, b)[order].read_bytes() == expected
    assert (b, a)[order].read_bytes() == (SECOND, FIRST)[order].to_bytes()
    assert names_in(a.parent) == [a.name, b.name]


def test_a_source_that_is_the_target_needs_permission_to_be_overwritten(a, b):
    with pytest.raises(TargetExistsError):
        merge_files([a, b], a)
    assert a.read_bytes() == FIRST.to_bytes()


def test_extracting_onto_the_source(a):
    extract_file(a, ["elk", "bee"], a, overwrite=True)
    assert a.read_bytes() == extract_concepts(FIRST, ["bee", "elk"]).to_bytes()


def test_saving_an_opened_adapter_onto_itself(a):
    adapter = open_adapter(a)
    assert adapter.save(a, overwrite=True) == FIRST.identity()
    assert a.read_bytes() == FIRST.to_bytes()


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_a_source_under_several_names_is_one_source(a, target, tmp_path, monkeypatch):
    symbolic, hard = tmp_path / "symbolic", tmp_path / "hard"
    symbolic.symlink_to(a)
    os.link(a, hard)
    monkeypatch.chdir(tmp_path)
    names = [a, symbolic, hard, "a.safetensors", str(a)]
    assert merge_files(names, target).concepts == FIRST.names()
    assert target.read_bytes() == FIRST.to_bytes()


def test_adapters_in_memory_do_not_depend_on_any_file(a, b):
    adapter = Adapter.from_bytes(a.read_bytes())
    rewrite(a)
    assert extract_concepts(adapter, FIRST.names()).to_bytes() == FIRST.to_bytes()
