"""Every way in which a file can be no adapter is a clear error: the file, the field, the value, the remedy."""

import json
import os
import stat
import sys
import threading
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_builders import make_adapter, make_concept
from core_hostile import Pieces, canonical, join, long_adapter, names_in, one, several, split

from engram_core import (
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    Matcher,
    Residual,
    extract_concepts,
    extract_file,
    find_conflicts,
    merge_adapters,
    merge_files,
    open_adapter,
)

GOOD = several()
DATA = GOOD.to_bytes()
HEADER_STOP = 8 + int.from_bytes(DATA[:8], "little")
OTHER = make_adapter(make_concept("zebra", (900, 901), streams=("clip_l", "t5")))
LOW, HIGH = -(1 << 63), (1 << 63) - 1

OPENING = {"open", "merge", "extract"}
CHECKING = {"check", "merge", "extract", "merge in memory", "extract in memory", "conflicts"}


def refusals(path: Path) -> dict[str, str]:
    """Take a file through everything that reads one; return what each step that refuses it says."""
    messages: dict[str, str] = {}

    def attempt(step: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except AdapterFormatError as error:
            messages.setdefault(step, str(error))
            return None

    out = path.with_name("out.safetensors")
    adapter = attempt("open", lambda: open_adapter(path))
    attempt("merge", lambda: merge_files([path], out, overwrite=True))
    attempt("extract", lambda: extract_file(path, ["ant"], out, overwrite=True))
    assert set(names_in(path.parent)) - {out.name} == {path.name}
    if adapter is not None:
        attempt("check", adapter.check)
        attempt("merge in memory", lambda: merge_adapters([OTHER, adapter]))
        attempt("extract in memory", lambda: extract_concepts(adapter, ["ant"]))
        attempt("conflicts", lambda: find_conflicts([OTHER, adapter]))
        for index in range(len(adapter)):
            attempt("concept", partial(adapter.concept, index))
        for stream in adapter.streams:
            attempt("matcher", partial(Matcher, adapter, stream))
    for message in messages.values():
        assert message.isprintable(), "one line, without control characters"
        assert len(message) < 800
        assert message.startswith(f"{path}: ")
    return messages


def expect_refusal(path: Path, data: bytes, steps: set[str], words: tuple[str, ...]) -> None:
    path.write_bytes(data)
    found = refusals(path)
    assert set(found) == steps
    for message in found.values():
        for word in words:
            assert word in message
    if "open" in steps:  # the same file held in memory
        with pytest.raises(AdapterFormatError) as caught:
            Adapter.from_bytes(data, str(path))
        assert str(caught.value) == found["open"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


def test_the_good_file_passes(path):
    path.write_bytes(DATA)
    assert refusals(path) == {}


# Bytes

ENDS = sorted(info.stop for info in GOOD.container.tensors.values())[:-1]


@pytest.mark.parametrize("size", [0, 1, 7])
def test_a_file_too_short_for_a_header(path, size):
    words = f"has {size} bytes, too few for a safetensors file; it may be truncated"
    expect_refusal(path, DATA[:size], OPENING, (words,))


@pytest.mark.parametrize("size", [8, 9, HEADER_STOP - 1])
def test_a_file_cut_within_its_header(path, size):
    length = HEADER_STOP - 8
    expect_refusal(path, DATA[:size], OPENING, (f"header length is {length}", f"only {size} bytes", "truncated"))


@pytest.mark.parametrize("size", sorted({HEADER_STOP, HEADER_STOP + 1, *ENDS, len(DATA) - 1}))
def test_a_file_cut_within_its_tensors(path, size):
    words = f"tensors end at byte {len(DATA)}, the file at {size}; it is truncated or has extra bytes"
    expect_refusal(path, DATA[:size], OPENING, (words,))


@pytest.mark.parametrize("extra", [b"\0", b"\0" * 8, DATA])
def test_bytes_after_the_last_tensor(path, extra):
    words = f"tensors end at byte {len(DATA)}, the file at {len(DATA) + len(extra)}"
    expect_refusal(path, DATA + extra, OPENING, (words, "extra bytes"))


@pytest.mark.parametrize(
    ("length", "words"),
    [
        (0, ("header is not JSON", "char 0")),
        (7, ("header is not JSON",)),
        (HEADER_STOP - 108, ("header is not JSON",)),
        (len(DATA) - 8, ("header is not JSON",)),
        (len(DATA) - 7, (f"header length is {len(DATA) - 7}", f"only {len(DATA)} bytes", "truncated")),
        (1 << 32, (f"header length is {1 << 32}", f"only {len(DATA)} bytes")),
        (1 << 63, (f"header length is {1 << 63}", f"only {len(DATA)} bytes")),
        ((1 << 64) - 1, (f"header length is {(1 << 64) - 1}", f"only {len(DATA)} bytes")),
    ],
)
def test_a_header_length_that_lies(path, length, words):
    expect_refusal(path, length.to_bytes(8, "little") + DATA[8:], OPENING, words)


def test_a_header_longer_than_any_adapters(path):
    data = join(b" " * (1 << 18) + DATA[8:HEADER_STOP], DATA[HEADER_STOP:])
    words = f"header length is {(1 << 18) + HEADER_STOP - 8}", "at most 262144", "not an engram adapter"
    expect_refusal(path, data, OPENING, words)


# Header


def deep(levels: int) -> bytes:
    return b'{"a":' + b"[" * levels + b"]" * levels + b"}"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"not json", ("header is not JSON", "line 1 column 1")),
        (b"\xff\xfe{}", ("header is not JSON", "0xff")),
        (b"[]", ("header is list, expected an object",)),
        (b"null", ("header is NoneType",)),
        (b'"text"', ("header is str",)),
        (b'{"a":NaN}', ("header holds NaN",)),
        (b'{"a":{},"b":{},"a":{}}', ("header names the key 'a' twice",)),
        (b'{"__metadata__":{"k":"1","k":"2"}}', ("header names the key 'k' twice",)),
        (b'{"__metadata__":{"k":1}}', ("'__metadata__' does not map text to text",)),
        (b'{"__metadata__":null}', ("'__metadata__' does not map text to text",)),
        (b'{"__metadata__":[]}', ("'__metadata__' does not map text to text",)),
        (b"{}", ("lacks the field 'format'", "not an engram adapter")),
        (deep(64), ("header nests its JSON too deeply", "64")),
        (deep(100_000), ("header nests its JSON too deeply", "64")),
        (b'{"a":' * 40_000, ("header nests its JSON too deeply", "64")),
        (b'{"a":' + b"9" * 5000 + b"}", ("header", "digits")),
        (b'{"\\u001b[31mred":1}', (r"tensor '\x1b[31mred' needs exactly",)),
        (b'{"' + b"x" * 5000 + b'":1}', ("tensor 'xxx", "...", "needs exactly the fields data_offsets, dtype, shape")),
    ],
)
def test_a_header_that_is_none(path, header, words):
    expect_refusal(path, join(header, b""), OPENING, words)


def changed_header(change: Callable[[dict[str, Any]], object]) -> bytes:
    header, body = split(DATA)
    change(header)
    return join(json.dumps(header).encode(), body)


IDS = "clip_l.entries.ids"
SPAN = [GOOD.container.tensors[IDS].start - HEADER_STOP, GOOD.container.tensors[IDS].stop - HEADER_STOP]
N_IDS = (SPAN[1] - SPAN[0]) // 4


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("dtype", "F64", ("has dtype 'F64'", "U8, I32, I64, F32, F16, BF16")),
        ("dtype", "i32", ("has dtype 'i32'",)),
        ("dtype", None, ("has dtype None",)),
        ("dtype", ["I32"], ("has dtype ['I32']",)),
        ("dtype", "I64", (f"has {4 * N_IDS} bytes", f"shape [{N_IDS}] of I64 needs {8 * N_IDS}")),
        ("shape", [N_IDS + 1], (f"has {4 * N_IDS} bytes", f"needs {4 * N_IDS + 4}")),
        ("shape", [-N_IDS], (f"shape [-{N_IDS}]", "expected lists of counts")),
        ("shape", [float(N_IDS)], (f"shape [{N_IDS}.0]", "expected lists of counts")),
        ("shape", [True], ("shape [True]", "expected lists of counts")),
        ("shape", N_IDS, (f"shape {N_IDS}", "expected lists of counts")),
        ("shape", [1 << 62], (f"shape [{1 << 62}]", "expected lists of counts")),
        ("shape", [(1 << 62) - 1] * 4, ("needs",)),
        ("shape", [1] * 9, ("shape [1, 1, 1, 1, 1, 1, ...]", "expected lists of counts")),
        ("shape", [1] * 5000, ("shape [1, 1, 1, 1, 1, 1, ...]",)),
        ("data_offsets", [SPAN[0]], (f"at [{SPAN[0]}]", "expected lists of counts")),
        ("data_offsets", SPAN[::-1], (f"has {SPAN[0] - SPAN[1]} bytes",)),
        ("data_offsets", [SPAN[0] + 4, SPAN[1] + 4], ("begins at byte", "a hole or an overlap")),
        ("data_offsets", [SPAN[0] - 4, SPAN[1] - 4], ("begins at byte", "a hole or an overlap")),
        ("data_offsets", [0, 4 * N_IDS], ("begins at byte", "a hole or an overlap")),
        ("data_offsets", [1 << 40, (1 << 40) + 4 * N_IDS], ("begins at byte", "a hole or an overlap")),
        ("data_offsets", [-4, 4 * N_IDS - 4], ("expected lists of counts",)),
        ("data_offsets", [1 << 64, (1 << 64) + 4 * N_IDS], ("expected lists of counts",)),
        ("data_offsets", None, ("at None", "expected lists of counts")),
        ("extra", 1, ("needs exactly the fields data_offsets, dtype, shape",)),
    ],
)
def test_a_tensor_whose_place_is_wrong(path, field, value, words):
    data = changed_header(lambda header: header[IDS].__setitem__(field, value))
    expect_refusal(path, data, OPENING, words)


def test_a_tensor_that_is_no_object(path):
    data = changed_header(lambda header: header.__setitem__(IDS, [1, 2]))
    expect_refusal(path, data, OPENING, (f"tensor '{IDS}' needs exactly the fields",))


def test_the_first_tensor_after_a_hole(path):
    pieces = Pieces.of(DATA)
    header = pieces.header()
    for item in header.values():
        if "data_offsets" in item:
            item["data_offsets"] = [place + 8 for place in item["data_offsets"]]
    data = join(json.dumps(header).encode(), b"\0" * 8 + pieces.body())
    stop = len(data) - len(pieces.body()) - 8
    expect_refusal(path, data, OPENING, (f"begins at byte {stop + 8}, expected {stop}: a hole or an overlap",))


def test_a_file_laid_out_in_another_way_is_still_an_adapter(path):
    """Readers depend neither on the order of tensors, nor on alignment, nor on spaces."""
    pieces = Pieces.of(DATA)
    pieces.tensors = dict(reversed(pieces.tensors.items()))
    header = json.dumps(pieces.header(), indent=1).encode()
    header += b" " * (1 - len(header) % 2)  # an odd length
    path.write_bytes(len(header).to_bytes(8, "little") + header + pieces.body())
    assert refusals(path) == {}
    assert merge_adapters([open_adapter(path)]).to_bytes() == DATA


# What the header says


def with_metadata(**fields: Any) -> bytes:
    pieces = Pieces.of(DATA)
    for field, value in fields.items():
        if value is None:
            del pieces.metadata[field]
        else:
            pieces.metadata[field] = value
    return pieces.pack()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"format": None}, ("lacks the field 'format'", "not an engram adapter")),
        ({"format": "pt"}, ("format is 'pt'", "reads 'engram'")),
        ({"format_version": None}, ("lacks the field 'format_version'",)),
        ({"format_version": "2"}, ("format_version is '2'", "reads '1'")),
        ({"format_version": "1.0"}, ("format_version is '1.0'",)),
        ({"kind": None}, ("lacks the field 'kind'",)),
        ({"kind": "hashed-memory"}, ("kind is 'hashed-memory'", "reads 'concept-table'")),
        ({"kind": "\x1b[31m"}, (r"kind is '\x1b[31m'",)),
        ({"kind": "x" * 5000}, ("kind is 'xxx", "...")),
        ({"extra": "1"}, ("header has an unknown field 'extra'",)),
        ({"manifest": None}, ("manifest: is not JSON",)),
        ({"manifest": ""}, ("manifest: is not JSON",)),
        ({"manifest": "{}"}, ("manifest: manifest lacks the field 'backbone'",)),
        ({"manifest": "[]"}, ("manifest: manifest is list, expected an object",)),
        ({"manifest": '{"a":1,"a":2}'}, ("manifest: names the key 'a' twice",)),
        ({"manifest": '{"a":NaN}'}, ("manifest: holds NaN",)),
        ({"manifest": deep(64).decode()}, ("manifest: nests its JSON too deeply",)),
        ({"manifest": deep(20_000).decode()}, ("manifest: nests its JSON too deeply",)),
        ({"manifest": '{"b":1, "a":2}'}, ("manifest: is not canonical JSON",)),
    ],
)
def test_a_header_field_that_is_wrong(path, fields, words):
    expect_refusal(path, with_metadata(**fields), OPENING, words)


REMOVED = object()


def with_manifest(where: str, value: Any) -> bytes:
    pieces = Pieces.of(DATA)
    manifest = pieces.manifest
    *parents, last = where.split("/")
    holder = manifest
    for key in parents:
        holder = holder[key]
    if value is REMOVED:
        del holder[last]
    else:
        holder[last] = value
    pieces.manifest = manifest
    return pieces.pack()


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        ("backbone", REMOVED, ("manifest lacks the field 'backbone'",)),
        ("backbone", "SD15", ("backbone is 'SD15', expected a lower-case name",)),
        ("backbone", "", ("backbone is ''",)),
        ("backbone", 15, ("manifest.backbone has the type int",)),
        ("extra", 1, ("manifest has an unknown field 'extra'; known: backbone, base_model, streams",)),
        ("x" * 5000, 1, ("manifest has an unknown field 'xxx", "...")),
        ("base_model", None, ("manifest.base_model has the type NoneType",)),
        ("base_model/id", "", ("base_model.id is ''",)),
        ("base_model/id", "\x1b]0;owned\x07", (r"base_model.id is '\x1b]0;owned\x07', expected a printable name",)),
        ("base_model/fingerprint", "cd" * 31, ("base_model.fingerprint is 'cdcd", "64 hexadecimal digits")),
        ("base_model/fingerprint", "CD" * 32, ("base_model.fingerprint is 'CDCD",)),
        ("base_model/fingerprint", False, ("base_model.fingerprint has the type bool",)),
        ("streams", {}, ("streams is {}, expected at least one stream",)),
        ("streams", [], ("manifest.streams has the type list",)),
        ("streams/Bad Name", {}, ("streams is 'Bad Name', expected lower-case stream names",)),
        ("streams/\x1b[2J", 1, (r"streams is '\x1b[2J'",)),
        ("streams/a.b", {}, ("streams is 'a.b'",)),
        ("streams/t5", None, ("streams.t5 is NoneType, expected an object",)),
        ("streams/t5/width", 0, ("streams.t5.width is 0, expected 1..1048576",)),
        ("streams/t5/width", -1, ("streams.t5.width is -1",)),
        ("streams/t5/width", 1 << 70, (f"streams.t5.width is {1 << 70}",)),
        ("streams/t5/width", True, ("streams.t5.width has the type bool",)),
        ("streams/t5/width", 5.0, ("streams.t5.width has the type float",)),
        ("streams/t5/width", 6, ("t5.vectors: has shape [20, 5], expected 6 (d) on axis 1",)),
        ("streams/t5/site", "Last", ("streams.t5.site is 'Last'",)),
        ("streams/t5/extra", 1, ("streams.t5 has an unknown field 'extra'",)),
        ("streams/t5/tokenizer", [], ("streams.t5.tokenizer has the type list",)),
        ("streams/t5/tokenizer/class", "two\nlines", (r"streams.t5.tokenizer.class is 'two\nlines'",)),
        ("streams/t5/tokenizer/vocab_size", 0, ("streams.t5.tokenizer.vocab_size is 0, expected 1..2147483648",)),
        ("streams/t5/tokenizer/vocab_size", 1 << 32, (f"vocab_size is {1 << 32}",)),
        ("streams/t5/tokenizer/fingerprint", "", ("streams.t5.tokenizer.fingerprint is ''",)),
        ("streams/t5/tokenizer/fingerprint", REMOVED, ("streams.t5.tokenizer lacks the field 'fingerprint'",)),
        ("streams/t5", REMOVED, ("has an unknown tensor 't5.entries.concept'",)),
    ],
)
def test_a_manifest_field_that_is_wrong(path, where, value, words):
    expect_refusal(path, with_manifest(where, value), OPENING, words)


# Tensors: seen on opening


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


def with_record(index: int, **fields: Any) -> Pieces:
    pieces = Pieces.of(DATA)
    record = json.loads(pieces.records[index])
    for field, value in fields.items():
        if value is REMOVED:
            del record[field]
        else:
            record[field] = value
    records = pieces.records
    records[index] = canonical(record).encode("utf-8", "surrogatepass")
    pieces.records = records
    return pieces


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
        (b'{"activation":"a","x":' + b"[" * 2000, ("nests its JSON too deeply",)),
        (RECORD.replace(b'"training":{}', b'"training":{"a":1e999}'), ("JSON",)),
        (RECORD.replace(b'"training":{}', b'"training":{"a":-0}'), ("is not canonical JSON",)),
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


# Paths


def test_a_missing_file(tmp_path):
    missing = tmp_path / "no such.safetensors"
    expect_read_error(missing, str(missing), "No such file")


def test_a_folder(tmp_path):
    expect_read_error(tmp_path, str(tmp_path), "not a regular file", "give the path of a .safetensors file")


@pytest.mark.parametrize("name", ["nul\0.safetensors", "\0"])
def test_a_path_with_a_null_byte(tmp_path, name):
    expect_read_error(tmp_path / name, r"\x00", "null byte")


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
    "shape", [[1 << 61], [1 << 31, 1 << 30], [0, 1 << 61], [(1 << 62) - 1] * 8, [1 << 40, 0, 1 << 40]]
)
def test_a_shape_in_the_header_costs_nothing(path, shape):
    data = changed_header(lambda header: header["t5.vectors"].__setitem__("shape", shape))
    path.write_bytes(data)

    def attempt() -> None:
        with pytest.raises(AdapterFormatError):
            open_adapter(path)

    assert peak_of(attempt) < 200_000


def test_a_hostile_record_costs_at_most_what_its_text_parses_to():
    """The worst case known: three bytes of text are a dict of 64 bytes and its slot, once more while it is dumped."""
    filler = {"x": [{} for _ in range(80_000)]}
    adapter = Adapter.from_bytes(with_record(0, training=filler).pack())
    size = adapter.nbytes()
    assert size > 240_000
    assert peak_of(adapter.check) < 60 * size
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
