"""Damaged adapter files. Mutant `number` of a seed is always the same bytes."""

import contextlib
import json
import random
import struct
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from core_hostile import NUMPY_TYPES, Pieces, Tensor, join, one, several, sited


class Pairs(list):
    """A JSON object as [key, value] lists, which may name a key twice."""


class Raw(str):
    """JSON text to be written as it is."""


LOW, HIGH = -(1 << 63), (1 << 63) - 1

_INTEGERS = [0, 1, 2, 3, 7, 8, 255, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 53, 1 << 62, 1 << 63, 1 << 64, 10**30]
_INTEGERS += [-1, -2, -(1 << 31), -(1 << 63), (1 << 31) - 1, (1 << 62) - 1, (1 << 63) - 1, (1 << 64) - 1]
_WORDS = ["", "cat", "engram", "1", "2", "concept-table", "hashed-memory", "anchored", "spans", "absolute", "relative"]
_WORDS += [
    "absolute-tanh",
    "sum",
    "mean",
    "f32",
    "f16",
    "bf16",
    "F32",
    "F16",
    "BF16",
    "F64",
    "I32",
    "I64",
    "U8",
    "BOOL",
]
_WORDS += ["clip_l", "t5", "\x1b[31mred", "two\nlines", "\u202eright", " outer ", "\0", "é", "e\u0301", "🙂", "x" * 300]
_WORDS += ["x" * 3000, "__metadata__", "concepts.json", "ab" * 32, "AB" * 32, "toy/other", "last_hidden_state"]
_WORDS += ["sites", "mid_block"]
_RAW = ["NaN", "Infinity", "-Infinity", "1e999", "-0", "-0.0", "1.0", "1E2", "1e-400", "9" * 400, "9" * 5000, "tru"]
_RAW += ['"\\ud800"', '"\\u0041"', '"a\\/b"', "[" * 40 + "]" * 40, "[" * 500 + "]" * 500, "[" * 100_000, "\ufeff1"]
_RAW += ["[" * 970 + "]" * 970, '{"a":' * 90 + "0" + "}" * 90, "[" + "{}," * 20_000 + "{}]", " 1", "", "/*x*/1", "01"]


def _weird(rng: random.Random) -> Any:
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice(_INTEGERS)
    if kind == 1:
        return rng.choice(_WORDS)
    if kind == 2:
        return Raw(rng.choice(_RAW))
    if kind == 3:
        return rng.choice([None, True, False, 0.5, -1.5, 1e308, 5e-324])
    if kind == 4:
        return rng.choice([[], Pairs(), [0], [0, 0], [[0]], Pairs([["a", 1]]), [None], ["x"], [-1, 1], [1, 0]])
    return [rng.choice(_INTEGERS) for _ in range(rng.choice([1, 2, 3, 9]))]


def _parse(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def _dump(value: Any, *, order: bool = False) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        pairs = sorted(value, key=lambda pair: pair[0]) if order else value
        return "{" + ",".join(f"{_dump(key)}:{_dump(item, order=order)}" for key, item in pairs) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_dump(item, order=order) for item in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _places(value: Any) -> list[tuple[Any, int]]:
    """Return every (list, index) of a JSON tree; for objects the list is that of pairs."""
    found = []
    for index, item in enumerate(value):
        found.append((value, index))
        inner = item[1] if isinstance(value, Pairs) else item
        if isinstance(inner, list):
            found += _places(inner)
    return found


def _mutate_json(rng: random.Random, root: Any) -> None:
    places = _places(root) if isinstance(root, list) else []
    if not places:
        return
    holder, index = rng.choice(places)
    is_object = isinstance(holder, Pairs)
    value = holder[index][1] if is_object else holder[index]
    kind = rng.randrange(10)
    if kind <= 2:
        value = _weird(rng)
    elif kind <= 4 and type(value) is int:
        other = [f"{value}.0", f"{value}e0", f"-{value}", f" {value}"]
        value = rng.choice([*(value + by for by in (-1, 1, 2, 4, 8, -8, 1 << 32, LOW)), *map(Raw, other)])
    elif kind <= 4 and type(value) is str:
        at = rng.randrange(len(value) + 1)
        value = rng.choice([value[:at], value[:at] + rng.choice(_WORDS)[:20] + value[at:], rng.choice(_WORDS)])
    elif kind == 5:
        del holder[index]
        return
    elif kind == 6:
        extra = _weird(rng) if rng.random() < 0.5 else value
        same = is_object and rng.random() < 0.5
        key = holder[index][0] if same else rng.choice(_WORDS)
        holder.insert(rng.randrange(len(holder) + 1), [key, extra] if is_object else extra)
        return
    elif kind == 7:
        other, at = rng.choice(places)
        if isinstance(other, Pairs) == is_object:
            holder[index], other[at] = other[at], holder[index]
        return
    elif kind == 8 and is_object:
        holder[index][0] = rng.choice([*_WORDS, *(pair[0] for pair in holder), holder[index][0] + "x"])
        return
    else:
        value = [value]
    if is_object:
        holder[index] = [holder[index][0], value]
    else:
        holder[index] = value


def _mutate_text(rng: random.Random, text: str | bytes) -> str:
    root = _parse(text)
    for _ in range(rng.choice([1, 1, 1, 2])):
        _mutate_json(rng, root)
    return _dump(root, order=rng.random() < 0.9)


def _mutate_header(rng: random.Random, data: bytes) -> bytes:
    stop = 8 + int.from_bytes(data[:8], "little")
    root = _parse(data[8:stop])
    for _ in range(rng.choice([1, 1, 1, 2])):
        # Half of all places of a header are in it thrice: names, offsets, shapes. Metadata get a share of their own.
        _mutate_json(rng, root[0][1] if rng.random() >= 0.8 and root else root)
    text = _dump(root).encode("utf-8", "surrogatepass")
    if rng.random() < 0.1:
        return len(text).to_bytes(8, "little") + text + data[stop:]
    return join(text, data[stop:])


def _mutate_manifest(rng: random.Random, data: bytes) -> bytes:
    pieces = Pieces.of(data)
    pieces.metadata["manifest"] = _mutate_text(rng, pieces.metadata["manifest"])
    return pieces.pack()


def _mutate_record(rng: random.Random, data: bytes) -> bytes:
    pieces = Pieces.of(data)
    records = pieces.records
    at = rng.randrange(len(records))
    kind = rng.randrange(8)
    if kind == 0:
        records.insert(rng.randrange(len(records) + 1), records[at])
    elif kind == 1:
        records[at] = rng.choice(records)
    elif kind == 2:
        rng.shuffle(records)
    elif kind == 3:
        records[at] = rng.choice([b"", b"{}", b"null", b"[]", b"\xff" * 40, records[at] + b" ", records[at][:-1]])
    else:
        records[at] = _mutate_text(rng, records[at]).encode("utf-8", "surrogatepass")
    pieces.records = records
    return pieces.pack()


_FLOATS = [0.0, -0.0, 1.0, float("nan"), float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, 1e-38, 65504.0, 1e20]


def _number(rng: random.Random, array: np.ndarray) -> Any:
    """Return a value of the array's type: an extreme, or one that is near."""
    if array.dtype.kind == "f":
        return np.float32(rng.choice(_FLOATS))
    limits = np.iinfo(array.dtype)
    near = [0, 1, 2, 5, 19, 20, 999, 1000, limits.min, limits.max, limits.max - 1, limits.max // 2, 0x7F80, 0x7F81]
    near += [LOW, -1, HIGH - 14, 1 << 31, 1 << 62]
    value = rng.choice(near) if rng.random() < 0.7 or not array.size else int(rng.choice(array.flat)) + 1
    return min(max(value, int(limits.min)), int(limits.max))


def _mutate_tensor(rng: random.Random, data: bytes) -> bytes:
    pieces = Pieces.of(data)
    # What a first change left may be no array any more.
    with contextlib.suppress(KeyError, ValueError, IndexError):
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            _mutate_one_tensor(rng, pieces)
    return pieces.pack()


def _mutate_one_tensor(rng: random.Random, pieces: Any) -> None:
    names = list(pieces.tensors)
    name = rng.choice(names)
    tensor = pieces.tensors[name]
    kind = rng.randrange(16)
    if kind == 0:
        huge = (1 << 62) - 1
        del pieces.tensors[name]
        if rng.random() < 0.5:  # an empty tensor may claim any axis
            pieces.tensors[name] = Tensor(tensor.dtype, rng.choice([[0], [0, 3], [3, 0], [0, huge], [huge, 0]]), b"")
        return
    if kind == 1:
        pieces.tensors[rng.choice([*_WORDS, name + "x", name.replace("clip_l", "t5")])] = tensor
        return
    if kind == 2:
        other = rng.choice(names)
        pieces.tensors[name], pieces.tensors[other] = pieces.tensors[other], tensor
        return
    if kind == 3:
        tensor.shape = rng.choice([tensor.shape[::-1], [*tensor.shape, 1], [1, *tensor.shape], [len(tensor.data)], []])
        return
    if kind == 4:
        tensor.dtype = rng.choice([*NUMPY_TYPES, "F64", "BOOL", "F8_E4M3", "U16", "I16"])
        return
    array = pieces.array(name)
    if not array.size:  # its first axis may be of any length
        return
    if kind == 5:
        array = array[: rng.randrange(len(array) + 1)]
    elif kind == 6:
        array = np.concatenate([array, array[: rng.randrange(len(array) + 1)]])
    elif kind == 7:
        order = rng.sample(range(len(array)), len(array))
        array = array[order]
    elif kind == 8:
        array = np.sort(array, axis=0)
    elif kind == 9 and len(array) >= 5 and array.dtype == np.int64:
        # Each step is positive modulo 2**64, though the values are far outside.
        at = rng.randrange(1, len(array) - 3)
        array[at : at + 3] = [HIGH, LOW, -1]
    elif kind == 10 and len(array) > 1:
        array = np.repeat(array, 2, axis=0)[: len(array)]
    elif kind == 11 and len(array) > 1:
        low, high = sorted(rng.sample(range(len(array)), 2))
        array[low:high] = array[low]
    elif array.size:
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            array.flat[rng.randrange(array.size)] = _number(rng, array)
    pieces.put(name, array)


def _mutate_rows(rng: random.Random, data: bytes) -> bytes:
    """Drop, repeat or swap whole rows of a column, so that all shapes still fit."""
    pieces = Pieces.of(data)
    names = sorted({name.split(".")[0] for name in pieces.tensors} - {"concepts"})
    stream, column = rng.choice(names), rng.choice(["entries", "triggers"])
    ids, offsets = pieces.array(f"{stream}.{column}.ids"), pieces.array(f"{stream}.{column}.offsets").tolist()
    concept = pieces.array(f"{stream}.{column}.concept").tolist()
    vectors = pieces.array(f"{stream}.vectors")
    rows = [[ids[a:b], c, n] for n, (a, b, c) in enumerate(zip(offsets, offsets[1:], concept, strict=False))]
    at = rng.randrange(len(rows))
    kind = rng.randrange(6)
    if kind == 0:
        del rows[at]
    elif kind == 1:
        rows.insert(at, list(rows[at]))
    elif kind == 2:
        other = rng.randrange(len(rows))
        rows[at], rows[other] = rows[other], rows[at]
    elif kind == 3:
        rows[at][0] = np.array([rng.choice([0, 1, 20, 21, 999, 1000]) for _ in range(rng.randrange(4))], np.int32)
    elif kind == 4:
        rows[at][1] = rng.choice([0, 1, max(concept), max(concept) + 1, -1])
    else:
        rows = [row for row in rows if row[1] != rows[at][1]]
    if rng.random() < 0.5:
        rows.sort(key=lambda row: (row[1], len(row[0]), row[0].tolist()))
    pieces.put(f"{stream}.{column}.ids", np.concatenate([np.zeros(0, np.int32), *(row[0] for row in rows)]))
    pieces.put(f"{stream}.{column}.offsets", np.cumsum([0, *(len(row[0]) for row in rows)]))
    pieces.put(f"{stream}.{column}.concept", [row[1] for row in rows])
    if column == "entries":
        pieces.put(f"{stream}.vectors", vectors[[row[2] for row in rows]])
    return pieces.pack()


def _mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    result = bytearray(data)
    stop = 8 + int.from_bytes(data[:8], "little")
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        at = rng.randrange(*rng.choice([(0, len(result)), (stop, len(data)), (8, stop), (0, 8)])) % len(result)
        kind = rng.randrange(7)
        if kind <= 1:
            result[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            result[at] = rng.choice([0, 1, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)])
        elif kind == 3:
            del result[at : at + rng.choice([1, 2, 4, 8, 64])]
        elif kind == 4:
            result[at:at] = rng.randbytes(rng.choice([1, 2, 4, 8, 64]))
        elif kind == 5:
            begin = rng.randrange(len(data))
            chunk = data[begin : begin + rng.choice([1, 4, 8, 40])]
            result[at : at + len(chunk)] = chunk
        else:
            result[at : at + 8] = struct.pack("<q", rng.choice([LOW, HIGH, -1, 0, 1, 1 << 32]))
        if not result:
            return b""
    return bytes(result)


def _mutate_length(rng: random.Random, data: bytes) -> bytes:
    kind = rng.randrange(4)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return data + rng.choice([b"\0", b"\0" * 8, data, rng.randbytes(100)])
    if kind == 2:
        length = rng.choice([0, 1, 7, 8, 1 << 18, (1 << 18) + 1, 1 << 31, 1 << 32, 1 << 62, 1 << 63, (1 << 64) - 1])
        return length.to_bytes(8, "little") + data[8:]
    length = int.from_bytes(data[:8], "little") + rng.choice([-1, 1, -8, 8, 16, 100])
    return length.to_bytes(8, "little") + data[8:]


_KINDS: dict[Callable[[random.Random, bytes], bytes], int] = {
    _mutate_bytes: 4,
    _mutate_length: 1,
    _mutate_header: 5,
    _mutate_manifest: 3,
    _mutate_record: 4,
    _mutate_tensor: 7,
    _mutate_rows: 5,
}


@lru_cache(maxsize=1)
def sources() -> list[bytes]:
    """Return the valid adapters that mutants are made from."""
    adapters = [one(), one("f16"), one("bf16"), several()]
    adapters += [several("f32"), several("f16"), several("bf16"), sited()]
    return [adapter.to_bytes() for adapter in adapters]


def make_mutant(seed: int, number: int) -> tuple[str, bytes]:
    """Return how mutant `number` was made, and its bytes."""
    rng = random.Random(f"{seed}:{number}")
    source = rng.randrange(len(sources()))
    data = sources()[source]
    kinds = rng.choices(list(_KINDS), list(_KINDS.values()), k=2 if rng.random() < 0.15 else 1)
    # What one change left may be too damaged to be taken apart for another.
    with np.errstate(over="ignore"), contextlib.suppress(*([Exception] if len(kinds) > 1 else [])):
        for kind in kinds:
            data = kind(rng, data)
    return f"source {source}, " + " and ".join(kind.__name__[8:] for kind in kinds), data
