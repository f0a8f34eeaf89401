"""The adapter file, version 1, of kind `concept-table`: opening, checking, reading, building, saving.

Shapes: C concepts; per stream K entries, V trigger variants, d width.
docs/file-format.md describes the file in full.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.canonical import dump_canonical, parse_canonical
from engram_core.checks import check_fits, check_ids, check_ngram_order, check_offsets, check_owners, check_vectors
from engram_core.concept import Concept, ConceptRecord, ConceptStream
from engram_core.container import (
    Container,
    ContainerWriter,
    hash_buffer,
    open_container,
    open_target,
    read_container,
    write_all,
)
from engram_core.errors import AdapterFormatError, ConceptNotFoundError, InputError, quote
from engram_core.manifest import Manifest
from engram_core.registry import Ngram
from engram_core.storage import CONTAINER_NAMES, decode_vectors, encode_vectors, widest

FORMAT = "engram"
FORMAT_VERSION = "1"
KIND = "concept-table"

_VECTOR_TYPES = {name: dtype for dtype, name in CONTAINER_NAMES.items()}
_RECORDS, _RECORD_OFFSETS = "concepts.json", "concepts.offsets"
_CHECK_BLOCK = 1024  # concepts checked at a time: bounds memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamTable:
    """The columns of one stream, as they lie in the file: read-only views.

    Attributes:
        ids: int32, the token ids of all entries, end to end.
        offsets: int64 [K+1], where each entry's ids begin.
        concept: int32 [K], the concept of each entry, ascending.
        vectors: stored bits [K, d]: float32, float16, or uint16 holding bfloat16.
        dtype: `f32`, `f16` or `bf16`.
        scales: float32 [C, d].
        trigger_ids: int32, the token ids of all trigger variants.
        trigger_offsets: int64 [V+1].
        trigger_concept: int32 [V], ascending.
    """

    ids: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    concept: npt.NDArray[np.int32]
    vectors: npt.NDArray[Any]
    dtype: str
    scales: npt.NDArray[np.float32]
    trigger_ids: npt.NDArray[np.int32]
    trigger_offsets: npt.NDArray[np.int64]
    trigger_concept: npt.NDArray[np.int32]

    def entry_rows(self, first: int, last: int | None = None) -> slice:
        """Return the entries of concepts first..last-1 (one concept when `last` is left out)."""
        return _rows(self.concept, first, last)

    def trigger_rows(self, first: int, last: int | None = None) -> slice:
        """Return the trigger variants of concepts first..last-1."""
        return _rows(self.trigger_concept, first, last)

    def ngrams(self, rows: slice) -> tuple[Ngram, ...]:
        """Return entries as tuples of ids."""
        return _ngrams(self.ids, self.offsets, rows)

    def triggers(self, rows: slice) -> tuple[Ngram, ...]:
        """Return trigger variants as tuples of ids."""
        return _ngrams(self.trigger_ids, self.trigger_offsets, rows)


# The tensors of a stream: attribute, name in the file, type (None: a vector type), shape in C, K, V, d (None: free).
_COLUMNS: tuple[tuple[str, str, str | None, tuple[str | None, ...]], ...] = (
    ("ids", "entries.ids", "I32", (None,)),
    ("offsets", "entries.offsets", "I64", ("K+1",)),
    ("concept", "entries.concept", "I32", ("K",)),
    ("vectors", "vectors", None, ("K", "d")),
    ("scales", "scales", "F32", ("C", "d")),
    ("trigger_ids", "triggers.ids", "I32", (None,)),
    ("trigger_offsets", "triggers.offsets", "I64", ("V+1",)),
    ("trigger_concept", "triggers.concept", "I32", ("V",)),
)


class Adapter:
    """One opened adapter: concepts for one backbone, in canonical order (by name).

    Opening reads the header alone. Reading a concept reads, and checks, that concept alone;
    `check` goes through everything. Instances are immutable and safe to share between threads.

    Attributes:
        label: file name for messages.
        path: the file, or None when held in memory.
        manifest: backbone, base model and streams.
        streams: stream name to its columns.
    """

    label: str
    path: Path | None
    manifest: Manifest
    streams: Mapping[str, StreamTable]

    def __init__(self, container: Container) -> None:
        """Wrap an opened container; use `open_adapter`, `Adapter.build` or `merge_adapters` instead."""
        self._container = container
        self.label, self.path = container.label, container.path
        self.manifest = _read_manifest(container)
        self._record_bytes, self._record_offsets = _read_records(container)
        self.streams = _read_streams(container, self.manifest, len(self))

    @classmethod
    def from_bytes(cls, data: bytes, label: str = "<memory>") -> Adapter:
        """Open an adapter held in memory.

        Raises:
            AdapterFormatError: naming `label` and the field at fault.
        """
        return cls(read_container(data, label))

    @classmethod
    def build(cls, manifest: Manifest, concepts: Iterable[Concept], label: str = "<memory>") -> Adapter:
        """Build an adapter in memory from concepts.

        The manifest's streams that no concept uses are left out, so equal content gives equal bytes.

        Raises:
            InputError: no concept, two of one name, or a concept that does not fit the manifest.
        """
        ordered = sorted(concepts, key=lambda concept: concept.name)
        if not ordered:
            raise InputError("an adapter needs at least one concept, got none")
        for one, other in pairwise(ordered):
            if one.name == other.name:
                raise InputError(f"two concepts have the name {one.name!r}; names are unique in an adapter")
        used = {name for concept in ordered for name in concept.streams}
        unknown = used - manifest.streams.keys()
        if unknown:
            raise InputError(f"stream {min(unknown)!r} is not in the manifest, which has {', '.join(manifest.streams)}")
        manifest = Manifest(
            backbone=manifest.backbone,
            base_model=manifest.base_model,
            base_fingerprint=manifest.base_fingerprint,
            streams={name: spec for name, spec in manifest.streams.items() if name in used} or manifest.streams,
        )
        arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {}
        texts = [concept.record.to_bytes() for concept in ordered]
        arrays[_RECORDS] = "U8", np.frombuffer(b"".join(texts), np.uint8)
        arrays[_RECORD_OFFSETS] = "I64", pack_offsets([len(text) for text in texts])
        for name, spec in manifest.streams.items():
            arrays.update(_pack_stream(name, spec.width, ordered))
        buffer = io.BytesIO()
        shapes = {key: (dtype, array.shape) for key, (dtype, array) in arrays.items()}
        try:
            writer = ContainerWriter(buffer, pack_metadata(manifest), shapes)
            for key, (_, array) in arrays.items():
                writer.write(key, np.ascontiguousarray(array))
            adapter = cls.from_bytes(buffer.getvalue(), label)
            adapter.check()
        except AdapterFormatError as error:  # the concepts came from the caller, not from a file
            raise InputError(str(error)) from None
        return adapter

    def __len__(self) -> int:
        """Return C, the number of concepts."""
        return len(self._record_offsets) - 1

    def __repr__(self) -> str:
        """Show label, backbone and number of concepts."""
        return f"<Adapter {self.label}: {self.manifest.backbone}, {len(self)} concepts>"

    @property
    def container(self) -> Container:
        """The safetensors container beneath, for readers of raw bytes."""
        return self._container

    def record_text(self, index: int) -> bytes:
        """Return a concept's record as it lies in the file."""
        start, stop = (int(offset) for offset in self._record_offsets[index : index + 2])
        if not 0 <= start < stop <= len(self._record_bytes):
            raise AdapterFormatError(
                f"{self.label}: {_RECORD_OFFSETS}: record {index} reaches from {start} to {stop}, "
                f"{_RECORDS} has {len(self._record_bytes)} bytes"
            )
        return self._record_bytes[start:stop].tobytes()

    def record(self, index: int) -> ConceptRecord:
        """Return what concept `index` says of itself.

        Raises:
            AdapterFormatError: the record is malformed.
        """
        try:
            return ConceptRecord.from_bytes(self.record_text(index))
        except AdapterFormatError:
            raise
        except ValueError as error:
            raise AdapterFormatError(f"{self.label}: {_RECORDS}: record {index}: {error}") from None

    def records(self) -> Iterator[ConceptRecord]:
        """Iterate over all records in canonical order."""
        return (self.record(index) for index in range(len(self)))

    def names(self) -> list[str]:
        """Return all concept names in canonical order; parses every record."""
        return [record.name for record in self.records()]

    def anchored(self) -> npt.NDArray[np.bool_]:
        """Return for each concept whether it is `anchored` (else `spans`), without parsing the records."""
        # Canonical records begin {"activation":"a... or {"activation":"s...: the 16th byte decides.
        at = len(b'{"activation":"')
        where = self._record_offsets[:-1] + at
        if len(where) and not (int(where.min()) >= 0 and int(where.max()) < len(self._record_bytes)):
            raise AdapterFormatError(f"{self.label}: {_RECORD_OFFSETS}: out of range")
        letters = self._record_bytes[where]
        bad = np.flatnonzero((letters != ord("a")) & (letters != ord("s")))
        if bad.size:
            self.record(int(bad[0]))  # says what is wrong with it
            raise AdapterFormatError(f"{self.label}: {_RECORDS}: record {int(bad[0])}: has no activation")
        anchored: npt.NDArray[np.bool_] = letters == ord("a")
        return anchored

    def index(self, name: str) -> int:
        """Return the position of a concept by name; reads about log2(C) records.

        Raises:
            ConceptNotFoundError: no concept has that name.
        """
        position = bisect_left(range(len(self)), name, key=lambda index: self.record(index).name)
        if position == len(self) or self.record(position).name != name:
            few = ", ".join(repr(self.record(index).name) for index in range(min(len(self), 5)))
            more = f" and {len(self) - 5} more" if len(self) > 5 else ""
            raise ConceptNotFoundError(f"{self.label}: has no concept {name!r}; it has {few}{more}")
        return position

    def concept(self, which: int | str) -> Concept:
        """Read one concept, by position or name, and check it.

        Raises:
            ConceptNotFoundError: no such concept.
            AdapterFormatError: the concept's data are malformed.
        """
        index = self.index(which) if isinstance(which, str) else which
        if not 0 <= index < len(self):
            raise ConceptNotFoundError(f"{self.label}: has no concept number {index}; it has {len(self)}")
        record = self.record(index)
        check_concepts(self.label, self.manifest, self.streams, index, [record.dtype])
        streams = {}
        for name, table in self.streams.items():
            rows, variants = table.entry_rows(index), table.trigger_rows(index)
            if rows.start == rows.stop:
                continue
            streams[name] = ConceptStream(
                triggers=table.triggers(variants),
                entries=table.ngrams(rows),
                vectors=decode_vectors(np.ascontiguousarray(table.vectors[rows]), table.dtype),
                scales=np.array(table.scales[index]),
            )
        return Concept(record=record, streams=streams)

    def concepts(self) -> Iterator[Concept]:
        """Iterate over all concepts in canonical order."""
        return (self.concept(index) for index in range(len(self)))

    def identity(self) -> str:
        """Return the adapter's identity: the hex SHA-256 of the whole file. Reads every byte."""
        return hash_buffer(self._container.buffer)

    def nbytes(self) -> int:
        """Return the size of the file."""
        return len(self._container.buffer)

    def to_bytes(self) -> bytes:
        """Return the whole file."""
        return bytes(self._container.buffer)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> str:
        """Write the adapter to a file, atomically, and return its identity.

        Raises:
            TargetExistsError: the file exists and `overwrite` is false.
            AdapterWriteError: the file cannot be written.
        """
        with open_target(path, overwrite=overwrite) as target:
            write_all(target, memoryview(self._container.buffer))
        return self.identity()

    def check(self) -> None:
        """Go through every byte that has a meaning, in bounded memory.

        Raises:
            AdapterFormatError: naming the file and the first field at fault.
        """
        previous = ""
        dtypes: list[str] = []
        for record in self.records():
            if record.name <= previous:
                raise AdapterFormatError(
                    f"{self.label}: {_RECORDS}: {record.name!r} follows {previous!r}; names are unique and in order"
                )
            previous = record.name
            dtypes.append(record.dtype)
        for name, table in self.streams.items():
            check_owners(table.concept, 0, len(self), f"{self.label}: {name}.entries.concept")
            check_owners(table.trigger_concept, 0, len(self), f"{self.label}: {name}.triggers.concept")
        for first in range(0, len(self), _CHECK_BLOCK):
            check_concepts(self.label, self.manifest, self.streams, first, dtypes[first : first + _CHECK_BLOCK])
        for name, table in self.streams.items():
            held = np.bincount(table.concept, minlength=len(self))
            asked = widest({dtype for dtype, count in zip(dtypes, held.tolist(), strict=True) if count})
            if asked != table.dtype:
                raise AdapterFormatError(
                    f"{self.label}: {name}.vectors: are {table.dtype}, the records ask for {asked}"
                )


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open an adapter file. Reads the header alone; the rest is memory-mapped.

    Raises:
        AdapterReadError: the file is missing or unreadable.
        AdapterFormatError: the file is not a valid adapter; the message names the field.
    """
    return Adapter(open_container(path))


def check_concepts(
    label: str, manifest: Manifest, streams: Mapping[str, StreamTable], first: int, dtypes: Sequence[str]
) -> None:
    """Check consecutive concepts, whose vector types are given, in every stream.

    Raises:
        AdapterFormatError: naming `label` and the first field at fault.
    """
    last = first + len(dtypes)
    held = np.zeros(last - first, bool)
    for name, table in streams.items():
        where = f"{label}: {name}."
        rows, variants = table.entry_rows(first, last), table.trigger_rows(first, last)
        present = []
        for column, ids, offsets, concept, part in (
            ("entries", table.ids, table.offsets, table.concept, rows),
            ("triggers", table.trigger_ids, table.trigger_offsets, table.trigger_concept, variants),
        ):
            bounds = offsets[part.start : part.stop + 1]
            check_offsets(bounds, len(ids), f"{where}{column}.offsets", row=part.start)
            used = ids[bounds[0] : bounds[-1]]
            check_ids(used, manifest.streams[name].tokenizer.vocab_size, f"{where}{column}.ids")
            owners = concept[part]
            check_owners(owners, first, last, f"{where}{column}.concept", row=part.start)
            check_ngram_order(used, bounds - bounds[0], owners, f"{where}{column}", row=part.start)
            owned = np.zeros(last - first, bool)
            owned[owners - first] = True
            present.append(owned)
        differs = present[0] != present[1]
        if differs.any():
            lacking = first + int(differs.argmax())
            raise AdapterFormatError(f"{where}triggers: concept {lacking} has entries without trigger or the reverse")
        held |= present[0]
        check_vectors(table.vectors[rows], table.dtype, f"{where}vectors")
        check_vectors(table.scales[first:last], "f32", f"{where}scales")
        if table.scales[first:last][~present[0]].view("<u4").any():
            raise AdapterFormatError(f"{where}scales: not zero for a concept without entries in this stream")
        if table.dtype == "f32":
            for index, dtype in enumerate(dtypes, start=first):
                if dtype == "f32":
                    continue
                part = table.entry_rows(index)
                if part.start < part.stop:
                    check_fits(table.vectors[part], table.dtype, dtype, f"{where}vectors of concept {index}")
    if not held.all():
        raise AdapterFormatError(f"{label}: concept {first + int(np.argmin(held))} has no entry in any stream")


def pack_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the header fields of a concept table."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": KIND,
        "manifest": dump_canonical(manifest.to_json()).decode("utf-8"),
    }


def pack_offsets(lengths: Iterable[int]) -> npt.NDArray[np.int64]:
    """Return int64 [n+1] offsets for n lengths."""
    values = np.fromiter(lengths, np.int64)
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(values, dtype=np.int64)])


def _pack_stream(name: str, width: int, concepts: list[Concept]) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """Return the tensors of one stream: name to (container type, array)."""
    entries: list[tuple[int, Ngram]] = []
    triggers: list[tuple[int, Ngram]] = []
    vectors: list[npt.NDArray[np.float32]] = []
    scales = np.zeros((len(concepts), width), "<f4")
    dtype = widest({concept.record.dtype for concept in concepts if name in concept.streams})
    for index, concept in enumerate(concepts):
        stream = concept.streams.get(name)
        if stream is None:
            continue
        k = len(stream.entries)
        where = f"concept {concept.name!r}, stream {name!r}"
        table = _as_floats(stream.vectors, (k, width), f"{where}: vectors")
        scale = _as_floats(stream.scales, (width,), f"{where}: scales")
        order = sorted(range(k), key=lambda row: (len(stream.entries[row]), stream.entries[row]))
        entries += [(index, stream.entries[row]) for row in order]
        triggers += [(index, ids) for ids in sorted(stream.triggers, key=lambda ids: (len(ids), ids))]
        # Rounding to the concept's own type first makes the bits independent of what else is in the file.
        rounded = decode_vectors(encode_vectors(table[order], concept.record.dtype), concept.record.dtype)
        vectors.append(rounded)
        scales[index] = scale
    stacked = np.concatenate(vectors) if vectors else np.zeros((0, width), "<f4")
    columns: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "vectors": (CONTAINER_NAMES[dtype], encode_vectors(stacked, dtype)),
        "scales": ("F32", scales),
    }
    for prefix, rows in (("entries", entries), ("triggers", triggers)):
        flat = np.array([i for _, ids in rows for i in ids] or np.zeros(0, np.int64))
        if flat.dtype.kind not in "iu":
            raise InputError(f"stream {name!r}: {prefix} hold ids of type {flat.dtype}, expected integers")
        if flat.size and not (flat.min() >= 0 and flat.max() < 1 << 31):
            raise InputError(f"stream {name!r}: {prefix} hold ids outside 0..2**31-1")
        columns[f"{prefix}.ids"] = "I32", flat.astype("<i4")
        columns[f"{prefix}.offsets"] = "I64", pack_offsets(len(ids) for _, ids in rows)
        columns[f"{prefix}.concept"] = "I32", np.array([index for index, _ in rows], "<i4")
    return {f"{name}.{column}": value for column, value in columns.items()}


def _as_floats(values: npt.ArrayLike, shape: tuple[int, ...], where: str) -> npt.NDArray[np.float32]:
    array = np.asarray(values)
    if array.shape != shape:
        raise InputError(f"{where} have shape {array.shape}, expected {shape}")
    if array.dtype.kind not in "fiu":
        raise InputError(f"{where} are {array.dtype}, expected floats")
    with np.errstate(over="ignore"):  # what overflows becomes infinity, which is refused by name
        floats: npt.NDArray[np.float32] = array.astype(np.float32, copy=False)
        return floats


def _read_manifest(container: Container) -> Manifest:
    metadata, label = container.metadata, container.label
    for field, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION), ("kind", KIND)):
        value = metadata.get(field)
        if value is None:
            raise AdapterFormatError(f"{label}: header lacks the field {field!r}; it is not an engram adapter")
        if value != expected:
            raise AdapterFormatError(f"{label}: {field} is {quote(value)}, this version reads {expected!r}")
    unknown = metadata.keys() - {"format", "format_version", "kind", "manifest"}
    if unknown:
        raise AdapterFormatError(f"{label}: header has an unknown field {quote(min(unknown))}")
    try:
        return _parse_manifest(metadata.get("manifest", ""))
    except ValueError as error:
        raise AdapterFormatError(f"{label}: manifest: {error}") from None


@lru_cache(maxsize=64)  # merging opens thousands of files that say the same
def _parse_manifest(text: str) -> Manifest:
    return Manifest.from_json(parse_canonical(text.encode("utf-8", "surrogatepass")))


def _read_records(container: Container) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    texts = _column(container, _RECORDS, "U8", 1)
    offsets = _column(container, _RECORD_OFFSETS, "I64", 1)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(texts):
        raise AdapterFormatError(
            f"{container.label}: {_RECORD_OFFSETS}: does not describe at least one record in {len(texts)} bytes"
        )
    return texts, offsets


def _read_streams(container: Container, manifest: Manifest, n_concepts: int) -> dict[str, StreamTable]:
    expected = {_RECORDS, _RECORD_OFFSETS} | {f"{s}.{column}" for s in manifest.streams for _, column, _, _ in _COLUMNS}
    unknown = container.tensors.keys() - expected
    if unknown:
        raise AdapterFormatError(f"{container.label}: has an unknown tensor {quote(min(unknown))}")
    streams = {}
    for name, spec in manifest.streams.items():
        columns = {
            attribute: _column(container, f"{name}.{column}", dtype, len(shape))
            for attribute, column, dtype, shape in _COLUMNS
        }
        sizes = {
            "C": n_concepts,
            "K": len(columns["concept"]),
            "V": len(columns["trigger_concept"]),
            "d": spec.width,
        }
        sizes |= {"K+1": sizes["K"] + 1, "V+1": sizes["V"] + 1}
        for attribute, column, _, shape in _COLUMNS:
            for axis, size in enumerate(shape):
                found = columns[attribute].shape[axis]
                if size is not None and found != sizes[size]:
                    raise AdapterFormatError(
                        f"{container.label}: {name}.{column}: has shape {list(columns[attribute].shape)}, "
                        f"expected {sizes[size]} ({size}) on axis {axis}"
                    )
        for column, ids, ends in (
            ("entries", columns["ids"], columns["offsets"]),
            ("triggers", columns["trigger_ids"], columns["trigger_offsets"]),
        ):
            if ends[0] != 0 or ends[-1] != len(ids):
                raise AdapterFormatError(
                    f"{container.label}: {name}.{column}.offsets: reach from {ends[0]} to {ends[-1]}, "
                    f"expected 0 to {len(ids)}"
                )
        if sizes["K"] == 0:
            raise AdapterFormatError(
                f"{container.label}: {name}.vectors: is empty; a stream without entries is left out"
            )
        dtype = _VECTOR_TYPES[container.tensors[f"{name}.vectors"].dtype]
        streams[name] = StreamTable(dtype=dtype, **columns)
    return streams


def _column(container: Container, name: str, dtype: str | None, n_axes: int) -> npt.NDArray[Any]:
    info = container.tensors.get(name)
    if info is None:
        raise AdapterFormatError(f"{container.label}: lacks the tensor {name!r}")
    allowed = tuple(_VECTOR_TYPES) if dtype is None else (dtype,)
    if info.dtype not in allowed or len(info.shape) != n_axes:
        raise AdapterFormatError(
            f"{container.label}: {name}: is {info.dtype} {list(info.shape)}, "
            f"expected {' or '.join(allowed)} with {n_axes} axes"
        )
    return container.array(name)


def _rows(concept: npt.NDArray[np.int32], first: int, last: int | None) -> slice:
    # Keys of the column's own type: others make NumPy convert, and so read, the whole column.
    bounds = concept.searchsorted(np.array((first, first + 1 if last is None else last), concept.dtype))
    return slice(int(bounds[0]), int(max(bounds)))  # max: a hostile file's column may not ascend


def _ngrams(ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: slice) -> tuple[Ngram, ...]:
    bounds = offsets[rows.start : rows.stop + 1].tolist()
    flat = ids[bounds[0] : bounds[-1]].tolist()
    return tuple(tuple(flat[a - bounds[0] : b - bounds[0]]) for a, b in pairwise(bounds))
