"""Small valid adapter files, and the means to take a file apart and to put anything into it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from core_builders import VOCABULARY, make_adapter, make_concept, make_manifest, with_sites

from engram_core import Adapter

NUMPY_TYPES = {"U8": "u1", "I32": "<i4", "I64": "<i8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}

ONE_STREAM = make_manifest({"clip_l": 3})
SITES = ("down_blocks.0", "mid_block", "up_blocks.1")


def one(dtype: str = "f32", name: str = "cat", first: int = 10) -> Adapter:
    """One concept in one stream, with two variants of its trigger."""
    triggers = (first, first + 1, first + 2), (first, first + 3)
    concept = make_concept(name, *triggers, seed=first, dtype=dtype, training={"steps": 5})
    return make_adapter(concept, manifest=ONE_STREAM)


def several(dtype: str | None = None) -> Adapter:
    """Five concepts in two streams: every rule, activation and overlap, and, without `dtype`, every vector type."""
    both = ("clip_l", "t5")
    kinds: list[tuple[str, tuple[str, ...], str, dict[str, Any]]] = [
        ("ant", both, "f32", {"rule": "relative", "license": "MIT"}),
        ("bee", ("t5",), "f16", {"activation": "spans"}),
        ("cow", both, "bf16", {"rule": "absolute-tanh", "overlap": "mean"}),
        ("dog é", ("clip_l",), "f16", {"activation": "spans", "rule": "relative", "training": {"lr": [1e-3, None]}}),
        ("elk", both, "f32", {"max_ngram": 2}),
    ]
    concepts = []
    for index, (name, streams, own, fields) in enumerate(kinds):
        ids = 20 * (index + 1)
        triggers = (ids, ids + 1, ids + 2), (ids + 3, ids, ids + 1)
        concepts.append(make_concept(name, *triggers, streams=streams, seed=ids, dtype=dtype or own, **fields))
    return make_adapter(*concepts)


def sited(dtype: str | None = None) -> Adapter:
    """The same five concepts; one of the streams has sites."""
    return with_sites(several(dtype), {"t5": SITES})


@dataclass
class Tensor:
    dtype: str
    shape: list[int]
    data: bytes


@dataclass
class Pieces:
    """An adapter file in parts that can be changed at will; `pack` makes a consistent container of them."""

    metadata: dict[str, str]
    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, source: bytes | Adapter) -> "Pieces":
        header, body = split(source.to_bytes() if isinstance(source, Adapter) else source)
        metadata = header.pop("__metadata__")
        tensors = {}
        for name, item in header.items():
            start, stop = item["data_offsets"]
            tensors[name] = Tensor(item["dtype"], item["shape"], body[start:stop])
        return cls(metadata, tensors)

    def array(self, name: str) -> npt.NDArray[Any]:
        tensor = self.tensors[name]
        return np.frombuffer(tensor.data, NUMPY_TYPES[tensor.dtype]).reshape(tensor.shape).copy()

    def put(self, name: str, values: npt.ArrayLike, dtype: str | None = None) -> None:
        """Give a tensor new values, and their shape; its type stays unless `dtype` is given."""
        dtype = dtype or self.tensors[name].dtype
        array = np.ascontiguousarray(np.asarray(values, NUMPY_TYPES[dtype]))
        self.tensors[name] = Tensor(dtype, list(np.shape(values)), array.tobytes())

    def set(self, name: str, index: Any, value: Any) -> None:
        array = self.array(name)
        array[index] = value
        self.put(name, array)

    @property
    def manifest(self) -> Any:
        return json.loads(self.metadata["manifest"])

    @manifest.setter
    def manifest(self, value: Any) -> None:
        self.metadata["manifest"] = canonical(value)

    @property
    def records(self) -> list[bytes]:
        text = self.tensors["concepts.json"].data
        return [text[start:stop] for start, stop in pairwise(self.array("concepts.offsets").tolist())]

    @records.setter
    def records(self, texts: Sequence[bytes]) -> None:
        self.put("concepts.json", np.frombuffer(b"".join(texts), np.uint8))
        self.put("concepts.offsets", np.cumsum([0, *map(len, texts)]))

    def header(self) -> dict[str, Any]:
        header: dict[str, Any] = {"__metadata__": self.metadata}
        position = 0
        for name, tensor in self.tensors.items():
            stop = position + len(tensor.data)
            header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [position, stop]}
            position = stop
        return header

    def body(self) -> bytes:
        return b"".join(tensor.data for tensor in self.tensors.values())

    def pack(self) -> bytes:
        return join(json.dumps(self.header()).encode(), self.body())


def names_in(folder: Path) -> list[str]:
    """Return what lies in a folder, hidden files as well."""
    return sorted(path.name for path in folder.iterdir())


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    """Return the parsed header and the bytes after it."""
    stop = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:stop]), data[stop:]


def join(header: bytes, body: bytes) -> bytes:
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + body


def long_adapter(n_entries: int, width: int, dtype: str = "F32") -> bytes:
    """One concept with very many entries, most of the file their vectors."""
    pieces = Pieces.of(one(dtype.lower()))
    manifest = pieces.manifest
    manifest["streams"]["clip_l"]["width"] = width
    pieces.manifest = manifest
    number = np.arange(n_entries)
    pieces.put("clip_l.entries.ids", np.stack([number // VOCABULARY, number % VOCABULARY], axis=1).ravel())
    pieces.put("clip_l.entries.offsets", np.arange(n_entries + 1) * 2)
    pieces.put("clip_l.entries.concept", np.zeros(n_entries, np.int32))
    pieces.put("clip_l.vectors", np.ones((n_entries, width), np.float32), dtype)
    pieces.put("clip_l.scales", np.ones((1, width), np.float32))
    return pieces.pack()
