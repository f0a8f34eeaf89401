"""The layout of the file: which header fields and tensors a concept table has, packed and read.

Shapes: C concepts; per stream K entries, V trigger variants, d width, S sites; without sites their axis is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.canonical import dump_canonical, parse_canonical
from engram_core.concept import Concept
from engram_core.container import Container
from engram_core.errors import AdapterFormatError, InputError, quote
from engram_core.manifest import Manifest, StreamSpec
from engram_core.registry import Ngram
from engram_core.storage import CONTAINER_NAMES, decode_vectors, encode_vectors, widest

FORMAT = "engram"
FORMAT_VERSION = "1"
KIND = "concept-table"
_OPENERS = {KIND: "open_adapter", "hashed-memory": "open_memory"}

RECORDS, RECORD_OFFSETS = "concepts.json", "concepts.offsets"

_VECTOR_TYPES = {name: dtype for dtype, name in CONTAINER_NAMES.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamTable:
    """The columns of one stream, as they lie in the file: read-only views.

    Attributes:
        ids: int32, the token ids of all entries, end to end.
        offsets: int64 [K+1], where each entry's ids begin.
        concept: int32 [K], the concept of each entry, ascending.
        vectors: stored bits [K, d] or [K, S, d]: float32, float16, or uint16 holding bfloat16.
        dtype: `f32`, `f16` or `bf16`.
        scales: float32 [C, d] or [C, S, d].
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


# The tensors of a stream: attribute, name in the file, type (None: a vector type), shape in C, K, V, S, d (None: free).
_COLUMNS: tuple[tuple[str, str, str | None, tuple[str | None, ...]], ...] = (
    ("ids", "entries.ids", "I32", (None,)),
    ("offsets", "entries.offsets", "I64", ("K+1",)),
    ("concept", "entries.concept", "I32", ("K",)),
    ("vectors", "vectors", None, ("K", "S", "d")),
    ("scales", "scales", "F32", ("C", "S", "d")),
    ("trigger_ids", "triggers.ids", "I32", (None,)),
    ("trigger_offsets", "triggers.offsets", "I64", ("V+1",)),
    ("trigger_concept", "triggers.concept", "I32", ("V",)),
)


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


def pack_stream(name: str, spec: StreamSpec, concepts: list[Concept]) -> dict[str, tuple[str, npt.NDArray[Any]]]:
    """Return the tensors of one stream: name to (container type, array)."""
    entries: list[tuple[int, Ngram]] = []
    triggers: list[tuple[int, Ngram]] = []
    vectors: list[npt.NDArray[np.float32]] = []
    scales = np.zeros((len(concepts), *spec.shape), "<f4")
    dtype = widest({concept.record.dtype for concept in concepts if name in concept.streams})
    for index, concept in enumerate(concepts):
        stream = concept.streams.get(name)
        if stream is None:
            continue
        k = len(stream.entries)
        where = f"concept {concept.name!r}, stream {name!r}"
        table = _as_floats(stream.vectors, (k, *spec.shape), f"{where}: vectors")
        scale = _as_floats(stream.scales, spec.shape, f"{where}: scales")
        order = sorted(range(k), key=lambda row: (len(stream.entries[row]), stream.entries[row]))
        entries += [(index, stream.entries[row]) for row in order]
        triggers += [(index, ids) for ids in sorted(stream.triggers, key=lambda ids: (len(ids), ids))]
        # Rounding to the concept's own type first makes the bits independent of what else is in the file.
        rounded = decode_vectors(encode_vectors(table[order], concept.record.dtype), concept.record.dtype)
        vectors.append(rounded)
        scales[index] = scale
    stacked = np.concatenate(vectors) if vectors else np.zeros((0, *spec.shape), "<f4")
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


def read_manifest(container: Container) -> Manifest:
    """Return the manifest in the header.

    Raises:
        AdapterFormatError: not an adapter of this version, or a malformed manifest.
    """
    check_metadata(container, KIND)
    try:
        return _parse_manifest(container.metadata.get("manifest", ""))
    except ValueError as error:
        raise AdapterFormatError(f"{container.label}: manifest: {error}") from None


def check_metadata(container: Container, kind: str) -> None:
    """Raise AdapterFormatError unless the header is that of an adapter of this version and kind."""
    metadata, label = container.metadata, container.label
    for field, expected in (("format", FORMAT), ("format_version", FORMAT_VERSION), ("kind", kind)):
        value = metadata.get(field)
        if value is None:
            raise AdapterFormatError(f"{label}: header lacks the field {field!r}; it is not an engram adapter")
        if value != expected:
            hint = f"; {_OPENERS[value]} opens it" if field == "kind" and value in _OPENERS else ""
            raise AdapterFormatError(f"{label}: {field} is {quote(value)}, what is used here reads {expected!r}{hint}")
    unknown = metadata.keys() - {"format", "format_version", "kind", "manifest"}
    if unknown:
        raise AdapterFormatError(f"{label}: header has an unknown field {quote(min(unknown))}")


@lru_cache(maxsize=64)  # merging opens thousands of files that say the same
def _parse_manifest(text: str) -> Manifest:
    return Manifest.from_json(parse_canonical(text.encode("utf-8", "surrogatepass")))


def read_records(container: Container) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return the text of all records, uint8, and where each begins, int64 [C+1]; neither is read yet.

    Raises:
        AdapterFormatError: missing, or of another type or shape.
    """
    texts = _column(container, RECORDS, "U8", 1)
    offsets = _column(container, RECORD_OFFSETS, "I64", 1)
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != len(texts):
        raise AdapterFormatError(
            f"{container.label}: {RECORD_OFFSETS}: does not describe at least one record in {len(texts)} bytes"
        )
    return texts, offsets


def read_streams(container: Container, manifest: Manifest, n_concepts: int) -> dict[str, StreamTable]:
    """Return the columns of every stream; what they hold is not read yet.

    Raises:
        AdapterFormatError: a tensor is missing, unknown, or of another type or shape.
    """
    expected = {RECORDS, RECORD_OFFSETS} | {f"{s}.{column}" for s in manifest.streams for _, column, _, _ in _COLUMNS}
    unknown = container.tensors.keys() - expected
    if unknown:
        raise AdapterFormatError(f"{container.label}: has an unknown tensor {quote(min(unknown))}")
    streams = {}
    for name, spec in manifest.streams.items():
        axes = {
            column: tuple(axis for axis in shape if axis != "S" or spec.sites is not None)
            for _, column, _, shape in _COLUMNS
        }
        columns = {
            attribute: _column(container, f"{name}.{column}", dtype, len(axes[column]))
            for attribute, column, dtype, _ in _COLUMNS
        }
        sizes = {
            "C": n_concepts,
            "K": len(columns["concept"]),
            "V": len(columns["trigger_concept"]),
            "d": spec.width,
            "S": len(spec.sites or ()),
        }
        sizes |= {"K+1": sizes["K"] + 1, "V+1": sizes["V"] + 1}
        for attribute, column, _, _ in _COLUMNS:
            for axis, size in enumerate(axes[column]):
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
