"""The rules of an adapter file once more (docs/file-format.md), in the plainest possible code."""

import json
import math
import re
import struct
from itertools import pairwise
from typing import Any, NoReturn

from core_hostile import Pieces, canonical

CHOICES = {
    "activation": ("anchored", "spans"),
    "dtype": ("f32", "f16", "bf16"),
    "overlap": ("sum", "mean"),
    "rule": ("absolute", "absolute-tanh", "relative"),
}
VECTOR_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}


class RuleError(Exception):
    """A file breaks a rule."""


def expect(ok: object, rule: str) -> None:
    if not ok:
        raise RuleError(rule)


def check_file(data: bytes) -> None:
    """Check everything that goes beyond a well-formed safetensors file; raises RuleError with the rule."""
    pieces = Pieces.of(data)
    expect(set(pieces.metadata) == {"format", "format_version", "kind", "manifest"}, "header fields")
    found = [pieces.metadata[field] for field in ("format", "format_version", "kind")]
    expect(found == ["engram", "1", "concept-table"], "format, version and kind")
    manifest = canonical_json(pieces.metadata["manifest"].encode())
    check_manifest(manifest)
    texts = read_records(pieces)
    records = [canonical_json(text) for text in texts]
    for record in records:
        check_record(record)
    expect(all(a["name"] < b["name"] for a, b in pairwise(records)), "names ascend")
    expected = {"concepts.json", "concepts.offsets"}
    held: set[int] = set()
    for name, stream in manifest["streams"].items():
        expected |= {f"{name}.{column}" for column in ("vectors", "scales")}
        expected |= {f"{name}.{c}.{part}" for c in ("entries", "triggers") for part in ("ids", "offsets", "concept")}
        expect(expected <= set(pieces.tensors), "no tensor is missing")
        held |= check_stream(pieces, name, stream, records)
    expect(set(pieces.tensors) == expected, "no tensor is unknown")
    expect(held == set(range(len(records))), "every concept has an entry")


def canonical_json(text: bytes) -> Any:
    expect(len(text) <= 256 * 1024, "at most 256 KiB of JSON")
    try:
        value = json.loads(text.decode(), parse_int=integer, parse_constant=refuse)
        levels = depth(value)
    except (ValueError, RecursionError):
        raise RuleError("is JSON of some depth") from None
    expect(levels <= 64, "nests at most 64 deep")
    expect(canonical(value) == text.decode(), "is canonical")
    return value


def integer(text: str) -> int:
    return refuse(text) if text == "-0" or len(text) > 1000 else int(text)


def refuse(constant: str) -> NoReturn:
    raise ValueError(constant)


def depth(value: Any) -> int:
    if not isinstance(value, (dict, list)):
        return 0
    return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)


def is_count(value: Any, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 256 and value.isprintable() and value == value.strip()


def is_name(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[a-z][a-z0-9_]{0,63}", value) is not None


def is_hash(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None


def check_manifest(manifest: Any) -> None:
    expect(isinstance(manifest, dict), "a manifest is an object")
    expect(set(manifest) == {"backbone", "base_model", "streams"}, "manifest fields")
    base, streams = manifest["base_model"], manifest["streams"]
    expect(isinstance(base, dict) and set(base) == {"fingerprint", "id"}, "base model fields")
    expect(is_name(manifest["backbone"]) and is_text(base["id"]), "backbone and model are named")
    expect(base["fingerprint"] is None or is_hash(base["fingerprint"]), "model fingerprint")
    expect(isinstance(streams, dict) and streams and all(map(is_name, streams)), "streams are named")
    for stream in streams.values():
        expect(isinstance(stream, dict) and set(stream) - {"sites"} == {"site", "tokenizer", "width"}, "stream fields")
        if "sites" in stream:
            check_sites(stream["sites"])
        expect(is_name(stream["site"]) and is_count(stream["width"], 1, 1 << 20), "site and width")
        tokenizer = stream["tokenizer"]
        expect(isinstance(tokenizer, dict), "a tokenizer is an object")
        expect(set(tokenizer) == {"class", "fingerprint", "vocab_size"}, "tokenizer fields")
        expect(is_text(tokenizer["class"]) and is_hash(tokenizer["fingerprint"]), "tokenizer identity")
        expect(is_count(tokenizer["vocab_size"], 1, 1 << 31), "vocabulary size")


def check_sites(sites: Any) -> None:
    expect(isinstance(sites, list) and 1 <= len(sites) <= 1024, "1 to 1,024 sites")
    named = [isinstance(site, str) and re.fullmatch("[a-z][a-z0-9_.]{0,127}", site) is not None for site in sites]
    expect(all(named) and len(set(sites)) == len(sites), "sites are named, each once")


def read_records(pieces: Pieces) -> list[bytes]:
    text, offsets = pieces.tensors["concepts.json"], pieces.tensors["concepts.offsets"]
    expect((text.dtype, len(text.shape), offsets.dtype, len(offsets.shape)) == ("U8", 1, "I64", 1), "record tensors")
    bounds = pieces.array("concepts.offsets").tolist()
    expect(len(bounds) > 1 and bounds[0] == 0 and bounds[-1] == len(text.data), "records cover the text")
    expect(all(a < b for a, b in pairwise(bounds)), "record offsets ascend")
    return [text.data[a:b] for a, b in pairwise(bounds)]


def check_record(record: Any) -> None:
    fields = {"activation", "dtype", "license", "max_ngram", "name", "overlap", "rule", "training", "trigger"}
    expect(isinstance(record, dict) and set(record) == fields, "record fields")
    expect(all(record[field] in choices for field, choices in CHOICES.items()), "known choices")
    expect(is_text(record["name"]) and is_text(record["trigger"]), "name and trigger")
    expect(type(record["max_ngram"]) is int and record["max_ngram"] >= 2, "max_ngram")
    expect(isinstance(record["training"], dict), "training")
    expect(record["license"] is None or isinstance(record["license"], str), "license")


def check_stream(pieces: Pieces, name: str, stream: Any, records: list[Any]) -> set[int]:
    """Check one stream's tensors; return the concepts that have entries."""
    vectors, scales = pieces.tensors[f"{name}.vectors"], pieces.tensors[f"{name}.scales"]
    entries = read_column(pieces, f"{name}.entries", stream, len(records))
    triggers = read_column(pieces, f"{name}.triggers", stream, len(records))
    expect(entries, "a stream has entries")
    expect({c for c, _ in entries} == {c for c, _ in triggers}, "entries and triggers of the same concepts")
    shape = [len(stream["sites"]), stream["width"]] if "sites" in stream else [stream["width"]]
    expect(vectors.shape == [len(entries), *shape], "one vector an entry and site")
    expect(scales.dtype == "F32" and scales.shape == [len(records), *shape], "one scale a concept and site")
    held = {concept for concept, _ in entries}
    dtypes = {records[concept]["dtype"] for concept in held}
    expect(vectors.dtype == VECTOR_TYPES[dtypes.pop() if len(dtypes) == 1 else "f32"], "vectors are of the widest type")
    width = math.prod(shape)
    size = len(vectors.data) // (len(entries) * width)
    for row, (concept, _) in enumerate(entries):
        for at in range(row * width, (row + 1) * width):
            check_number(vectors.data[at * size : (at + 1) * size], vectors.dtype, records[concept]["dtype"])
    for concept in range(len(records)):
        row = scales.data[concept * width * 4 : (concept + 1) * width * 4]
        expect(concept in held or not any(row), "no scales without entries")
        expect(all(math.isfinite(x) for x in struct.unpack(f"<{width}f", row)), "scales are finite")
    return held


def check_number(stored: bytes, dtype: str, narrower: str) -> None:
    if dtype == "F16":
        expect(math.isfinite(struct.unpack("<e", stored)[0]), "vectors are finite")
        return
    four = b"\0\0" + stored if dtype == "BF16" else stored
    value = struct.unpack("<f", four)[0]
    expect(math.isfinite(value), "vectors are finite")
    if narrower == "bf16":
        expect(four[:2] == b"\0\0", "vectors fit their concept's type")
    elif narrower == "f16":
        expect(abs(value) <= 65504 and struct.unpack("<e", struct.pack("<e", value))[0] == value, "vectors fit f16")


def read_column(pieces: Pieces, name: str, stream: Any, n_concepts: int) -> list[tuple[int, tuple[int, ...]]]:
    """Return (concept, ids) of each row."""
    types = [(pieces.tensors[f"{name}.{part}"].dtype) for part in ("ids", "offsets", "concept")]
    shapes = [pieces.tensors[f"{name}.{part}"].shape for part in ("ids", "offsets", "concept")]
    expect(types == ["I32", "I64", "I32"] and [len(shape) for shape in shapes] == [1, 1, 1], "column types")
    ids, bounds, concepts = (pieces.array(f"{name}.{part}").tolist() for part in ("ids", "offsets", "concept"))
    expect(len(bounds) == len(concepts) + 1, "one concept a row")
    expect(bounds[0] == 0 and bounds[-1] == len(ids), "rows cover the ids")
    expect(all(1 <= b - a <= 4096 for a, b in pairwise(bounds)), "1..4096 ids a row")
    expect(all(0 <= i < stream["tokenizer"]["vocab_size"] for i in ids), "ids are in the vocabulary")
    expect(all(0 <= c < n_concepts for c in concepts), "concepts exist")
    rows = [(concept, tuple(ids[a:b])) for concept, (a, b) in zip(concepts, pairwise(bounds), strict=True)]
    keys = [(concept, len(ngram), ngram) for concept, ngram in rows]
    expect(all(a < b for a, b in pairwise(keys)), "rows ascend by concept, length and ids")
    return rows
