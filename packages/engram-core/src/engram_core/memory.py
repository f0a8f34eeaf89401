"""The adapter file, version 1, of kind `hashed-memory`: opening, checking, reading, writing.

Shapes: layers with a memory I; N longest n-gram, H heads an n-gram, D channels a head, E = (N-1)·H·D; d width of the
model, M branches, k kernel size, V token ids. docs/file-format.md describes the file in full.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import numpy.typing as npt

from engram_core.canonical import dump_canonical, parse_canonical
from engram_core.container import (
    Container,
    ContainerWriter,
    hash_buffer,
    open_container,
    open_target,
    read_container,
    write_all,
)
from engram_core.errors import AdapterFormatError, InputError, quote
from engram_core.hashing import NgramHash
from engram_core.layout import FORMAT, FORMAT_VERSION, check_metadata
from engram_core.manifest import Manifest, is_printable_name, take_fields
from engram_core.storage import CONTAINER_NAMES, STORED_TYPES, are_finite

__all__ = [
    "MEMORY_KIND",
    "TABLE",
    "HashedMemory",
    "MemoryRecord",
    "MemorySettings",
    "Stored",
    "open_memory",
    "write_memory",
]

MEMORY_KIND = "hashed-memory"
LOOKUP = "lookup"
TABLE = "multi_head_embedding.embedding.weight"
"""A layer's table, without the layer's prefix."""

# What a stranger's settings may be, far beyond use: bounds the work that reading them costs.
_LIMITS = {"max_ngram_size": 64, "n_head_per_ngram": 4096, "kernel_size": 4096, "dilation": 4096, "hc_mult": 256}
_LONGEST_REACH = 4096  # of the convolution; caches keep so many positions
_MOST_LAYERS = 4096
_LARGEST_TABLE = 1 << 40
_TYPES = {name: dtype for dtype, name in CONTAINER_NAMES.items()}
_CHECK_BYTES = 1 << 24

Hashing = Literal["published", "engram-peft"]
"""How n-grams become numbers, see `NgramHash`."""

Stored = tuple[str, npt.NDArray[Any]]
"""A tensor as it lies in the file: `f32`, `f16` or `bf16`, and its bits (bfloat16 as uint16)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """The shape of a hashed memory, under the published names (deepseek-ai/Engram, TinyEngram).

    Attributes:
        engram_vocab_size: requested rows a head for n = 2, 3, ..., N; each head takes the next unused prime.
        max_ngram_size: N.
        n_embed_per_ngram: channels of all heads of one n together, H·D.
        n_head_per_ngram: H.
        layer_ids: decoder layers before which a memory stands, in the order in which they take primes.
        kernel_size: k, taps of the convolution.
        dilation: positions between taps; published as N.
        hc_mult: M, branches that each have a gate and a convolution of their own; their outputs add up.
        bias: whether the projections have one.
        pad_id: token id that stands left of the text.
        seed: of the hash.
        hashing: `published`, or `engram-peft` as that library does it: from the oldest token on, and with ids of
            tokens beyond the compressed vocabulary. In a file it stands only where it is not `published`.
    """

    engram_vocab_size: tuple[int, ...]
    max_ngram_size: int
    n_embed_per_ngram: int
    n_head_per_ngram: int
    layer_ids: tuple[int, ...]
    kernel_size: int
    dilation: int
    hc_mult: int = 1
    bias: bool = True
    pad_id: int
    seed: int = 0
    hashing: Hashing = "published"

    def __post_init__(self) -> None:
        """Check every value; raises InputError."""
        object.__setattr__(self, "engram_vocab_size", tuple(self.engram_vocab_size))
        object.__setattr__(self, "layer_ids", tuple(self.layer_ids))
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            _require(_is_count(value, limit), name, value, f"1..{limit}")
        reach = (self.kernel_size - 1) * self.dilation
        _require(
            reach <= _LONGEST_REACH,
            "dilation",
            self.dilation,
            f"at most {_LONGEST_REACH} positions from the first tap to the last",
        )
        heads, sizes = self.n_head_per_ngram, self.engram_vocab_size
        _require(self.max_ngram_size >= 2, "max_ngram_size", self.max_ngram_size, "at least 2")
        _require(
            len(sizes) == self.max_ngram_size - 1 and all(_is_count(size, _LARGEST_TABLE) for size in sizes),
            "engram_vocab_size",
            list(sizes),
            f"{self.max_ngram_size - 1} sizes, one for each n from 2 to max_ngram_size",
        )
        _require(
            _is_count(self.n_embed_per_ngram, 1 << 24) and self.n_embed_per_ngram % heads == 0,
            "n_embed_per_ngram",
            self.n_embed_per_ngram,
            f"a multiple of n_head_per_ngram, which is {heads}",
        )
        _require(
            0 < len(self.layer_ids) <= _MOST_LAYERS
            and all(type(layer) is int and 0 <= layer < 1 << 20 for layer in self.layer_ids)
            and len(set(self.layer_ids)) == len(self.layer_ids),
            "layer_ids",
            list(self.layer_ids),
            "distinct layer numbers, at least one",
        )
        _require(type(self.bias) is bool, "bias", self.bias, "true or false")
        _require(type(self.pad_id) is int and 0 <= self.pad_id < 1 << 31, "pad_id", self.pad_id, "a token id")
        _require(type(self.seed) is int and 0 <= self.seed < 1 << 63, "seed", self.seed, "0..2**63-1")
        _require(self.hashing in get_args(Hashing), "hashing", self.hashing, f"one of {', '.join(get_args(Hashing))}")

    @property
    def head_width(self) -> int:
        """Return D, channels of a table row."""
        return self.n_embed_per_ngram // self.n_head_per_ngram

    @property
    def memory_width(self) -> int:
        """Return E, channels of all heads of all n together."""
        return (self.max_ngram_size - 1) * self.n_embed_per_ngram

    def hash(self, compressed_vocab_size: int, compressed_pad_id: int) -> NgramHash:
        """Return the addresses that belong to these settings."""
        return NgramHash(
            engram_vocab_size=self.engram_vocab_size,
            max_ngram_size=self.max_ngram_size,
            n_head_per_ngram=self.n_head_per_ngram,
            layer_ids=self.layer_ids,
            compressed_vocab_size=compressed_vocab_size,
            compressed_pad_id=compressed_pad_id,
            seed=self.seed,
        )

    def hash_lookup(self, lookup: npt.NDArray[np.integer[Any]]) -> NgramHash:
        """Return the addresses that belong to these settings and a lookup from token id to compressed id [V]."""
        n_ids, pad = int(lookup.max()) + 1, int(lookup[self.pad_id])
        if self.hashing == "published":
            return self.hash(n_ids, pad)
        size = _count_gapless(lookup)
        return replace(self.hash(size, 0), compressed_pad_id=pad, n_ids=n_ids, oldest_first=True)

    def shapes(self, width: int, n_rows: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of one layer's tensors, by the field's usual names.

        Args:
            width: d.
            n_rows: of the layer's table.
        """
        d, e, m = width, self.memory_width, self.hc_mult
        shapes: dict[str, tuple[int, ...]] = {
            TABLE: (n_rows, self.head_width),
            "value_proj.weight": (d, e),
            "short_conv.conv.weight": (m * d, 1, self.kernel_size),
        }
        for branch in range(m):
            shapes |= {
                f"key_projs.{branch}.weight": (d, e),
                f"norm1.{branch}.weight": (d,),
                f"norm2.{branch}.weight": (d,),
                f"short_conv.norms.{branch}.weight": (d,),
            }
        if self.bias:
            shapes |= {name.replace("weight", "bias"): (d,) for name in tuple(shapes) if "_proj" in name}
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        if self.hashing == "published":
            del values["hashing"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, value: Any) -> MemorySettings:
        """Build settings from plain JSON values; raises InputError naming the field."""
        types: dict[str, type] = dict.fromkeys((item.name for item in fields(cls)), int)
        types |= {"engram_vocab_size": list, "layer_ids": list, "bias": bool, "hashing": str}
        if not (isinstance(value, dict) and "hashing" in value):
            del types["hashing"]
        elif value["hashing"] == "published":  # one way to say it, or equal content could have other bytes
            raise InputError("memory has the field 'hashing' with the value 'published'; it is left out then")
        return cls(**take_fields(value, "memory", types))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRecord:
    """What a memory says of itself.

    Attributes:
        name: what it is called.
        settings: its shape.
        license: of what it was made from, an SPDX id or words; None when unknown.
        training: how it was made, plain JSON values.
    """

    name: str
    settings: MemorySettings
    license: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the texts; raises InputError."""
        _require(is_printable_name(self.name), "name", self.name, "a printable name")
        _require(
            self.license is None or is_printable_name(self.license), "license", self.license, "null or a printable text"
        )

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values."""
        return {
            "license": self.license,
            "memory": self.settings.to_json(),
            "name": self.name,
            "training": dict(self.training),
        }


class HashedMemory:
    """One opened memory. Opening reads the header alone; tensors are memory-mapped and read when touched.

    Instances are immutable and safe to share between threads.

    Attributes:
        label: file name for messages.
        path: the file, or None when held in memory.
        manifest: backbone, base model, and the one stream `text` with its tokenizer.
        record: name, settings, licence, training.
    """

    label: str
    path: Path | None
    manifest: Manifest
    record: MemoryRecord

    def __init__(self, container: Container) -> None:
        """Wrap an opened container; use `open_memory` or `HashedMemory.build` instead."""
        self._container = container
        self.label, self.path = container.label, container.path
        check_metadata(container, MEMORY_KIND)
        try:
            self.manifest, self.record = _parse(container.metadata.get("manifest", ""))
        except ValueError as error:
            raise AdapterFormatError(f"{self.label}: manifest: {error}") from None
        self._check_shapes()

    @classmethod
    def from_bytes(cls, data: bytes, label: str = "<memory>") -> HashedMemory:
        """Open a memory held in memory.

        Raises:
            AdapterFormatError: naming `label` and the field at fault.
        """
        return cls(read_container(data, label))

    @classmethod
    def build(
        cls,
        manifest: Manifest,
        record: MemoryRecord,
        lookup: npt.NDArray[np.integer[Any]],
        tensors: Mapping[int, Mapping[str, Stored]],
        label: str = "<memory>",
    ) -> HashedMemory:
        """Build a memory in memory; the arguments are those of `write_memory`.

        Raises:
            AdapterFormatError: a tensor is missing, unknown, or of another type or shape.
        """
        buffer = io.BytesIO()
        _write(buffer, manifest, record, lookup, tensors)
        return cls.from_bytes(buffer.getvalue(), label)

    def __repr__(self) -> str:
        """Show label, backbone and layers."""
        layers = ", ".join(map(str, self.settings.layer_ids))
        return f"<HashedMemory {self.label}: {self.manifest.backbone}, layers {layers}>"

    def __deepcopy__(self, _: object) -> HashedMemory:
        return self  # nothing in it changes, and a mapped file cannot be copied

    @property
    def settings(self) -> MemorySettings:
        """Return the memory's shape."""
        return self.record.settings

    @property
    def width(self) -> int:
        """Return d, the width of the model's hidden states."""
        return self.manifest.streams[_STREAM].width

    @cached_property
    def lookup(self) -> npt.NDArray[np.int32]:
        """Token id to compressed id, int32 [V].

        Raises:
            AdapterFormatError: the compressed ids are not 0, 1, ... without a gap.
        """
        lookup: npt.NDArray[np.int32] = self._container.array(LOOKUP)
        size = len(lookup)
        in_range = int(lookup.min()) == 0 and int(lookup.max()) < size
        if self.settings.hashing == "engram-peft":
            if not in_range:
                raise AdapterFormatError(f"{self.label}: {LOOKUP}: does not map to 0 .. {size - 1}, 0 among them")
        elif not (in_range and np.bincount(lookup, minlength=1).all()):
            raise AdapterFormatError(f"{self.label}: {LOOKUP}: is not a map onto 0, 1, 2, ...")
        return lookup

    @cached_property
    def hash(self) -> NgramHash:
        """The memory's addresses."""
        return self.settings.hash_lookup(self.lookup)

    def names(self) -> Iterator[str]:
        """Iterate over the names of a layer's tensors."""
        return iter(self.settings.shapes(self.width, 0))

    def tensor(self, layer: int, name: str) -> Stored:
        """Return a tensor of a layer as it lies in the file: a read-only view, not read yet."""
        full = f"layers.{layer}.{name}"
        return _TYPES[self._container.tensors[full].dtype], self._container.array(full)

    def place(self, layer: int, name: str) -> tuple[str, tuple[int, ...], int]:
        """Return type, shape and first byte in the file of a layer's tensor, for readers that map the file."""
        info = self._container.tensors[f"layers.{layer}.{name}"]
        return _TYPES[info.dtype], info.shape, info.start

    def n_parameters(self) -> int:
        """Return the number of learned values."""
        return sum(math.prod(info.shape) for name, info in self._container.tensors.items() if name != LOOKUP)

    def identity(self) -> str:
        """Return the memory's identity: the hex SHA-256 of the whole file. The first call reads every byte."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        with self._container.read_whole():
            return hash_buffer(self._container.buffer)

    def nbytes(self) -> int:
        """Return the size of the file."""
        return len(self._container.buffer)

    def to_bytes(self) -> bytes:
        """Return the whole file."""
        return bytes(self._container.buffer)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> str:
        """Write the memory to a file, atomically, and return its identity.

        Raises:
            TargetExistsError: the file exists and `overwrite` is false.
            AdapterWriteError: the file cannot be written.
        """
        with open_target(path, overwrite=overwrite) as target, self._container.read_whole():
            write_all(target, memoryview(self._container.buffer))
        return self.identity()

    def check(self, *, tables: bool = True) -> None:
        """Go through every byte, in bounded memory; without the tables it reads little of a large file.

        Raises:
            AdapterFormatError: naming the file and the first field at fault.
        """
        with self._container.read_whole() if tables else contextlib.nullcontext():
            _ = self.lookup
            for layer in self.settings.layer_ids:
                for name in self.names():
                    if name == TABLE and not tables:
                        continue
                    dtype, stored = self.tensor(layer, name)
                    flat = stored.reshape(-1)
                    step = _CHECK_BYTES // flat.itemsize
                    if not all(are_finite(flat[first : first + step], dtype) for first in range(0, len(flat), step)):
                        raise AdapterFormatError(f"{self.label}: layers.{layer}.{name}: holds NaN or infinity")

    def _check_shapes(self) -> None:
        settings, tensors, label = self.settings, self._container.tensors, self.label
        info = tensors.get(LOOKUP)
        vocab = self.manifest.streams[_STREAM].tokenizer.vocab_size
        if info is None or info.dtype != "I32" or len(info.shape) != 1 or not info.shape[0]:
            raise AdapterFormatError(f"{label}: {LOOKUP}: is missing, or not one list of I32")
        if not settings.pad_id < info.shape[0]:
            raise AdapterFormatError(
                f"{label}: memory.pad_id is {settings.pad_id}, {LOOKUP} has {info.shape[0]} ids; the tokenizer {vocab}"
            )
        # Every tensor but the tables' lengths first, and then those: work never exceeds what the file itself holds.
        known = {LOOKUP}
        for layer in settings.layer_ids:
            for name, (rows, *rest) in settings.shapes(self.width, 0).items():
                full = f"layers.{layer}.{name}"
                found = tensors.get(full)
                if found is None:
                    raise AdapterFormatError(f"{label}: lacks the tensor {full!r}")
                is_table = name == TABLE
                fits = list(found.shape[1:]) == rest and (is_table or found.shape[0] == rows)
                if found.dtype not in _TYPES or not found.shape or not fits:
                    raise AdapterFormatError(
                        f"{label}: {full}: is {found.dtype} {list(found.shape)}, expected {' or '.join(_TYPES)} "
                        f"[{', '.join(map(str, ['rows' if is_table else rows, *rest]))}]"
                    )
                known.add(full)
        unknown = tensors.keys() - known
        if unknown:
            raise AdapterFormatError(f"{label}: has an unknown tensor {quote(min(unknown))}")
        n_rows = {layer: tensors[f"layers.{layer}.{TABLE}"].shape[0] for layer in settings.layer_ids}
        # Before any prime is looked for. Primes are distinct, so the i-th is above i.
        n_heads = len(n_rows) * settings.n_head_per_ngram * len(settings.engram_vocab_size)
        least = settings.n_head_per_ngram * sum(settings.engram_vocab_size)
        for layer, rows in n_rows.items():
            if rows < least:
                raise _wrong_rows(label, layer, rows, f"at least {least}")
        if sum(n_rows.values()) < n_heads * (n_heads + 1) // 2:
            raise AdapterFormatError(
                f"{label}: layers.{max(n_rows)}.{TABLE}: has {n_rows[max(n_rows)]} rows; all tables together have "
                f"{sum(n_rows.values())}, too few for {n_heads} heads with a prime each"
            )
        for layer, primes in settings.hash(1, 0).primes.items():
            if n_rows[layer] != primes.sum():
                raise _wrong_rows(label, layer, n_rows[layer], str(primes.sum()))


def _wrong_rows(label: str, layer: int, found: int, expected: str) -> AdapterFormatError:
    return AdapterFormatError(
        f"{label}: layers.{layer}.{TABLE}: has {found} rows, memory.engram_vocab_size asks for {expected}"
    )


_STREAM = "text"


def _count_gapless(lookup: npt.NDArray[np.integer[Any]]) -> int:
    """Return how many of 0, 1, 2, ... occur before the first that does not."""
    gaps = np.flatnonzero(np.bincount(lookup) == 0)
    return int(gaps[0]) if gaps.size else int(lookup.max()) + 1


def open_memory(path: str | os.PathLike[str]) -> HashedMemory:
    """Open a memory file. Reads the header alone; the rest is memory-mapped.

    Raises:
        AdapterReadError: the file is missing or unreadable.
        AdapterFormatError: the file is not a valid memory; the message names the field.
    """
    return HashedMemory(open_container(path))


def write_memory(
    path: str | os.PathLike[str],
    manifest: Manifest,
    record: MemoryRecord,
    lookup: npt.NDArray[np.integer[Any]],
    tensors: Mapping[int, Mapping[str, Stored]],
    *,
    overwrite: bool = False,
) -> HashedMemory:
    """Write a memory to a file, atomically, and open it; tensors may be larger than memory when they are mapped.

    Args:
        path: the file.
        manifest: with the one stream `text`.
        record: what the memory says of itself.
        lookup: token id to compressed id [V].
        tensors: layer to name to tensor, see `MemorySettings.shapes`.
        overwrite: replace an existing file.

    Raises:
        TargetExistsError: the file exists and `overwrite` is false.
        AdapterWriteError: the file cannot be written.
        AdapterFormatError: a tensor is missing, unknown, of another type or shape, or not finite.
    """
    with open_target(path, overwrite=overwrite) as target:
        _write(target, manifest, record, lookup, tensors)
        HashedMemory(replace(open_container(target.name), label=str(path))).check()
    return open_memory(path)


def _write(
    target: BinaryIO,
    manifest: Manifest,
    record: MemoryRecord,
    lookup: npt.NDArray[np.integer[Any]],
    tensors: Mapping[int, Mapping[str, Stored]],
) -> None:
    if lookup.dtype.kind not in "iu" or (lookup.size and not (lookup.min() >= 0 and lookup.max() < 1 << 31)):
        raise AdapterFormatError(f"{LOOKUP}: is {lookup.dtype}, expected integers from 0 to 2**31-1")
    arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {LOOKUP: ("I32", np.ascontiguousarray(lookup, "<i4"))}
    for layer, group in tensors.items():
        for name, (dtype, stored) in group.items():
            kind = STORED_TYPES.get(dtype)
            if kind is None or stored.dtype.newbyteorder("<") != kind:
                raise AdapterFormatError(
                    f"layers.{layer}.{name}: is {quote(dtype)} in an array of {stored.dtype}, expected "
                    f"{', '.join(f'{key} in {value}' for key, value in STORED_TYPES.items())}"
                )
            arrays[f"layers.{layer}.{name}"] = CONTAINER_NAMES[dtype], np.ascontiguousarray(stored, kind)
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": MEMORY_KIND,
        "manifest": dump_canonical(manifest.to_json() | record.to_json()).decode("utf-8"),
    }
    writer = ContainerWriter(target, metadata, {name: (dtype, array.shape) for name, (dtype, array) in arrays.items()})
    for name, (_, array) in arrays.items():
        writer.write(name, array)


def _parse(text: str) -> tuple[Manifest, MemoryRecord]:
    value = parse_canonical(text.encode("utf-8", "surrogatepass"))
    if not isinstance(value, dict):
        raise InputError(f"is {type(value).__name__}, expected an object")
    own: dict[str, type | tuple[type, ...]] = {
        "license": (str, type(None)),
        "memory": dict,
        "name": str,
        "training": dict,
    }
    root = take_fields({name: value[name] for name in own if name in value}, "manifest", own)
    manifest = Manifest.from_json({name: item for name, item in value.items() if name not in own})
    if set(manifest.streams) != {_STREAM}:
        raise InputError(f"streams are {', '.join(manifest.streams)}, expected {_STREAM!r} alone")
    if manifest.streams[_STREAM].sites is not None:
        raise InputError(f"streams.{_STREAM} has an unknown field 'sites'; a hashed memory's layers are its places")
    return manifest, MemoryRecord(
        name=root["name"],
        settings=MemorySettings.from_json(root["memory"]),
        license=root["license"],
        training=root["training"],
    )


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 < value <= limit


def _require(ok: object, field: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{field} is {quote(value)}, expected {expected}")
