"""Paths that lead to no file, files that cost memory, and the good file that passes."""

import json
import os
import stat
import sys
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_hostile import Pieces, canonical, long_adapter, one
from core_refusals import DATA, changed_header, refusals, with_record

from engram_core import (
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    Matcher,
    extract_file,
    merge_adapters,
    merge_files,
    open_adapter,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


def test_the_good_file_passes(path):
    path.write_bytes(DATA)
    assert refusals(path) == {}


# Paths


def test_a_missing_file(tmp_path):
    missing = tmp_path / "no such.safetensors"
    expect_read_error(missing, str(missing), "No such file")


def test_a_folder(tmp_path):
    expect_read_error(tmp_path, str(tmp_path), "not a regular file", "give the path of a .safetensors file")


@pytest.mark.parametrize("name", ["nul\0.safetensors", "\0"])
def test_a_path_with_a_null_byte(tmp_path, name):
    expect_read_error(tmp_path / name, r"\x00", "null")


def test_a_path_that_is_too_long(tmp_path):
    expect_read_error(tmp_path / ("x" * 300), "xxx", "name too long")


def test_a_path_through_a_file(path):
    path.write_bytes(DATA)
    expect_read_error(path / "a.safetensors", str(path), "Not a directory")


def test_a_message_about_a_path_with_escapes_is_printable(tmp_path):
    expect_read_error(tmp_path / "\x1b[31m\nred", r"\x1b[31m\nred", "No such file")
    bad = tmp_path / "\x1b[31m\nred"
    bad.write_bytes(b"")
    with pytest.raises(AdapterFormatError, match="has 0 bytes") as caught:
        open_adapter(bad)
    assert str(caught.value).isprintable()


@pytest.mark.skipif(not hasattr(os, "symlink") or sys.platform == "win32", reason="needs symbolic links")
def test_a_symlink_loop(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    expect_read_error(tmp_path / "a", str(tmp_path / "a"), "symbolic links")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_named_pipe_does_not_hang(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = threading.Event()

    def read() -> None:
        expect_read_error(pipe, str(pipe), "not a regular file")
        done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(10)


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs /dev/zero")
def test_a_device():
    with pytest.raises(AdapterReadError, match=r"^/dev/zero: is not a regular file"):
        open_adapter("/dev/zero")


def test_a_file_that_may_not_be_read(path, monkeypatch):
    path.write_bytes(DATA)
    system_open = os.open

    def refuse(file: Any, *args: Any, **kwargs: Any) -> int:
        if Path(file) == path:
            raise PermissionError(13, "Permission denied", str(file))
        return system_open(file, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse)
    expect_read_error(path, str(path), "Permission denied")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_read_permission(path):
    path.write_bytes(DATA)
    path.chmod(stat.S_IWUSR)
    expect_read_error(path, str(path), "Permission denied")


def test_a_disk_that_fails_to_read(path, monkeypatch):
    path.write_bytes(DATA)

    def fail(*args: Any) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "read", fail)
    with pytest.raises(AdapterReadError, match="cannot be read: Input/output error"):
        open_adapter(path)


def expect_read_error(path: Path, *words: str) -> None:
    out = path.parent / "out.safetensors" if path.parent.is_dir() else path.parent.parent / "out.safetensors"
    for call in (
        lambda: open_adapter(path),
        lambda: merge_files([path], out),
        lambda: extract_file(path, ["ant"], out),
    ):
        with pytest.raises(AdapterReadError) as caught:
            call()
        assert str(caught.value).isprintable()
        for word in words:
            assert word in str(caught.value)
    assert not out.exists()


# Memory


def peak_of(call: Callable[[], Any]) -> int:
    """Bytes of memory a call takes at most, its result included."""
    call()  # what is cached is cached now
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        call()
        return tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_memory_is_bounded_by_the_index_and_not_by_the_vectors(path, dtype):
    path.write_bytes(long_adapter(4000, 768, dtype))
    adapter = open_adapter(path)
    size = path.stat().st_size
    index = sum(info.stop - info.start for name, info in adapter.container.tensors.items() if "entries" in name)
    assert index * 50 < size
    assert peak_of(lambda: open_adapter(path)) < 100_000
    assert peak_of(adapter.check) < 5 * index + (9 << 20)  # a block of values and what is computed of it
    assert peak_of(lambda: Matcher(adapter, "clip_l")) < 10 * index
    out = path.with_name("out.safetensors")
    assert peak_of(lambda: merge_files([path], out, overwrite=True)) < 10 * index + (9 << 20)


@pytest.mark.parametrize(
    "shape",
    [[1 << 61], [1 << 31, 1 << 30], [0, 1 << 61], [(1 << 62) - 1, 0], [(1 << 62) - 1] * 8, [1 << 40, 0, 1 << 40]],
)
def test_a_shape_in_the_header_costs_nothing(path, shape):
    data = changed_header(lambda header: header["t5.vectors"].__setitem__("shape", shape))
    path.write_bytes(data)

    def attempt() -> None:
        with pytest.raises(AdapterFormatError):
            open_adapter(path)

    assert peak_of(attempt) < 200_000


def test_a_hostile_record_costs_at_most_what_its_text_parses_to():
    """The worst case known: nine bytes of text are two dicts; the text is held a few times besides."""
    filler = {"x": [{"a": {}} for _ in range(25_000)]}
    adapter = Adapter.from_bytes(with_record(0, training=filler).pack())
    size = adapter.nbytes()
    assert size > 225_000
    assert peak_of(adapter.check) < 50 * size
    assert peak_of(lambda: open_adapter_again(adapter)) < 4 * size


def open_adapter_again(adapter: Adapter) -> Adapter:
    return Adapter.from_bytes(adapter.to_bytes())


def test_many_hostile_records_cost_no_more_than_one():
    filler = {"x": [{} for _ in range(8_000)]}
    pieces = Pieces.of(one())
    record = json.loads(pieces.records[0])
    names = [f"c{index:02}" for index in range(40)]
    pieces.records = [canonical(record | {"name": name, "training": filler}).encode() for name in names]
    ids = np.arange(2 * len(names))
    for column in ("entries", "triggers"):
        pieces.put(f"clip_l.{column}.ids", ids)
        pieces.put(f"clip_l.{column}.offsets", np.arange(len(names) + 1) * 2)
        pieces.put(f"clip_l.{column}.concept", np.arange(len(names)))
    pieces.put("clip_l.vectors", np.ones((len(names), 3)))
    pieces.put("clip_l.scales", np.ones((len(names), 3)))
    data = pieces.pack()
    adapter = Adapter.from_bytes(data)
    one_record = len(data) // len(names)
    assert peak_of(adapter.check) < 60 * one_record
    assert peak_of(lambda: merge_adapters([adapter])) < 60 * one_record + 6 * len(data)
