"""Tensors and records that break a rule are refused where they are read: the file, the field, the row, the value."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_hostile import Pieces, Tensor, canonical, one, several
from core_refusals import CHECKING, DATA, GOOD, OPENING, REMOVED, expect_refusal, refusals, with_record

from engram_core import Adapter, AdapterFormatError, Matcher, Residual

IDS = "clip_l.entries.ids"
N_IDS = len(GOOD.streams["clip_l"].ids)
LOW, HIGH = -(1 << 63), (1 << 63) - 1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


# Tensors: seen on opening


@pytest.mark.parametrize("name", ["t5.vectors", "clip_l.scales"])
@pytest.mark.parametrize("shape", [[0, 1 << 61], [1 << 61, 0], [(1 << 62) - 1, 0]])
def test_an_empty_tensor_that_claims_a_long_axis(path, name, shape):
    pieces = Pieces.of(DATA)
    pieces.tensors[name] = Tensor("F32", shape, b"")
    expect_refusal(path, pieces.pack(), OPENING, (f"tensor '{name}' has shape {shape}", "no file is that large"))


def resized(name: str, by: int) -> Callable[[Pieces], object]:
    """Change a tensor's first axis."""

    def change(pieces: Pieces) -> None:
        array = pieces.array(name)
        pieces.put(name, array[:by] if by < 0 else np.concatenate([array, array[:by]]))

    return change


def put(name: str, index: Any, value: Any) -> Callable[[Pieces], object]:
    return lambda pieces: pieces.set(name, index, value)


def empty(pieces: Pieces) -> None:
    """Leave a stream without an entry."""
    for column in ("entries", "triggers"):
        pieces.put(f"t5.{column}.ids", [])
        pieces.put(f"t5.{column}.concept", [])
        pieces.put(f"t5.{column}.offsets", [0])
    pieces.put("t5.vectors", np.zeros((0, 5)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        *[
            (lambda pieces, name=name: pieces.tensors.pop(name), (f"lacks the tensor '{name}'",))
            for name in GOOD.container.tensors
        ],
        (lambda p: p.tensors.update(extra=p.tensors[IDS]), ("has an unknown tensor 'extra'",)),
        (lambda p: p.tensors.update({"x.vectors": p.tensors[IDS]}), ("has an unknown tensor 'x.vectors'",)),
        (lambda p: p.put(IDS, p.array(IDS), "I64"), (f"{IDS}: is I64 [{N_IDS}], expected I32 with 1 axes",)),
        (lambda p: p.put(IDS, p.array(IDS)[:, None]), (f"{IDS}: is I32 [{N_IDS}, 1], expected I32 with 1 axes",)),
        (lambda p: p.put(IDS, 5), (f"{IDS}: is I32 [], expected I32 with 1 axes",)),
        (lambda p: p.put("t5.vectors", p.array("t5.vectors"), "I32"), ("t5.vectors: is I32", "F32 or F16 or BF16")),
        (lambda p: p.put("t5.scales", p.array("t5.scales"), "F16"), ("t5.scales: is F16 [5, 5], expected F32",)),
        (lambda p: p.put("concepts.json", [[1]]), ("concepts.json: is U8 [1, 1], expected U8 with 1 axes",)),
        (lambda p: p.put("concepts.offsets", [0], "I32"), ("concepts.offsets: is I32 [1], expected I64",)),
        (lambda p: p.put("t5.vectors", p.array("t5.vectors").T), ("t5.vectors: has shape [5, 20]", "20 (K) on axis 0")),
        (resized("t5.vectors", -1), ("t5.vectors: has shape [19, 5], expected 20 (K) on axis 0",)),
        (resized("t5.vectors", 1), ("t5.vectors: has shape [21, 5], expected 20 (K) on axis 0",)),
        (resized("t5.scales", -1), ("t5.scales: has shape [4, 5], expected 5 (C) on axis 0",)),
        (resized("t5.entries.offsets", -1), ("t5.entries.offsets: has shape [20], expected 21 (K+1) on axis 0",)),
        (resized("t5.entries.concept", -1), ("t5.entries.offsets: has shape [21], expected 20 (K+1) on axis 0",)),
        (resized("t5.triggers.offsets", 1), ("t5.triggers.offsets: has shape [10], expected 9 (V+1) on axis 0",)),
        (resized("t5.triggers.concept", 1), ("t5.triggers.offsets: has shape [9], expected 10 (V+1) on axis 0",)),
        (resized("t5.entries.ids", -1), ("t5.entries.offsets: reach from 0 to 48, expected 0 to 47",)),
        (resized("t5.triggers.ids", 1), ("t5.triggers.offsets: reach from 0 to 24, expected 0 to 25",)),
        (put("t5.entries.offsets", 0, 1), ("t5.entries.offsets: reach from 1 to 48, expected 0 to 48",)),
        (put("t5.entries.offsets", 0, -1), ("t5.entries.offsets: reach from -1 to 48",)),
        (put("t5.triggers.offsets", -1, HIGH), (f"t5.triggers.offsets: reach from 0 to {HIGH}, expected 0 to 24",)),
        (put("t5.triggers.offsets", -1, LOW), (f"t5.triggers.offsets: reach from 0 to {LOW}, expected 0 to 24",)),
        (empty, ("t5.vectors: is empty; a stream without entries is left out",)),
        (lambda p: p.put("concepts.offsets", []), ("concepts.offsets: does not describe at least one record",)),
        (lambda p: p.put("concepts.offsets", [0]), ("concepts.offsets: does not describe at least one record",)),
        (put("concepts.offsets", 0, 1), ("concepts.offsets: does not describe", "bytes")),
        (put("concepts.offsets", -1, HIGH), ("concepts.offsets: does not describe", "bytes")),
        (resized("concepts.json", 1), ("concepts.offsets: does not describe", "bytes")),
        (resized("concepts.offsets", -1), ("concepts.offsets: does not describe", "bytes")),
    ],
)
def test_a_tensor_that_does_not_fit(path, change, words):
    pieces = Pieces.of(DATA)
    change(pieces)
    expect_refusal(path, pieces.pack(), OPENING, words)


# Tensors: seen on reading


def swap_rows(name: str, first: int, second: int) -> Callable[[Pieces], object]:
    """Exchange two n-grams of equal length."""

    def change(pieces: Pieces) -> None:
        ids, offsets = pieces.array(f"{name}.ids"), pieces.array(f"{name}.offsets")
        one, other = (slice(offsets[row], offsets[row + 1]) for row in (first, second))
        ids[one], ids[other] = ids[other].copy(), ids[one].copy()
        pieces.put(f"{name}.ids", ids)

    return change


def repeat_row(name: str, row: int) -> Callable[[Pieces], object]:
    """Make the next n-gram, of equal length, the same."""

    def change(pieces: Pieces) -> None:
        ids, offsets = pieces.array(f"{name}.ids"), pieces.array(f"{name}.offsets")
        ids[offsets[row + 1] : offsets[row + 2]] = ids[offsets[row] : offsets[row + 1]]
        pieces.put(f"{name}.ids", ids)

    return change


def long_row(pieces: Pieces) -> None:
    pieces.put("t5.triggers.ids", np.concatenate([pieces.array("t5.triggers.ids"), np.zeros(5000)]))
    pieces.set("t5.triggers.offsets", -1, 24 + 5000)


def wrap_offsets(pieces: Pieces) -> None:
    """Each step is positive modulo 2**64, though the values are far outside."""
    pieces.set("t5.entries.offsets", slice(2, 5), [HIGH, LOW, -1])


OWNERS = GOOD.streams["t5"].concept.tolist()

READING = CHECKING | {"concept"}
ALL = READING | {"matcher"}


@pytest.mark.parametrize(
    ("change", "steps", "words"),
    [
        # offsets
        (put("t5.entries.offsets", 2, 2), ALL, ("t5.entries.offsets: row 1 reaches from 2 to 2", "1..4096 ids")),
        (put("t5.entries.offsets", 2, 1), ALL, ("t5.entries.offsets: row 1 reaches from 2 to 1",)),
        (put("t5.entries.offsets", 2, -1), ALL, ("t5.entries.offsets: reaches from -1 to", "outside 0..48")),
        (put("t5.entries.offsets", 2, HIGH), ALL, (f"to {HIGH}, outside 0..48",)),
        (put("t5.triggers.offsets", 3, LOW), ALL, (f"t5.triggers.offsets: reaches from {LOW} to", "outside 0..24")),
        (wrap_offsets, ALL, (f"t5.entries.offsets: reaches from {LOW} to {HIGH}, outside 0..48",)),
        (long_row, ALL, ("t5.triggers.offsets: row 7 reaches from 21 to 5024, expected 1..4096 ids",)),
        # ids
        (put("t5.entries.ids", 0, 1000), ALL, ("t5.entries.ids: holds the id 1000, the vocabulary has 1000",)),
        (put("t5.entries.ids", 7, -1), ALL, ("t5.entries.ids: holds the id -1, the vocabulary has 1000",)),
        (put("t5.triggers.ids", -1, -(1 << 31)), ALL, (f"t5.triggers.ids: holds the id {-(1 << 31)}",)),
        (put("t5.triggers.ids", 3, (1 << 31) - 1), ALL, (f"t5.triggers.ids: holds the id {(1 << 31) - 1}",)),
        # concept columns
        (put("t5.entries.concept", 0, 1), ALL, ("t5.entries.concept: row 1 is 0 after 1",)),
        (put("t5.entries.concept", 1, -1), ALL - {"concept"}, ("t5.entries.concept: row 1 is -1 after 0",)),
        (put("t5.entries.concept", -1, 5), ALL - {"concept"}, ("t5.entries.concept: reaches from 0 to 5", "0..4")),
        (put("t5.entries.concept", 0, -1), ALL - {"concept"}, ("t5.entries.concept: reaches from -1 to 4", "0..4")),
        (put("t5.triggers.concept", -1, 0), ALL, ("t5.triggers.concept: row 7 is 0 after 4",)),
        (put("t5.triggers.concept", slice(None), 4), READING, ("concept 0 has entries without trigger",)),
        # order and repetition
        (swap_rows("t5.entries", 0, 1), ALL, ("t5.entries: row 1 repeats or precedes the one before",)),
        (swap_rows("t5.triggers", 0, 1), ALL, ("t5.triggers: row 1 repeats or precedes the one before",)),
        (repeat_row("t5.entries", 0), ALL, ("t5.entries: row 1 repeats or precedes the one before",)),
        (repeat_row("t5.triggers", 0), ALL, ("t5.triggers: row 1 repeats or precedes",)),
        (put("t5.entries.offsets", 1, 3), ALL, ("t5.entries: row 1 is shorter than the one before",)),
        # numbers
        (put("t5.vectors", (0, 0), np.nan), READING, ("t5.vectors: holds NaN or infinity",)),
        (put("t5.vectors", (19, 4), -np.inf), READING, ("t5.vectors: holds NaN or infinity",)),
        (put("clip_l.scales", (4, 2), np.nan), READING, ("clip_l.scales: holds NaN or infinity",)),
        (put("clip_l.scales", (4, 2), np.inf), READING, ("clip_l.scales: holds NaN or infinity",)),
        (put("clip_l.scales", (1, 0), 0.5), READING, ("clip_l.scales: not zero for a concept without",)),
        (put("clip_l.scales", (1, 2), -0.0), READING, ("clip_l.scales: not zero for a concept without",)),
        (put("t5.vectors", (5, 0), 0.1), READING, ("t5.vectors of concept 1: holds values", "not f16")),
        (put("t5.vectors", (10, 0), 0.1), READING, ("t5.vectors of concept 2: holds values", "not bf16")),
        (put("t5.vectors", (5, 0), 1e30), READING, ("t5.vectors of concept 1", "not f16")),
        # no entry anywhere
        (lambda pieces: add_record(pieces), READING, ("concept 5 has no entry in any stream",)),
    ],
)
def test_content_that_is_wrong(path, change, steps, words):
    pieces = Pieces.of(DATA)
    change(pieces)
    expect_refusal(path, pieces.pack(), steps, words)


def add_record(pieces: Pieces) -> None:
    record = json.loads(pieces.records[-1])
    record["name"] = "zoo"
    pieces.records = [*pieces.records, canonical(record).encode()]
    for stream in ("clip_l", "t5"):
        scales = pieces.array(f"{stream}.scales")
        pieces.put(f"{stream}.scales", np.concatenate([scales, np.zeros_like(scales[:1])]))


def test_the_table_above_means_what_it_says():
    assert OWNERS == [0] * 5 + [1] * 5 + [2] * 5 + [4] * 5, "rows 5 and 10 belong to f16 and bf16"
    assert len(GOOD.streams["t5"].ids) == 48
    assert not GOOD.streams["clip_l"].scales[1].any(), "concept 1 has no entry in clip_l"


@pytest.mark.parametrize(("dtype", "bits"), [("f16", 0x7C00), ("f16", 0xFE00), ("bf16", 0x7F80), ("bf16", 0xFFC1)])
def test_half_precision_that_is_not_finite(path, dtype, bits):
    pieces = Pieces.of(several(dtype))
    tensor = pieces.tensors["clip_l.vectors"]
    tensor.data = tensor.data[:6] + bits.to_bytes(2, "little") + tensor.data[8:]
    expect_refusal(path, pieces.pack(), READING, ("clip_l.vectors: holds NaN or infinity",))


def test_vectors_of_another_type_than_the_records_say(path):
    pieces = Pieces.of(several("f16"))
    pieces.put("t5.vectors", pieces.array("t5.vectors"), "F32")
    expect_refusal(path, pieces.pack(), CHECKING, ("t5.vectors: are f32, the records ask for f16",))


def test_a_concept_that_fires_is_checked_before_it_reaches_the_states():
    pieces = Pieces.of(one())
    pieces.set("clip_l.vectors", (2, 1), np.nan)
    adapter = Adapter.from_bytes(pieces.pack(), "cat.safetensors")
    matches = Matcher(adapter, "clip_l").match([10, 11, 12])
    assert len(matches)
    with pytest.raises(AdapterFormatError, match=r"^cat\.safetensors: clip_l\.vectors: holds NaN or infinity$"):
        Residual(adapter, "clip_l").apply(np.ones((1, 3, 3), np.float32), matches)


def test_one_bad_concept_leaves_the_others_readable():
    pieces = Pieces.of(DATA)
    pieces.set("t5.vectors", (0, 0), np.nan)
    adapter = Adapter.from_bytes(pieces.pack())
    with pytest.raises(AdapterFormatError, match="NaN"):
        adapter.concept("ant")
    for name in ("bee", "cow", "dog é", "elk"):
        assert adapter.concept(name).digest() == GOOD.concept(name).digest()


# Records


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": REMOVED}, ("record lacks the field 'name'",)),
        ({"extra": 1}, ("record has an unknown field 'extra'; known: activation, dtype",)),
        ({"x" * 5000: 1}, ("record has an unknown field 'xxx", "...")),
        ({"name": 5}, ("record.name has the type int",)),
        ({"name": ""}, ("concept name is ''", "1..256 printable characters")),
        ({"name": "x" * 257}, ("concept name is 'xxx",)),
        ({"name": "red\x1b[31m"}, (r"concept name is 'red\x1b[31m'",)),
        ({"name": "two\nlines"}, (r"concept name is 'two\nlines'",)),
        ({"name": "right\u202eleft"}, (r"concept name is 'right\u202eleft'",)),
        ({"name": " ant"}, ("concept name is ' ant'", "without outer spaces")),
        ({"name": "nul\0"}, (r"concept name is 'nul\x00'",)),
        ({"trigger": "\x07"}, (r"concept trigger is '\x07'",)),
        ({"trigger": None}, ("record.trigger has the type NoneType",)),
        ({"activation": "always"}, ("'ant': activation is 'always', expected one of anchored, spans",)),
        ({"rule": "absolut"}, ("'ant': rule is 'absolut', expected one of absolute, absolute-tanh, relative",)),
        ({"overlap": "max"}, ("'ant': overlap is 'max', expected one of sum, mean",)),
        ({"dtype": "f64"}, ("'ant': dtype is 'f64', expected one of f32, f16, bf16",)),
        ({"max_ngram": 1}, ("'ant': max_ngram is 1, expected at least 2",)),
        ({"max_ngram": 7.0}, ("record.max_ngram has the type float",)),
        ({"max_ngram": True}, ("record.max_ngram has the type bool",)),
        ({"training": []}, ("record.training has the type list",)),
        ({"training": {"a": "x" * (1 << 18)}}, ("bytes of JSON, the limit is 262144",)),
        ({"training": {"a": json.loads("[" * 63 + "]" * 63)}}, ("nests its JSON too deeply", "64")),
        ({"training": {"a": float("nan")}}, ("holds NaN",)),
        ({"training": {"a": "\ud800"}}, ("is not JSON",)),
        ({"license": 5}, ("record.license has the type int",)),
    ],
)
def test_a_record_field_that_is_wrong(path, fields, words):
    expect_refusal(path, with_record(0, **fields).pack(), READING, ("concepts.json: record 0: ", *words))


def replaced_record(text: bytes) -> Pieces:
    pieces = Pieces.of(DATA)
    pieces.records = [pieces.records[0], text, *pieces.records[2:]]
    return pieces


RECORD = Pieces.of(DATA).records[1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (RECORD + b" ", ("is not canonical JSON",)),
        (RECORD.replace(b",", b", ", 2), ("is not canonical JSON",)),
        (RECORD.replace(b"bee", rb"\u0062ee", 1), ("is not canonical JSON",)),
        (canonical(dict(reversed(json.loads(RECORD).items()))).encode() + b"x", ("is not JSON", "Extra data")),
        (RECORD[:-1], ("is not JSON",)),
        (RECORD[:-1] + b',"trigger":"b"}', ("names the key 'trigger' twice",)),
        (b'{"activation":"a' + b"\xff" * 9, ("is not JSON", "0xff")),
        (b'{"activation":"a","x":' + b"[" * 2000 + b"]" * 2000 + b"}", ("nests its JSON too deeply",)),
        (RECORD.replace(b'"training":{}', b'"training":{"a":1e999}'), ("JSON",)),
        (RECORD.replace(b'"training":{}', b'"training":{"a":-0}'), ("holds the integer -0",)),
        (RECORD.replace(b'"training":{}', b'"training":{"a":"\\ud800"}'), ("no canonical form",)),
    ],
)
def test_a_record_that_is_not_canonical(path, text, words):
    expect_refusal(path, replaced_record(text).pack(), READING, ("concepts.json: record 1: ", *words))


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"null",
        b"[" * 30,
        b'{"activation":1,"dtype":"f32"}',
        RECORD.replace(b":", b": "),
        json.dumps(dict(reversed(json.loads(RECORD).items())), separators=(",", ":")).encode(),
    ],
)
def test_a_record_without_activation(path, text):
    expect_refusal(path, replaced_record(text).pack(), READING | {"matcher"}, ("concepts.json: record 1: ",))


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ([0, 1, 1, 3, 4], ("'bee' follows 'bee'; names are unique and in order",)),
        ([1, 0, 2, 3, 4], ("'ant' follows 'bee'; names are unique and in order",)),
        ([4, 0, 1, 2, 3], ("'ant' follows 'elk'; names are unique and in order",)),
    ],
)
def test_records_that_are_not_in_order(path, order, words):
    pieces = Pieces.of(several("f32"))
    records = pieces.records
    pieces.records = [records[index] for index in order]
    expect_refusal(path, pieces.pack(), CHECKING, words)


@pytest.mark.parametrize("offset", [LOW, -1, 0, 5, HIGH - 14, HIGH])
def test_record_offsets_out_of_order(path, offset):
    pieces = Pieces.of(DATA)
    pieces.set("concepts.offsets", 2, offset)
    path.write_bytes(pieces.pack())
    found = refusals(path)
    assert found.keys() >= READING
    for message in found.values():
        assert "concepts.offsets: " in message or "concepts.json: record" in message
    assert str(offset) in found["check"] or "record" in found["check"]
