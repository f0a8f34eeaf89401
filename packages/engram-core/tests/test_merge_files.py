"""Merging and extracting from file to file: same bytes, bounded memory, any number of files, all or nothing."""

import os
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from core_builders import VOCABULARY, adapters, apart, law, make_adapter, make_concept, make_manifest, make_spec
from hypothesis import given
from hypothesis import strategies as st

from engram_core import (
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    AdapterWriteError,
    Concept,
    ConceptNotFoundError,
    ConceptRecord,
    ConceptStream,
    ConflictError,
    IncompatibleAdaptersError,
    InputError,
    TargetExistsError,
    extract_concepts,
    extract_file,
    merge_adapters,
    merge_files,
    open_adapter,
)


@pytest.fixture
def two(tmp_path):
    """Two files of one concept each."""
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    make_adapter(make_concept("ant", (1, 2))).save(paths[0])
    make_adapter(make_concept("bee", (3, 4), dtype="bf16")).save(paths[1])
    return paths


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@law
@given(parts=st.lists(adapters(), min_size=1, max_size=3), choice=st.sampled_from(["keep-first", "keep-last", "both"]))
def test_files_merge_to_the_same_bytes_as_adapters(parts, choice):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.safetensors") for number in range(len(parts))]
        for path, part in zip(paths, parts, strict=True):
            part.save(path)
        report = merge_files(paths, Path(folder, "merged"), on_conflict=choice)
        expected = merge_adapters(parts, on_conflict=choice)
        assert Path(folder, "merged").read_bytes() == expected.to_bytes()
        assert report.concepts == expected.names()
        known = {name for part in parts for name in part.names()}
        for old, new, label in report.renamed:
            assert old in known
            assert new in report.concepts
            assert label in map(str, paths)
        for name, label in report.dropped:
            assert name in known
            assert label in map(str, paths)


@law
@given(apart(2))
def test_extracting_from_a_merged_file_gives_back_the_files(parts):
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.safetensors") for number in range(2)]
        for path, part in zip(paths, parts, strict=True):
            part.save(path)
        merged = Path(folder, "merged.safetensors")
        merge_files(paths, merged)
        for number, part in enumerate(parts):
            target = Path(folder, f"extracted{number}.safetensors")
            extract_file(merged, part.names(), target)
            assert target.read_bytes() == paths[number].read_bytes()
            assert target.read_bytes() == extract_concepts(open_adapter(merged), part.names()).to_bytes()


def test_the_report_says_what_was_dropped_and_renamed(tmp_path):
    paths = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    for seed, path in enumerate(paths):
        make_adapter(make_concept("cat", (1, 2), seed=seed), make_concept(f"own{seed}", (5 + seed, 9))).save(path)
    kept = merge_files(paths, tmp_path / "kept", on_conflict="keep-last")
    assert kept.concepts == ["cat", "own0", "own1"]
    assert kept.dropped == [("cat", paths[0])]
    assert kept.renamed == []
    both = merge_files(paths, tmp_path / "both", on_conflict="both")
    marks = [f"cat~{open_adapter(path).concept('cat').digest()[:8]}" for path in paths]
    assert both.renamed == [("cat", marks[0], paths[0]), ("cat", marks[1], paths[1])]
    assert both.concepts == sorted([*marks, "own0", "own1"])
    assert both.dropped == []


def test_one_file_named_twice_is_one_source(two, tmp_path, monkeypatch):
    merge_files(two, tmp_path / "once")
    link = tmp_path / "link.safetensors"
    link.symlink_to(two[0])
    monkeypatch.chdir(tmp_path)
    merge_files([two[0], two[1], two[0], link, "a.safetensors", "./b.safetensors"], tmp_path / "often")
    assert (tmp_path / "often").read_bytes() == (tmp_path / "once").read_bytes()


def test_more_files_than_may_be_open_at_once(tmp_path):
    resource = pytest.importorskip("resource")
    paths = []
    for number in range(1100):
        path = tmp_path / f"{number}.safetensors"
        ids = (number % VOCABULARY, number // VOCABULARY, 7)
        path.write_bytes(make_adapter(make_concept(f"concept {number:04}", ids, entries=[ids])).to_bytes())
        paths.append(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_now = len(list(Path("/dev/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, open_now + 40), hard))
    try:
        report = merge_files(paths, tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert report.concepts == [f"concept {number:04}" for number in range(1100)]
    merged = open_adapter(tmp_path / "merged")
    for number in (0, 1, 617, 1099):
        assert merged.concept(number).digest() == open_adapter(paths[number]).concept(0).digest()


def large(name, ids, n_entries, width, seed):
    """An adapter of a few megabytes in one concept."""
    rng = np.random.default_rng(seed)
    entries = [(ids, 1 + k) for k in range(n_entries)]
    stream = ConceptStream(
        triggers=((ids, 1),),
        entries=tuple(entries),
        vectors=rng.normal(size=(n_entries, width)).astype(np.float32),
        scales=np.ones(width, np.float32),
    )
    record = ConceptRecord(name=name, trigger=name, rule="absolute", dtype=("f32", "f16")[seed % 2])
    spec = make_spec(width, vocab_size=5000)
    return Adapter.build(make_manifest(streams={"clip_l": spec}), [Concept(record=record, streams={"clip_l": stream})])


def test_memory_is_bounded_by_one_adapter_not_by_the_sum(tmp_path):
    paths = []
    for number in range(6):
        paths.append(tmp_path / f"{number}.safetensors")
        large(f"c{number}", number, 4096, 1024, number).save(paths[-1])
    biggest = max(path.stat().st_size for path in paths)
    merge_files(paths[:1], tmp_path / "warm")
    tracemalloc.start()
    try:
        merge_files(paths, tmp_path / "merged")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "merged").stat().st_size > 5.9 * biggest
    assert peak < 2 * biggest


def test_large_vectors_cross_the_pieces_they_are_copied_in(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    parts = [large("ant", 1, 3001, 1023, 0), large("bee", 2, 4500, 1023, 1)]
    for part, path in zip(parts, paths, strict=True):
        part.save(path)
    merge_files(paths, tmp_path / "merged")
    merged = open_adapter(tmp_path / "merged")
    for part in parts:
        (name,) = part.names()
        found = merged.concept(name).streams["clip_l"].vectors
        assert found.tobytes() == part.concept(name).streams["clip_l"].vectors.tobytes()
        extract_file(tmp_path / "merged", [name], tmp_path / name)
        assert (tmp_path / name).read_bytes() == part.to_bytes()


def test_progress_counts_every_byte_once(two, tmp_path):
    calls = []
    merge_files(two, tmp_path / "merged", progress=lambda done, total: calls.append((done, total)))
    assert len(calls) == 2
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    vectors = (3 * 4) + (3 * 4) + (3 * 2) + (3 * 4)  # one entry and one scale each, f32 and bf16
    assert calls[-1] == (vectors, vectors)
    calls.clear()
    extract_file(two[0], ["ant"], tmp_path / "extracted", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(24, 24)]


# All or nothing


def test_an_existing_target_is_kept_unless_overwriting_is_allowed(two, tmp_path):
    target = tmp_path / "merged"
    target.write_text("precious")
    with pytest.raises(TargetExistsError, match=r"merged: exists already; choose another name .*--force"):
        merge_files(two, target)
    with pytest.raises(TargetExistsError):
        extract_file(two[0], ["ant"], target)
    assert target.read_text() == "precious"
    merge_files(two, target, overwrite=True)
    assert open_adapter(target).names() == ["ant", "bee"]
    extract_file(two[0], ["ant"], target, overwrite=True)
    assert target.read_bytes() == two[0].read_bytes()


def test_a_source_may_be_the_target(two):
    merge_files(two, two[0], overwrite=True)
    assert open_adapter(two[0]).names() == ["ant", "bee"]
    extract_file(two[0], ["bee"], two[0], overwrite=True)
    assert two[0].read_bytes() == two[1].read_bytes()


@pytest.mark.parametrize("overwrite", [True, False])
def test_whatever_fails_leaves_the_folder_as_it_was(two, tmp_path, overwrite):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(two[0].read_bytes()[:-1])
    clash = tmp_path / "clash.safetensors"
    make_adapter(make_concept("ant", (1, 2), seed=5)).save(clash)
    stranger = tmp_path / "stranger.safetensors"
    make_adapter(make_concept("fly", (8, 9)), manifest=make_manifest(backbone="sd35")).save(stranger)
    target = tmp_path / "merged"
    if overwrite:
        target.write_text("precious")
    before = files_in(tmp_path)
    for sources, error in (
        ([], InputError),
        ([two[0], tmp_path / "missing"], AdapterReadError),
        ([two[0], tmp_path], AdapterReadError),
        ([two[0], broken], AdapterFormatError),
        ([two[0], clash], ConflictError),
        ([two[0], stranger], IncompatibleAdaptersError),
    ):
        with pytest.raises(error):
            merge_files(sources, target, overwrite=overwrite)
        assert files_in(tmp_path) == before
    with pytest.raises(ConceptNotFoundError, match="has no concept 'cat'; it has 'ant'"):
        extract_file(two[0], ["cat"], target, overwrite=overwrite)
    assert files_in(tmp_path) == before
    if overwrite:
        assert target.read_text() == "precious"


def test_an_interrupted_merge_leaves_nothing_behind(two, tmp_path):
    before = files_in(tmp_path)

    def interrupt(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge_files(two, tmp_path / "merged", progress=interrupt)
    assert files_in(tmp_path) == before


def test_a_source_that_changes_meanwhile_is_noticed(two, tmp_path):
    def disturb(done, total):
        os.utime(two[1], ns=(1, 1))

    with pytest.raises(AdapterReadError, match=r"b\.safetensors: was changed"):
        merge_files(two, tmp_path / "merged", progress=disturb)
    assert not (tmp_path / "merged").exists()


def test_a_source_that_vanishes_meanwhile_is_noticed(two, tmp_path):
    def remove(done, total):
        two[1].unlink()

    with pytest.raises(AdapterReadError, match=r"b\.safetensors"):
        merge_files(two, tmp_path / "merged", progress=remove)
    assert not (tmp_path / "merged").exists()


def test_a_target_that_cannot_be_written_is_named(two, tmp_path):
    with pytest.raises(AdapterWriteError, match="nowhere/merged: "):
        merge_files(two, tmp_path / "nowhere" / "merged")
    with pytest.raises(AdapterWriteError, match="is a folder; give the name of a file"):
        merge_files(two, tmp_path, overwrite=True)
    with pytest.raises(TargetExistsError):
        merge_files(two, tmp_path)


def test_a_new_file_is_as_readable_as_any_other(two, tmp_path):
    merge_files(two, tmp_path / "merged")
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert (tmp_path / "merged").stat().st_mode == plain.stat().st_mode


def test_errors_name_the_file_and_the_field(two, tmp_path):
    adapter = open_adapter(two[0])
    data = bytearray(adapter.to_bytes())
    at = adapter.container.tensors["clip_l.vectors"].start
    data[at : at + 4] = np.float32(np.nan).tobytes()
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(bytes(data))
    with pytest.raises(AdapterFormatError, match=r"broken\.safetensors: clip_l\.vectors: holds NaN or infinity"):
        merge_files([broken, two[1]], tmp_path / "merged")
