"""A header that is not an adapter's is refused on opening: the error has the file, the field, the value, the remedy."""

import json
from pathlib import Path
from typing import Any

import pytest
from core_hostile import Pieces, join
from core_refusals import DATA, GOOD, HEADER_STOP, OPENING, REMOVED, changed_header, expect_refusal, refusals

from engram_core import merge_adapters, open_adapter


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bad.safetensors"


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
        (b'{"a":' * 40_000 + b"1" + b"}" * 40_000, ("header nests its JSON too deeply", "64")),
        (b'{"a":' + b"9" * 1001 + b"}", ("header holds the integer 9999", "at most 1000 characters")),
        (b'{"a":-0}', ("header holds the integer -0",)),
        (b'{"\\u001b[31mred":1}', (r"tensor '\x1b[31mred' needs exactly",)),
        (b'{"' + b"x" * 5000 + b'":1}', ("tensor 'xxx", "...", "needs exactly the fields data_offsets, dtype, shape")),
    ],
)
def test_a_header_that_is_none(path, header, words):
    expect_refusal(path, join(header, b""), OPENING, words)


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
        ("shape", [(1 << 62) - 1] * 4, ("no file is that large",)),
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
        ({"kind": "unheard-of"}, ("kind is 'unheard-of'", "reads 'concept-table'")),
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
