"""The file of a hashed memory: what is written is what is read, and whatever breaks a rule is refused by name."""

import copy
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_builders import bits, law, make_adapter, make_concept
from core_hostile import Pieces, Tensor, names_in
from hypothesis import given
from hypothesis import strategies as st

from engram_core import (
    AdapterFormatError,
    AdapterReadError,
    HashedMemory,
    InputError,
    Manifest,
    MemoryRecord,
    MemorySettings,
    StreamSpec,
    TargetExistsError,
    TokenizerSpec,
    open_adapter,
    open_memory,
    write_memory,
)
from engram_core.memory import TABLE
from engram_core.storage import decode_vectors, encode_vectors

GOLDEN = Path(__file__).parent / "golden" / "memory.safetensors"
SHA256 = "1c6ec8cf3afd5c54caecd3db53a9f2021e82091b9f965edfd2d338852fb7cb61"

WIDTH = 4
LOOKUP = np.array([0, 1, 1, 2, 0, 3], np.int32)
CONV = "short_conv.conv.weight"


def make_settings(**fields: Any) -> MemorySettings:
    defaults = {
        "engram_vocab_size": (5, 3),
        "max_ngram_size": 3,
        "n_embed_per_ngram": 4,
        "n_head_per_ngram": 2,
        "layer_ids": (2, 0),
        "kernel_size": 3,
        "dilation": 2,
        "hc_mult": 2,
        "pad_id": 4,
        "seed": 11,
    }
    return MemorySettings(**defaults | fields)


def make_manifest(width: int = WIDTH, **streams: StreamSpec) -> Manifest:
    tokenizer = TokenizerSpec(class_name="ToyTokenizer", vocab_size=6, fingerprint="0123456789abcdef" * 4)
    text = StreamSpec(width=width, site="decoder_layer_input", tokenizer=tokenizer)
    return Manifest(backbone="qwen3", base_model="example/base-model", streams={"text": text} | streams)


def make_record(settings: MemorySettings | None = None, **fields: Any) -> MemoryRecord:
    return MemoryRecord(**{"name": "toy", "settings": settings or make_settings()} | fields)


def make_tensors(settings: MemorySettings, dtype: str = "f32", seed: int = 0) -> dict[int, dict[str, Any]]:
    """Small integers, which every type holds exactly."""
    rng = np.random.default_rng(seed)
    primes = settings.hash(4, 0).primes
    tensors: dict[int, dict[str, Any]] = {}
    for layer in settings.layer_ids:
        tensors[layer] = {
            name: (dtype, encode_vectors(rng.integers(-9, 9, shape).astype(np.float32), dtype))
            for name, shape in settings.shapes(WIDTH, int(primes[layer].sum())).items()
        }
    return tensors


def build(settings: MemorySettings | None = None, dtype: str = "f32", **fields: Any) -> HashedMemory:
    settings = settings or make_settings()
    record = make_record(settings, **fields)
    return HashedMemory.build(make_manifest(), record, LOOKUP, make_tensors(settings, dtype), "toy.safetensors")


def build_golden() -> HashedMemory:
    return build(license="CC0-1.0", training={"steps": 7, "tags": ["a", "é"]})


DATA = build().to_bytes()


def content(memory: HashedMemory) -> dict[str, Any]:
    return {
        f"{layer}.{name}": (memory.tensor(layer, name)[0], bits(memory.tensor(layer, name)[1]))
        for layer in memory.settings.layer_ids
        for name in memory.names()
    }


# What is written is what is read


def test_the_golden_bytes():
    memory = build_golden()
    assert memory.to_bytes() == GOLDEN.read_bytes()
    assert memory.identity() == open_memory(GOLDEN).identity() == SHA256


def test_the_golden_file_says_what_was_written():
    memory = open_memory(GOLDEN)
    memory.check()
    assert memory.manifest == make_manifest()
    assert memory.record == make_record(license="CC0-1.0", training={"steps": 7, "tags": ["a", "é"]})
    assert memory.lookup.tolist() == LOOKUP.tolist()
    assert content(memory) == content(build_golden())
    assert memory.label == str(GOLDEN)
    assert repr(memory) == f"<HashedMemory {GOLDEN}: qwen3, layers 2, 0>"


def test_the_golden_header_is_this_text():
    pieces = Pieces.of(GOLDEN.read_bytes())
    assert pieces.metadata["manifest"] == (
        '{"backbone":"qwen3","base_model":{"fingerprint":null,"id":"example/base-model"},"license":"CC0-1.0",'
        '"memory":{"bias":true,"dilation":2,"engram_vocab_size":[5,3],"hc_mult":2,"kernel_size":3,"layer_ids":[2,0],'
        '"max_ngram_size":3,"n_embed_per_ngram":4,"n_head_per_ngram":2,"pad_id":4,"seed":11},"name":"toy",'
        '"streams":{"text":{"site":"decoder_layer_input","tokenizer":{"class":"ToyTokenizer",'
        f'"fingerprint":"{"0123456789abcdef" * 4}","vocab_size":6}},"width":4}}}},'
        '"training":{"steps":7,"tags":["a","é"]}}'
    )
    metadata = dict(pieces.metadata)
    del metadata["manifest"]
    assert metadata == {"format": "engram", "format_version": "1", "kind": "hashed-memory"}


def test_the_tensors_have_the_usual_names_and_shapes():
    shapes = {name: tuple(tensor.shape) for name, tensor in Pieces.of(DATA).tensors.items()}
    # Primes from 5 and from 3 on, each taken once, layer 2 first: 5 7, 3 11, then 13 17, 19 23.
    rows = {2: 5 + 7 + 3 + 11, 0: 13 + 17 + 19 + 23}
    expected: dict[str, tuple[int, ...]] = {"lookup": (6,)}
    for layer in (2, 0):
        expected |= {
            f"layers.{layer}.{TABLE}": (rows[layer], 2),
            f"layers.{layer}.value_proj.weight": (4, 8),
            f"layers.{layer}.value_proj.bias": (4,),
            f"layers.{layer}.{CONV}": (8, 1, 3),
        }
        for branch in (0, 1):
            expected |= {
                f"layers.{layer}.key_projs.{branch}.weight": (4, 8),
                f"layers.{layer}.key_projs.{branch}.bias": (4,),
                f"layers.{layer}.norm1.{branch}.weight": (4,),
                f"layers.{layer}.norm2.{branch}.weight": (4,),
                f"layers.{layer}.short_conv.norms.{branch}.weight": (4,),
            }
    assert shapes == expected
    assert build().n_parameters() == sum(int(np.prod(shape)) for name, shape in expected.items() if name != "lookup")


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_saving_and_opening_changes_nothing(tmp_path, dtype):
    memory = build(dtype=dtype)
    path = tmp_path / "a.safetensors"
    assert memory.save(path) == memory.identity()
    again = open_memory(path)
    assert again.to_bytes() == path.read_bytes() == memory.to_bytes()
    assert again.identity() == memory.identity()
    assert again.nbytes() == path.stat().st_size
    assert (again.path, memory.path) == (path, None)
    assert content(again) == content(memory)
    assert {kind for kind, _ in content(again).values()} == {dtype}


def test_bf16_keeps_its_bits(tmp_path):
    settings = make_settings()
    tensors = make_tensors(settings, "bf16")
    table = np.random.default_rng(0).integers(0, 0x7F80, tensors[2][TABLE][1].shape).astype("<u2")  # all finite bits
    tensors[2][TABLE] = "bf16", table
    memory = write_memory(tmp_path / "a.safetensors", make_manifest(), make_record(settings), LOOKUP, tensors)
    dtype, stored = memory.tensor(2, TABLE)
    assert (dtype, stored.dtype) == ("bf16", np.uint16)
    assert np.array_equal(stored, table)
    assert np.array_equal(decode_vectors(stored, dtype).view("<u4") >> 16, table)


@law
@given(
    n=st.integers(2, 4),
    heads=st.integers(1, 3),
    kernel=st.integers(1, 3),
    branches=st.integers(1, 2),
    bias=st.booleans(),
    layers=st.lists(st.integers(0, 30), min_size=1, max_size=3, unique=True),
    dtype=st.sampled_from(["f32", "f16", "bf16"]),
    seed=st.integers(0, 2**63 - 1),
    hashing=st.sampled_from(["published", "engram-peft"]),
)
def test_every_shape_can_be_written_and_read(n, heads, kernel, branches, bias, layers, dtype, seed, hashing):
    settings = make_settings(
        max_ngram_size=n,
        engram_vocab_size=(7, 3, 12)[: n - 1],
        n_head_per_ngram=heads,
        n_embed_per_ngram=2 * heads,
        kernel_size=kernel,
        hc_mult=branches,
        bias=bias,
        layer_ids=layers,
        seed=seed,
        hashing=hashing,
    )
    memory = build(settings, dtype)
    again = HashedMemory.from_bytes(memory.to_bytes())
    again.check()
    assert again.settings == settings == MemorySettings.from_json(json.loads(json.dumps(settings.to_json())))
    assert again.identity() == memory.identity()
    assert content(again) == {
        f"{layer}.{name}": (kind, bits(values))
        for layer, group in make_tensors(settings, dtype).items()
        for name, (kind, values) in group.items()
    }
    assert again.hash.compressed_vocab_size == 4
    assert again.hash.compressed_pad_id == LOOKUP[4] == 0


def test_the_same_content_gives_the_same_bytes_in_any_order():
    settings = make_settings()
    tensors = make_tensors(settings)
    turned = {layer: dict(reversed(group.items())) for layer, group in reversed(tensors.items())}
    memory = HashedMemory.build(make_manifest(), make_record(settings), LOOKUP, turned)
    assert memory.to_bytes() == DATA


@pytest.mark.parametrize(
    "change",
    [
        np.asfortranarray,
        lambda a: np.repeat(a, 2, axis=0)[::2],
        lambda a: a[::-1].copy()[::-1],
        lambda a: a.astype(">f4"),
    ],
    ids=["Fortran", "strided", "turned twice", "big-endian"],
)
def test_arrays_of_any_layout_are_written_right(change):
    settings = make_settings()
    tensors = {
        layer: {name: (dtype, change(values)) for name, (dtype, values) in group.items()}
        for layer, group in make_tensors(settings).items()
    }
    weight = tensors[2]["value_proj.weight"][1]
    assert not weight.flags.c_contiguous or weight.dtype != "<f4"
    memory = HashedMemory.build(make_manifest(), make_record(settings), LOOKUP.astype(np.int64), tensors)
    assert memory.to_bytes() == DATA


def test_a_memory_cannot_be_changed_and_is_its_own_copy(tmp_path):
    path = tmp_path / "a.safetensors"
    memory = write_memory(path, make_manifest(), make_record(), LOOKUP, make_tensors(make_settings()))
    assert copy.deepcopy(memory) is memory
    for array in (memory.lookup, memory.tensor(2, TABLE)[1]):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


def test_place_says_where_a_tensor_lies():
    memory = open_memory(GOLDEN)
    dtype, shape, start = memory.place(2, TABLE)
    size = int(np.prod(shape)) * 4
    assert dtype == "f32"
    assert GOLDEN.read_bytes()[start : start + size] == bits(memory.tensor(2, TABLE)[1])


# Writing


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    arguments = make_manifest(), make_record(), LOOKUP, make_tensors(make_settings())
    with pytest.raises(TargetExistsError, match="exists already"):
        write_memory(path, *arguments)
    assert path.read_bytes() == b"old"
    assert write_memory(path, *arguments, overwrite=True).to_bytes() == path.read_bytes() == DATA
    assert names_in(tmp_path) == ["a.safetensors"]


def spoil(name: str, value: float) -> Any:
    tensors = make_tensors(make_settings())
    tensors[0][name][1].reshape(-1)[-1] = value
    return tensors


def replaced(name: str, stored: Any) -> Any:
    tensors = make_tensors(make_settings())
    if stored is None:
        del tensors[0][name]
    else:
        tensors[0][name] = stored
    return tensors


@pytest.mark.parametrize(
    ("tensors", "lookup", "said"),
    [
        (spoil(TABLE, np.nan), LOOKUP, f"layers.0.{TABLE}: holds NaN or infinity"),
        (spoil("norm1.1.weight", np.inf), LOOKUP, r"layers.0.norm1.1.weight: holds NaN or infinity"),
        (replaced(CONV, None), LOOKUP, f"lacks the tensor 'layers.0.{CONV}'"),
        (replaced("other", ("f32", np.zeros(3, "f4"))), LOOKUP, "has an unknown tensor 'layers.0.other'"),
        (replaced("norm1.0.weight", ("f32", np.zeros(5, "f4"))), LOOKUP, r"F32 \[5\], expected .* \[4\]"),
        (replaced("norm1.0.weight", ("f32", np.zeros(4))), LOOKUP, r"layers.0.norm1.0.weight: is 'f32' in .* float64"),
        (replaced("norm1.0.weight", ("bf16", np.zeros(4, "f2"))), LOOKUP, "'bf16' in an array of float16"),
        (replaced("norm1.0.weight", ("f32", np.zeros(4, "i4"))), LOOKUP, "'f32' in an array of int32"),
        (replaced("norm1.0.weight", ("f64", np.zeros(4))), LOOKUP, "'f64' in an array of float64, expected f32 in"),
        (make_tensors(make_settings()), LOOKUP.astype(float), "lookup: is float64, expected integers"),
        (make_tensors(make_settings()), LOOKUP.astype(np.int64) + (1 << 32), "expected integers from 0 to"),
        (make_tensors(make_settings()), LOOKUP - 1, "expected integers from 0 to"),
        (make_tensors(make_settings()), LOOKUP[:4], "memory.pad_id is 4, lookup has 4 ids"),
        (make_tensors(make_settings()), LOOKUP * 2, "lookup: is not a map onto 0, 1, 2"),
        (make_tensors(make_settings()), LOOKUP[None], "lookup: is missing, or not one list of I32"),
        (make_tensors(make_settings()), LOOKUP[:0], "lookup: is missing, or not one list of I32"),
    ],
)
def test_what_breaks_a_rule_is_not_written(tmp_path, tensors, lookup, said):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(AdapterFormatError, match=said) as caught:
        write_memory(path, make_manifest(), make_record(), lookup, tensors, overwrite=True)
    assert ".tmp" not in str(caught.value)
    assert path.read_bytes() == b"old"
    assert names_in(tmp_path) == ["a.safetensors"]


def test_a_refusal_on_writing_names_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(AdapterFormatError) as caught:
        write_memory(path, make_manifest(), make_record(), LOOKUP, spoil(TABLE, np.nan))
    assert str(caught.value) == f"{path}: layers.0.{TABLE}: holds NaN or infinity"
    assert names_in(tmp_path) == []


# Reading names what is wrong


def expect(path: Path, pieces: Pieces | bytes, said: str, *, opens: bool = False) -> None:
    data = pieces if isinstance(pieces, bytes) else pieces.pack()
    path.write_bytes(data)
    with pytest.raises(AdapterFormatError) as caught:
        open_memory(path).check()
    assert str(caught.value).startswith(f"{path}: ")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    if opens:
        open_memory(path)
    else:
        with pytest.raises(AdapterFormatError):
            HashedMemory.from_bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


@pytest.mark.parametrize("name", sorted(Pieces.of(DATA).tensors))
def test_each_missing_tensor_is_named(path, name):
    pieces = Pieces.of(DATA)
    del pieces.tensors[name]
    expect(path, pieces, "lookup: is missing" if name == "lookup" else f"lacks the tensor {name!r}")


@pytest.mark.parametrize("name", sorted(Pieces.of(DATA).tensors))
def test_each_tensor_of_another_type_is_named(path, name):
    pieces = Pieces.of(DATA)
    pieces.put(name, pieces.array(name), "I64")
    expect(path, pieces, "lookup: is missing, or not one list of I32" if name == "lookup" else f"{name}: is I64")


@pytest.mark.parametrize("name", sorted(set(Pieces.of(DATA).tensors) - {"lookup"}))
@pytest.mark.parametrize(
    "change",
    [lambda a: a[:-1], lambda a: np.concatenate([a, a[:1]]), lambda a: a.reshape(-1, 1), lambda a: a[..., :-1]],
    ids=["shorter", "longer", "one more axis", "narrower"],
)
def test_each_tensor_of_another_shape_is_named(path, name, change):
    pieces = Pieces.of(DATA)
    pieces.put(name, change(pieces.array(name)))
    expect(path, pieces, f"{name}: ")


@pytest.mark.parametrize("name", sorted(set(Pieces.of(DATA).tensors) - {"lookup"}))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_no_number_is_found(path, name, value):
    pieces = Pieces.of(DATA)
    array = pieces.array(name)
    array.reshape(-1)[array.size // 2] = value
    pieces.put(name, array)
    expect(path, pieces, f"{name}: holds NaN or infinity", opens=True)


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_infinity_is_found_in_half_precision(path, dtype):
    pieces = Pieces.of(build(dtype=dtype).to_bytes())
    array = pieces.array(f"layers.2.{TABLE}")
    array.view("<u2")[3, 1] = 0x7C00 if dtype == "f16" else 0x7F80
    pieces.put(f"layers.2.{TABLE}", array)
    expect(path, pieces, f"layers.2.{TABLE}: holds NaN or infinity", opens=True)


def test_checking_without_tables_leaves_them_alone():
    pieces = Pieces.of(DATA)
    pieces.set(f"layers.2.{TABLE}", (0, 0), np.nan)
    memory = HashedMemory.from_bytes(pieces.pack())
    memory.check(tables=False)
    pieces.set("layers.2.norm1.0.weight", 0, np.nan)
    with pytest.raises(AdapterFormatError, match=r"norm1.0.weight: holds NaN"):
        HashedMemory.from_bytes(pieces.pack()).check(tables=False)


@pytest.mark.parametrize(
    "lookup",
    [
        [0, 1, 1, 2, 0, 4],
        [1, 1, 1, 2, 1, 3],
        [0, 1, -1, 2, 0, 3],
        [0, 1, 1, 2, 0, (1 << 31) - 1],
        [-(1 << 31)] * 6,
    ],
)
def test_a_lookup_with_gaps_is_refused(path, lookup):
    pieces = Pieces.of(DATA)
    pieces.put("lookup", lookup)
    expect(path, pieces, "lookup: is not a map onto 0, 1, 2, ...", opens=True)
    with pytest.raises(AdapterFormatError, match="not a map onto"):
        _ = open_memory(path).hash


def test_an_unknown_tensor_is_named(path):
    pieces = Pieces.of(DATA)
    pieces.tensors["layers.1.value_proj.weight"] = Tensor("F32", [1], b"\0" * 4)
    expect(path, pieces, "has an unknown tensor 'layers.1.value_proj.weight'")


def with_manifest(where: str, value: Any) -> Pieces:
    pieces = Pieces.of(DATA)
    manifest = pieces.manifest
    part = manifest
    *outer, last = where.split(".")
    for step in outer:
        part = part[step]
    if value is None and last != "license":
        del part[last]
    else:
        part[last] = value
    pieces.manifest = manifest
    return pieces


HUGE = 1 << 62


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("name", None, "manifest lacks the field 'name'"),
        ("name", "", "name is '', expected a printable name"),
        ("name", "two\nlines", r"name is 'two\nlines'"),
        ("license", 5, "manifest.license has the type int"),
        ("license", "\x1b[31m", r"license is '\x1b[31m'"),
        ("training", None, "manifest lacks the field 'training'"),
        ("training", [], "manifest.training has the type list"),
        ("extra", 1, "manifest has an unknown field 'extra'"),
        ("memory", None, "manifest lacks the field 'memory'"),
        ("memory", [], "manifest.memory has the type list"),
        ("memory.extra", 1, "memory has an unknown field 'extra'"),
        ("memory.seed", None, "memory lacks the field 'seed'"),
        ("memory.seed", -1, "seed is -1"),
        ("memory.seed", 1 << 63, f"seed is {1 << 63}"),
        ("memory.seed", True, "memory.seed has the type bool"),
        ("memory.hashing", "published", "memory has the field 'hashing' with the value 'published'; it is left out"),
        ("memory.hashing", "other", "hashing is 'other', expected one of published, engram-peft"),
        ("memory.hashing", 1, "memory.hashing has the type int"),
        ("memory.bias", 1, "memory.bias has the type int"),
        ("memory.bias", False, "unknown tensor 'layers.0.key_projs.0.bias'"),
        ("memory.max_ngram_size", 1, "max_ngram_size is 1, expected at least 2"),
        ("memory.max_ngram_size", 4, "engram_vocab_size is [5, 3], expected 3 sizes"),
        ("memory.max_ngram_size", 10**9, "max_ngram_size is 1000000000, expected 1..64"),
        ("memory.max_ngram_size", 3.0, "memory.max_ngram_size has the type float"),
        ("memory.engram_vocab_size", [5, 0], "engram_vocab_size is [5, 0]"),
        ("memory.engram_vocab_size", [5, True], "engram_vocab_size is [5, True]"),
        ("memory.engram_vocab_size", [5, [3]], "engram_vocab_size is [5, [3]]"),
        ("memory.engram_vocab_size", [5, HUGE], f"engram_vocab_size is [5, {HUGE}]"),
        ("memory.engram_vocab_size", [5, 1 << 40], "asks for at least"),
        ("memory.engram_vocab_size", [8, 3], f"layers.2.{TABLE}: has 26 rows, memory.engram_vocab_size asks for 32"),
        ("memory.n_embed_per_ngram", 5, "n_embed_per_ngram is 5, expected a multiple of n_head_per_ngram, which is 2"),
        ("memory.n_embed_per_ngram", 0, "n_embed_per_ngram is 0"),
        ("memory.n_embed_per_ngram", 6, f"layers.2.{TABLE}: is F32 [26, 2], expected F32 or F16 or BF16 [rows, 3]"),
        ("memory.n_head_per_ngram", 0, "n_head_per_ngram is 0"),
        ("memory.n_head_per_ngram", 1, f"layers.2.{TABLE}: is F32 [26, 2]"),
        ("memory.layer_ids", [], "layer_ids is []"),
        ("memory.layer_ids", [2, 2], "layer_ids is [2, 2]"),
        ("memory.layer_ids", [[2]], "layer_ids is [[2]]"),
        ("memory.layer_ids", [2, -1], "layer_ids is [2, -1]"),
        ("memory.layer_ids", [2, 1.0], "layer_ids is [2, 1.0]"),
        ("memory.layer_ids", [2, 1 << 40], "layer_ids is [2, 1099511627776]"),
        ("memory.layer_ids", [2, 1], "lacks the tensor 'layers.1."),
        ("memory.layer_ids", [2], "has an unknown tensor 'layers.0."),
        ("memory.layer_ids", list(range(4096)), "lacks the tensor 'layers.1."),
        ("memory.layer_ids", list(range(4097)), "layer_ids is [0, 1, 2,"),
        ("memory.kernel_size", 4, f"layers.2.{CONV}: is F32 [8, 1, 3], expected F32 or F16 or BF16 [8, 1, 4]"),
        ("memory.kernel_size", 10**9, "kernel_size is 1000000000, expected 1..4096"),
        ("memory.dilation", 0, "dilation is 0"),
        ("memory.dilation", 2049, "dilation is 2049, expected at most 4096 positions from the first tap to the last"),
        ("memory.hc_mult", 3, f"layers.2.{CONV}: is F32 [8, 1, 3]"),
        ("memory.hc_mult", 10**6, "hc_mult is 1000000, expected 1..256"),
        ("memory.pad_id", 6, "memory.pad_id is 6, lookup has 6 ids"),
        ("memory.pad_id", -1, "pad_id is -1, expected a token id"),
        ("streams.text.width", 5, "expected F32 or F16 or BF16 [5, 8]"),
        ("streams.text.width", 0, "streams.text.width is 0"),
        ("streams.text.sites", ["mid_block"], "streams.text has an unknown field 'sites'"),
        ("streams.text", None, "streams is {}, expected at least one stream"),
        ("backbone", None, "manifest lacks the field 'backbone'"),
        ("base_model.id", "", "base_model.id is ''"),
    ],
)
def test_a_manifest_that_is_wrong(path, where, value, said):
    expect(path, with_manifest(where, value), said)


def test_the_one_stream_is_called_text(path):
    pieces = Pieces.of(DATA)
    manifest = pieces.manifest
    manifest["streams"]["clip_l"] = manifest["streams"].pop("text")
    pieces.manifest = manifest
    expect(path, pieces, "streams are clip_l, expected 'text' alone")


def test_a_truncated_file_and_a_missing_one(path):
    expect(path, DATA[:-1], "truncated")
    expect(path, DATA[:20], "truncated")
    with pytest.raises(AdapterReadError, match="cannot be opened"):
        open_memory(path.with_name("none.safetensors"))


def test_each_opener_says_what_the_file_is(tmp_path):
    memory, table = tmp_path / "memory.safetensors", tmp_path / "table.safetensors"
    build().save(memory)
    make_adapter(make_concept("cat", (1, 2))).save(table)
    with pytest.raises(AdapterFormatError) as caught:
        open_adapter(memory)
    assert str(caught.value).startswith(f"{memory}: kind is 'hashed-memory'")
    assert str(caught.value).endswith("reads 'concept-table'; open_memory opens it")
    with pytest.raises(AdapterFormatError) as caught:
        open_memory(table)
    assert str(caught.value).startswith(f"{table}: kind is 'concept-table'")
    assert str(caught.value).endswith("reads 'hashed-memory'; open_adapter opens it")


# Hostile sizes are refused at once, from the header


def hostile(rows: int, columns: int = 2, **memory: Any) -> Pieces:
    """Tables that claim some rows and, where there are no columns, need no bytes for them."""
    pieces = Pieces.of(DATA)
    for layer in (2, 0):
        pieces.tensors[f"layers.{layer}.{TABLE}"] = Tensor("F32", [rows, columns], b"\0" * (4 * rows * columns))
    manifest = pieces.manifest
    manifest["memory"] |= memory
    pieces.manifest = manifest
    return pieces


@pytest.mark.parametrize(
    "make",
    [
        lambda: hostile(1 << 60, 0, n_head_per_ngram=4096, n_embed_per_ngram=8192),
        lambda: hostile(1 << 40, 0, engram_vocab_size=[1 << 38, 1 << 38]),
        lambda: hostile(100_000, 2, n_head_per_ngram=4096, n_embed_per_ngram=8192, engram_vocab_size=[1, 1]),
        lambda: with_manifest("memory.layer_ids", list(range(4096))),
        lambda: with_manifest("memory.hc_mult", 256),
        lambda: with_manifest("memory.engram_vocab_size", [1 << 40] * 2),
        lambda: with_manifest("memory.n_head_per_ngram", 4096),
        lambda: with_manifest("streams.text.width", 1 << 20),
    ],
    ids=["columns", "rows", "heads", "layers", "branches", "sizes", "heads alone", "width"],
)
def test_hostile_sizes_cost_neither_time_nor_memory(path, make):
    data = make().pack()
    path.write_bytes(data)
    open_memory(GOLDEN)  # what is imported on first use is not counted
    tracemalloc.start()
    begin = time.perf_counter()
    with pytest.raises(AdapterFormatError):
        open_memory(path)
    took = time.perf_counter() - begin
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < len(data) + 2_000_000
    assert took < 1


def test_many_small_tables_are_opened_in_no_time():
    layers = 40
    settings = make_settings(
        layer_ids=tuple(range(layers)), engram_vocab_size=(1, 1), n_head_per_ngram=20, n_embed_per_ngram=20, hc_mult=1
    )
    data = build(settings).to_bytes()
    begin = time.perf_counter()
    HashedMemory.from_bytes(data)
    assert time.perf_counter() - begin < 1
    assert len({prime for table in settings.hash(4, 0).primes.values() for prime in table.flat}) == layers * 40


# Settings and records made in Python


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"max_ngram_size": 2.0}, "max_ngram_size is 2.0"),
        ({"layer_ids": (1, 1)}, r"layer_ids is \[1, 1\]"),
        ({"engram_vocab_size": (5,)}, r"engram_vocab_size is \[5\], expected 2 sizes"),
        ({"bias": 1}, "bias is 1"),
        ({"dilation": 4097}, r"dilation is 4097, expected 1\.\.4096"),
    ],
)
def test_settings_must_make_sense(fields, said):
    with pytest.raises(InputError, match=said):
        make_settings(**fields)


def test_settings_take_lists_and_are_hashable():
    assert hash(make_settings(layer_ids=[2, 0], engram_vocab_size=[5, 3])) == hash(make_settings())


@pytest.mark.parametrize("fields", [{"name": ""}, {"name": "a\nb"}, {"license": ""}, {"license": "\u202e"}])
def test_records_are_safe_to_show(fields):
    with pytest.raises(InputError, match=next(iter(fields))):
        make_record(**fields)
