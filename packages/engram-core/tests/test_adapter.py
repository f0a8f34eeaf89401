"""The adapter file: what goes in comes out, same content gives same bytes, and reading is lazy."""

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from core_builders import (
    MANIFEST,
    WIDTHS,
    adapters,
    bits,
    concepts,
    law,
    make_adapter,
    make_concept,
    make_manifest,
    make_stream,
    stored,
    with_record,
)
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from engram_core import (
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    AdapterWriteError,
    Concept,
    ConceptNotFoundError,
    InputError,
    Matcher,
    Residual,
    TargetExistsError,
    open_adapter,
)


@law
@given(
    st.lists(st.sampled_from("abcdef"), min_size=1, unique=True).flatmap(lambda names: st.tuples(*map(concepts, names)))
)
def test_what_goes_in_comes_out(built):
    adapter = make_adapter(*built)
    assert adapter.names() == sorted(concept.name for concept in built)
    assert len(adapter) == len(built)
    for concept in built:
        assert stored(adapter.concept(concept.name)) == stored(concept)
        assert adapter.concept(concept.name).digest() == concept.digest()
    assert [stored(concept) for concept in adapter.concepts()] == [
        stored(concept) for concept in sorted(built, key=lambda concept: concept.name)
    ]
    adapter.check()


@law
@given(adapters())
def test_saving_and_opening_changes_nothing(adapter):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        identity = adapter.save(path)
        opened = open_adapter(path)
        assert path.read_bytes() == adapter.to_bytes() == opened.to_bytes()
        assert identity == opened.identity() == hashlib.sha256(path.read_bytes()).hexdigest()
        assert opened.manifest == adapter.manifest
        assert [stored(concept) for concept in opened.concepts()] == [stored(c) for c in adapter.concepts()]
        assert opened.nbytes() == path.stat().st_size
        again = Adapter.build(opened.manifest, opened.concepts())
        assert again.to_bytes() == adapter.to_bytes()


@law
@given(adapters(), st.randoms(use_true_random=False))
def test_the_order_of_concepts_entries_and_triggers_does_not_matter(adapter, random):
    shuffled = []
    for concept in adapter.concepts():
        streams = {}
        for name, stream in reversed(list(concept.streams.items())):
            order = random.sample(range(len(stream.entries)), len(stream.entries))
            streams[name] = replace(
                stream,
                triggers=tuple(random.sample(stream.triggers, len(stream.triggers))),
                entries=tuple(stream.entries[k] for k in order),
                vectors=stream.vectors[order],
            )
        shuffled.insert(0, Concept(record=concept.record, streams=streams))
    assert [concept.digest() for concept in shuffled[::-1]] == [concept.digest() for concept in adapter.concepts()]
    assert make_adapter(*shuffled).to_bytes() == adapter.to_bytes()


@law
@given(adapters())
def test_every_column_has_its_type_and_shape(adapter):
    count = len(adapter)
    for name, table in adapter.streams.items():
        k, v, width = len(table.concept), len(table.trigger_concept), WIDTHS[name]
        assert (table.vectors.shape, table.scales.shape) == ((k, width), (count, width))
        assert (len(table.offsets), len(table.trigger_offsets)) == (k + 1, v + 1)
        assert table.vectors.dtype == {"f32": "<f4", "f16": "<f2", "bf16": "<u2"}[table.dtype]
        for ids in (table.ids, table.trigger_ids, table.concept, table.trigger_concept):
            assert ids.dtype == np.dtype("<i4")
        assert table.scales.dtype == np.dtype("<f4")
        for index in range(count):
            rows, variants = table.entry_rows(index), table.trigger_rows(index)
            stream = adapter.concept(index).streams.get(name)
            assert table.ngrams(rows) == (stream.entries if stream else ())
            assert table.triggers(variants) == (stream.triggers if stream else ())
        assert table.entry_rows(0, count) == slice(0, k)
        assert table.trigger_rows(0, count) == slice(0, v)


# The container


def test_the_safetensors_library_reads_every_tensor(tmp_path):
    adapter = make_adapter(
        make_concept("ant", (1, 2, 3), dtype="f16", streams=("t5",)),
        make_concept("bee", (4, 5), seed=1),
    )
    adapter.save(tmp_path / "x.safetensors")
    with safe_open(str(tmp_path / "x.safetensors"), framework="np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        metadata = file.metadata()
    assert set(tensors) == {"concepts.json", "concepts.offsets"} | {
        f"{stream}.{column}"
        for stream in ("clip_l", "t5")
        for column in (
            *("entries.ids", "entries.offsets", "entries.concept", "vectors", "scales"),
            *("triggers.ids", "triggers.offsets", "triggers.concept"),
        )
    }
    assert tensors["t5.vectors"].dtype == np.float16
    assert bits(tensors["t5.vectors"]) == bits(adapter.streams["t5"].vectors)
    assert bits(tensors["clip_l.vectors"]) == bits(adapter.streams["clip_l"].vectors)
    assert tensors["t5.entries.ids"].tolist() == [1, 2, 2, 3, 1, 2, 3]
    assert tensors["t5.entries.offsets"].tolist() == [0, 2, 4, 7]
    assert tensors["t5.entries.concept"].tolist() == [0, 0, 0]
    assert tensors["t5.triggers.ids"].tolist() == [1, 2, 3]
    assert tensors["clip_l.triggers.concept"].tolist() == [1]
    records = tensors["concepts.json"].tobytes()
    border = tensors["concepts.offsets"][1]
    first, second = json.loads(records[:border]), json.loads(records[border:])
    assert (first["name"], second["name"]) == ("ant", "bee")
    assert {key: metadata[key] for key in ("format", "format_version", "kind")} == {
        "format": "engram",
        "format_version": "1",
        "kind": "concept-table",
    }
    assert json.loads(metadata["manifest"]) == adapter.manifest.to_json()


def header_of(adapter):
    data = adapter.to_bytes()
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])


def test_bf16_is_bf16_in_the_header(tmp_path):
    adapter = make_adapter(make_concept("ant", (1, 2), dtype="bf16"))
    adapter.save(tmp_path / "x.safetensors")
    assert header_of(adapter)["clip_l.vectors"]["dtype"] == "BF16"
    with safe_open(str(tmp_path / "x.safetensors"), framework="np") as file:
        assert file.get_slice("clip_l.vectors").get_shape() == [1, 3]
    torch = pytest.importorskip("torch")
    with safe_open(str(tmp_path / "x.safetensors"), framework="pt") as file:
        read = file.get_tensor("clip_l.vectors")
    assert read.dtype == torch.bfloat16
    assert read.float().numpy().tobytes() == adapter.concept("ant").streams["clip_l"].vectors.tobytes()


@law
@given(adapters())
def test_tensors_are_aligned_and_the_header_is_canonical(adapter):
    sizes = {"U8": 1, "I32": 4, "I64": 8, "F32": 4, "F16": 2, "BF16": 2}
    header = header_of(adapter)
    for name, info in adapter.container.tensors.items():
        assert info.start % sizes[info.dtype] == 0, name
        assert adapter.container.array(name).flags.aligned
    data = adapter.to_bytes()
    length = int.from_bytes(data[:8], "little")
    canonical = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert data[8 : 8 + length] == canonical + b" " * (-len(canonical) % 8)


def test_views_cannot_be_written_to(tmp_path):
    adapter = make_adapter(make_concept("ant", (1, 2)))
    adapter.save(tmp_path / "x")
    for same in (adapter, open_adapter(tmp_path / "x")):
        with pytest.raises(ValueError, match="read-only"):
            same.streams["clip_l"].vectors[0, 0] = 1


# What Concept may hold


def concept_with(vectors, scales, dtype="f32"):
    concept = make_concept("ant", (1, 2, 3), dtype=dtype)
    stream = replace(concept.streams["clip_l"], vectors=vectors, scales=scales)
    return replace(concept, streams={"clip_l": stream})


VECTORS = np.arange(9, dtype=np.float32).reshape(3, 3) / 8
SCALES = np.array([1, -2, 0.5], np.float32)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    "vectors",
    [
        np.asfortranarray(VECTORS),
        np.repeat(VECTORS, 2, axis=0)[::2],
        np.repeat(VECTORS, 3, axis=1)[:, ::3],
        VECTORS[::-1][::-1],
        VECTORS.astype(np.float64),
        VECTORS.astype(np.float16),
        VECTORS.astype(">f4"),
    ],
    ids=["fortran", "strided rows", "strided columns", "reversed twice", "float64", "float16", "big-endian"],
)
def test_arrays_of_any_layout_give_the_same_bytes(vectors, dtype):
    expected = make_adapter(concept_with(VECTORS, SCALES, dtype))
    scales = np.repeat(SCALES, 2)[::2].astype(np.float64)
    assert np.array_equal(vectors, VECTORS)
    assert make_adapter(concept_with(vectors, scales, dtype)).to_bytes() == expected.to_bytes()
    assert concept_with(vectors, scales, dtype).digest() == concept_with(VECTORS, SCALES, dtype).digest()


def test_a_transposed_array_is_stored_as_it_reads():
    turned = VECTORS.T
    concept = concept_with(turned, SCALES)
    read = make_adapter(concept).concept("ant").streams["clip_l"]
    for entry, row in zip(concept.streams["clip_l"].entries, turned.tolist(), strict=True):
        assert read.vectors[read.entries.index(entry)].tolist() == row


def test_what_a_concept_holds_is_copied():
    vectors = VECTORS.copy()
    adapter = make_adapter(concept_with(vectors, SCALES))
    before = adapter.to_bytes()
    vectors[:] = 7
    assert adapter.to_bytes() == before
    read = adapter.concept("ant").streams["clip_l"]
    read.scales[0] = 7  # the reader's own
    assert adapter.to_bytes() == before


def test_ids_may_be_numpy_integers():
    plain = make_concept("ant", (1, 2, 3))
    stream = plain.streams["clip_l"]
    odd = replace(
        stream,
        triggers=tuple(tuple(np.int64(i) for i in ids) for ids in stream.triggers),
        entries=tuple(tuple(np.uint16(i) for i in ids) for ids in stream.entries),
    )
    assert make_adapter(replace(plain, streams={"clip_l": odd})).to_bytes() == make_adapter(plain).to_bytes()


def test_streams_nobody_uses_are_left_out():
    adapter = make_adapter(make_concept("ant", (1, 2), streams=("t5",)))
    assert list(adapter.streams) == list(adapter.manifest.streams) == ["t5"]
    narrow = make_adapter(make_concept("ant", (1, 2), streams=("t5",)), manifest=make_manifest({"t5": 5}))
    assert adapter.to_bytes() == narrow.to_bytes()


# Reading


def test_a_name_is_found_among_many():
    names = [f"concept {i:03}" for i in range(0, 300, 3)]
    adapter = make_adapter(*(make_concept(name, (i, i + 1)) for i, name in enumerate(names)))
    for position, name in enumerate(names):
        assert adapter.index(name) == position
        assert adapter.record(position).name == name
    for stranger in ("", "a", "concept 001", "concept 298", "concept 2970", "zebra"):
        with pytest.raises(ConceptNotFoundError, match="has no concept") as caught:
            adapter.index(stranger)
        assert "'concept 000', 'concept 003', 'concept 006', 'concept 009', 'concept 012' and 95 more" in str(
            caught.value
        )


def test_names_sort_by_code_point():
    names = ["B", "a", "é", "Z", "日本", "a b", "a~1", "🙂"]
    adapter = make_adapter(*(make_concept(name, (i, 9)) for i, name in enumerate(names)))
    assert adapter.names() == sorted(names)
    assert all(adapter.names()[adapter.index(name)] == name for name in names)


@pytest.mark.parametrize("number", [-1, 1, 100])
def test_a_number_outside_is_refused(number):
    adapter = make_adapter(make_concept("ant", (1, 2)), label="x.safetensors")
    with pytest.raises(ConceptNotFoundError, match=rf"x\.safetensors: has no concept number {number}; it has 1"):
        adapter.concept(number)


def corrupt(adapter, name, offset, data):
    info = adapter.container.tensors[name]
    raw = bytearray(adapter.to_bytes())
    raw[info.start + offset : info.start + offset + len(data)] = data
    return Adapter.from_bytes(bytes(raw), "x.safetensors")


def test_reading_one_concept_touches_no_other():
    adapter = make_adapter(make_concept("bad", (1, 2, 3)), make_concept("good", (4, 5, 6), seed=1))
    broken = corrupt(adapter, "clip_l.vectors", 0, np.float32(np.nan).tobytes())
    assert stored(broken.concept("good")) == stored(adapter.concept("good"))
    assert broken.names() == ["bad", "good"]
    for read in (lambda: broken.concept("bad"), broken.check, lambda: list(broken.concepts())):
        with pytest.raises(AdapterFormatError, match=r"x\.safetensors: clip_l\.vectors: holds NaN or infinity"):
            read()


def test_a_good_concept_of_a_bad_file_still_works():
    adapter = make_adapter(make_concept("bad", (1, 2, 3)), make_concept("good", (4, 5, 6), seed=1))
    broken = corrupt(adapter, "clip_l.scales", 0, np.float32(np.inf).tobytes())
    hidden = np.ones((1, 3, 3), np.float32)
    states = [
        Residual(each, "clip_l").apply(hidden, Matcher(each, "clip_l").match([[4, 5, 6]])) for each in (adapter, broken)
    ]
    assert bits(states[0]) == bits(states[1]) != bits(hidden)
    with pytest.raises(AdapterFormatError, match=r"clip_l\.scales: holds NaN or infinity"):
        Residual(broken, "clip_l").apply(hidden, Matcher(broken, "clip_l").match([[1, 2, 3]]))


def test_opening_reads_the_header_alone():
    adapter = make_adapter(make_concept("ant", (1, 2, 3)), make_concept("bee", (4, 5)))
    start = min(info.start for info in adapter.container.tensors.values())
    keep = {"concepts.offsets", "clip_l.entries.offsets", "clip_l.triggers.offsets"}
    raw = bytearray(adapter.to_bytes())
    for name, info in adapter.container.tensors.items():
        if name not in keep:
            raw[info.start : info.stop] = b"\xff" * (info.stop - info.start)
    assert start > 8
    broken = Adapter.from_bytes(bytes(raw), "x.safetensors")
    assert len(broken) == 2
    assert broken.manifest == adapter.manifest
    with pytest.raises(AdapterFormatError, match=r"x\.safetensors: "):
        broken.check()


@pytest.mark.parametrize("activations", [("anchored", "spans", "anchored"), ("spans",), ("anchored",)])
def test_activations_are_read_without_parsing(activations):
    built = [make_concept(f"c{i}", (i, i + 1), activation=a) for i, a in enumerate(activations)]
    assert make_adapter(*built).anchored().tolist() == [a == "anchored" for a in activations]


def test_what_an_adapter_says_of_itself():
    adapter = make_adapter(make_concept("ant", (1, 2)), label="x.safetensors")
    assert repr(adapter) == "<Adapter x.safetensors: sd15, 1 concepts>"
    assert adapter.path is None
    assert adapter.nbytes() == len(adapter.to_bytes())


# Errors of building


def test_an_adapter_needs_a_concept():
    with pytest.raises(InputError, match="needs at least one concept, got none"):
        make_adapter()


def test_names_are_unique():
    with pytest.raises(InputError, match="two concepts have the name 'ant'"):
        make_adapter(make_concept("ant", (1, 2)), make_concept("ant", (3, 4)))


def test_streams_must_be_in_the_manifest():
    with pytest.raises(InputError, match="stream 't5' is not in the manifest, which has clip_l"):
        make_adapter(make_concept("ant", (1, 2), streams=("t5",)), manifest=make_manifest({"clip_l": 3}))


def test_a_concept_needs_an_entry():
    concept = make_concept("ant", (1, 2))
    with pytest.raises(InputError, match="a stream without entries is left out"):
        make_adapter(replace(concept, streams={}))
    with pytest.raises(InputError, match="concept 0 has no entry in any stream"):
        make_adapter(replace(concept, streams={}), make_concept("bee", (3, 4)))
    empty = make_stream((1, 2), entries=[], vectors=np.zeros((0, 3)))
    with pytest.raises(InputError, match="has entries without trigger or the reverse"):
        make_adapter(replace(concept, streams={"clip_l": empty}), make_concept("bee", (3, 4)))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"vectors": np.zeros((2, 3))}, r"vectors have shape \(2, 3\), expected \(3, 3\)"),
        ({"vectors": np.zeros((3, 2))}, r"vectors have shape \(3, 2\), expected \(3, 3\)"),
        ({"vectors": np.zeros(9)}, r"vectors have shape \(9,\), expected \(3, 3\)"),
        ({"scales": np.zeros(2)}, r"scales have shape \(2,\), expected \(3,\)"),
        ({"scales": np.zeros((1, 3))}, r"scales have shape \(1, 3\), expected \(3,\)"),
    ],
)
def test_shapes_must_fit(fields, said):
    concept = make_concept("ant", (1, 2, 3))
    stream = replace(concept.streams["clip_l"], **fields)
    with pytest.raises(InputError, match="concept 'ant', stream 'clip_l': " + said):
        make_adapter(replace(concept, streams={"clip_l": stream}))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["vectors", "scales"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_numbers_must_be_finite(value, field, dtype):
    array = np.full((3, 3) if field == "vectors" else 3, value, np.float32)
    fields = {"vectors": VECTORS, "scales": SCALES} | {field: array}
    with pytest.raises(InputError, match=rf"clip_l\.{field}: holds NaN or infinity"):
        make_adapter(concept_with(**fields, dtype=dtype))


@pytest.mark.parametrize(("dtype", "value"), [("f16", 65520.0), ("bf16", 3.4e38)])
def test_numbers_must_fit_their_type(dtype, value):
    with pytest.raises(InputError, match=r"clip_l\.vectors: holds NaN or infinity"):
        make_adapter(concept_with(np.full((3, 3), value, np.float32), SCALES, dtype))


@pytest.mark.parametrize(
    ("triggers", "entries", "said"),
    [
        (((1, 1000),), [(1, 2)], r"triggers\.ids: holds the id 1000, the vocabulary has 1000"),
        (((1, 2),), [(1, 5000)], r"entries\.ids: holds the id 5000"),
        (((1, -2),), [(1, 2)], r"triggers hold ids outside 0\.\.2\*\*31-1"),
        (((1, 2**31),), [(1, 2)], r"triggers hold ids outside"),
        (((1, 2),), [(1, 2), (1, 2)], r"entries: row 1 repeats or precedes the one before"),
        (((1, 2), (1, 2)), [(1, 2)], r"triggers: row 1 repeats or precedes the one before"),
        (((1, 2),), [()], r"entries\.offsets: "),
    ],
)
def test_ids_must_be_sound(triggers, entries, said):
    stream = make_stream(*triggers, entries=entries)
    with pytest.raises(InputError, match=said):
        make_adapter(replace(make_concept("ant", (1, 2)), streams={"clip_l": stream}))


# Writing


def test_saving_overwrites_only_when_told(tmp_path):
    adapter, other = make_adapter(make_concept("ant", (1, 2))), make_adapter(make_concept("bee", (1, 2)))
    path = tmp_path / "x.safetensors"
    adapter.save(path)
    with pytest.raises(TargetExistsError, match=r"x\.safetensors: exists already"):
        other.save(path)
    assert path.read_bytes() == adapter.to_bytes()
    other.save(path, overwrite=True)
    assert path.read_bytes() == other.to_bytes()
    assert [each.name for each in tmp_path.iterdir()] == ["x.safetensors"]


def test_an_open_adapter_survives_being_overwritten(tmp_path):
    path = tmp_path / "x.safetensors"
    make_adapter(make_concept("ant", (1, 2))).save(path)
    opened = open_adapter(path)
    before = stored(opened.concept("ant"))
    make_adapter(make_concept("bee", (1, 2), seed=9)).save(path, overwrite=True)
    assert stored(opened.concept("ant")) == before
    assert open_adapter(path).names() == ["bee"]


def test_an_adapter_may_be_saved_over_itself(tmp_path):
    path = tmp_path / "x.safetensors"
    make_adapter(make_concept("ant", (1, 2))).save(path)
    identity = open_adapter(path).identity()
    assert open_adapter(path).save(path, overwrite=True) == identity
    assert open_adapter(path).identity() == identity


def test_a_folder_cannot_be_written_or_read(tmp_path):
    adapter = make_adapter(make_concept("ant", (1, 2)))
    with pytest.raises(AdapterWriteError, match="is a folder"):
        adapter.save(tmp_path, overwrite=True)
    with pytest.raises(AdapterWriteError):
        adapter.save(tmp_path / "no" / "x.safetensors")
    with pytest.raises(AdapterReadError, match="is not a regular file"):
        open_adapter(tmp_path)
    with pytest.raises(AdapterReadError, match="cannot be opened: No such file"):
        open_adapter(tmp_path / "missing")


def test_bytes_do_not_depend_on_the_process(tmp_path):
    """No clock, no hash seed, no dictionary order."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from core_builders import make_adapter, make_concept\n"
        "training = {key: 1 for key in {'b', 'a', 'c', 'zz'}}\n"
        "print(make_adapter(make_concept('ant', (1, 2), training=training, streams=('t5', 'clip_l'))).identity())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent)],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    concept = make_concept("ant", (1, 2), streams=("clip_l", "t5"))
    training = {"a": 1, "b": 1, "c": 1, "zz": 1}
    assert found == {make_adapter(with_record(concept, training=training), manifest=MANIFEST).identity() + "\n"}
