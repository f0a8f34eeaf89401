"""Merging adapters and extracting concepts: a union of concepts, copied byte for byte.

The laws it keeps are in docs/merging.md.

Vectors go from file to file in pieces; memory holds the index alone, however many adapters there are.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from engram_core.adapter import Adapter
from engram_core.conflicts import Member, OnConflict, Pool
from engram_core.container import ContainerWriter, open_target
from engram_core.errors import AdapterReadError, InputError
from engram_core.layout import pack_metadata, pack_offsets
from engram_core.manifest import Manifest
from engram_core.memory import HashedMemory
from engram_core.opening import open_any, open_tables, refuse_memories
from engram_core.parts import Part, PartColumn, PartStream, join_manifests, load_parts
from engram_core.storage import CONTAINER_NAMES, STORED_TYPES, decode_vectors, encode_vectors, widest

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all) while vectors are copied."""

_PIECE = 1 << 22  # bytes copied at a time


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeReport:
    """What a merge did.

    Attributes:
        concepts: names in the result.
        dropped: (name, file) of concepts left out by `keep-first` or `keep-last`.
        renamed: (old name, new name, file) of concepts renamed by `both`.
    """

    concepts: list[str]
    dropped: list[tuple[str, str]]
    renamed: list[tuple[str, str, str]]


def merge_adapters(adapters: Sequence[Adapter], *, on_conflict: OnConflict = "error") -> Adapter:
    """Return the union of adapters, in memory.

    Raises:
        InputError: no adapter.
        IncompatibleAdaptersError: they belong to different backbones, base models, tokenizers, widths or kinds.
        ConflictError: concepts contradict each other and `on_conflict` is `error`.
        AdapterFormatError: one of them is malformed.
    """
    refuse_memories(adapters)
    parts = load_parts(adapters)
    buffer = io.BytesIO()
    _merge(parts, buffer, on_conflict, None)
    return Adapter.from_bytes(buffer.getvalue())


def merge_files(
    paths: Iterable[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    on_conflict: OnConflict = "error",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> MergeReport:
    """Write the union of adapter files to a new file, atomically, in bounded memory.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        AdapterReadError, AdapterFormatError: a source cannot be used.
        AdapterWriteError: the target cannot be written.
        InputError, IncompatibleAdaptersError, ConflictError: as `merge_adapters`.
    """
    with open_target(target, overwrite=overwrite) as stream:
        seen: dict[str, str | os.PathLike[str]] = {}
        if isinstance(paths, (str, os.PathLike)):
            raise InputError(f"{os.fspath(paths)}: is one path; give a list of paths")
        for path in paths:  # one file named twice is one source
            # No file has a null byte in its path: opening it says so, while realpath would raise ValueError.
            seen.setdefault(os.fspath(path) if "\0" in str(path) else os.path.realpath(path), path)
        return _merge(load_parts(open_tables(list(seen.values()))), stream, on_conflict, progress)


def extract_concepts(adapter: Adapter, names: Sequence[str]) -> Adapter:
    """Return an adapter with some of the concepts, in memory, their tensors bit for bit.

    Raises:
        InputError: no name.
        ConceptNotFoundError: the adapter lacks one.
    """
    buffer = io.BytesIO()
    _extract(adapter, names, buffer, None)
    return Adapter.from_bytes(buffer.getvalue())


def extract_file(
    source: str | os.PathLike[str],
    names: Sequence[str],
    target: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write some of a file's concepts to a new file, atomically.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        ConceptNotFoundError: the source lacks one of the names.
        InputError: the source is a hashed memory, which has no concepts.
        AdapterReadError, AdapterFormatError, AdapterWriteError: a file cannot be used.
    """
    with open_target(target, overwrite=overwrite) as stream:
        opened = open_any(source)
        if isinstance(opened, HashedMemory):
            raise InputError(
                f"{opened.label}: is a hashed memory, which has no concepts to extract; use it as it is, "
                f"e.g. engram generate -a {opened.label}"
            )
        _extract(opened, names, stream, progress)


def _merge(parts: list[Part], target: BinaryIO, on_conflict: OnConflict, progress: Progress | None) -> MergeReport:
    manifest = join_manifests(parts)
    pool = Pool(parts)
    names = pool.settle(on_conflict)
    _write(parts, names, manifest, target, progress)
    return MergeReport(
        concepts=sorted(names.values()),
        dropped=[(pool.name(m), parts[m.part].label) for m in pool.members if m not in names],
        renamed=[(pool.name(m), new, parts[m.part].label) for m, new in names.items() if pool.name(m) != new],
    )


def _extract(adapter: Adapter, names: Sequence[str], target: BinaryIO, progress: Progress | None) -> None:
    if isinstance(names, str):
        raise InputError(f"{adapter.label}: the concepts to extract are the text {names!r}; give a list of names")
    if not names:
        raise InputError(f"{adapter.label}: name at least one concept to extract")
    (part,) = load_parts([adapter])
    chosen = {Member(0, adapter.index(name)): name for name in names}
    _write([part], chosen, part.manifest, target, progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """Consecutive concepts of one part that stay consecutive in the result, where they begin at `at`."""

    part: int
    first: int
    last: int
    at: int


def _write(
    parts: list[Part],
    names: dict[Member, str],
    manifest: Manifest,
    target: BinaryIO,
    progress: Progress | None,
) -> None:
    """Write the chosen concepts, in canonical order, as one adapter."""
    members = sorted(names, key=names.__getitem__)
    runs = _find_runs(members)
    records = []
    for member in members:
        record = parts[member.part].records[member.concept]
        renamed = record.name != names[member]
        records.append(replace(record.parse(), name=names[member]).to_bytes() if renamed else record.text)
    arrays: dict[str, tuple[str, npt.NDArray[Any]]] = {
        "concepts.json": ("U8", np.frombuffer(b"".join(records), np.uint8)),
        "concepts.offsets": ("I64", pack_offsets(map(len, records))),
    }
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    copies: list[_Copy] = []
    streams = {}
    for name, spec in manifest.streams.items():
        holders = [(run, parts[run.part].streams[name]) for run in runs if name in parts[run.part].streams]
        entries = _join_column([(run, stream.entries) for run, stream in holders])
        if not len(entries["concept"]):
            continue
        streams[name] = spec
        triggers = _join_column([(run, stream.triggers) for run, stream in holders])
        for prefix, columns in (("entries", entries), ("triggers", triggers)):
            for column, array in columns.items():
                arrays[f"{name}.{prefix}.{column}"] = ("I64" if column == "offsets" else "I32"), array
        dtype = widest(_dtypes(parts, holders))
        shapes[f"{name}.vectors"] = CONTAINER_NAMES[dtype], (len(entries["concept"]), *spec.shape)
        shapes[f"{name}.scales"] = "F32", (len(members), *spec.shape)
        copies += _plan_copies(name, holders, dtype)
    shapes |= {key: (dtype, array.shape) for key, (dtype, array) in arrays.items()}
    writer = ContainerWriter(target, pack_metadata(replace(manifest, streams=streams)), shapes)
    for key, (_, array) in arrays.items():
        writer.write(key, np.ascontiguousarray(array))
    _copy(parts, writer, copies, progress)


def _find_runs(members: list[Member]) -> list[_Run]:
    runs: list[_Run] = []
    for at, member in enumerate(members):
        if runs and (runs[-1].part, runs[-1].last) == member:
            runs[-1] = replace(runs[-1], last=member.concept + 1)
        else:
            runs.append(_Run(part=member.part, first=member.concept, last=member.concept + 1, at=at))
    return runs


def _join_column(holders: list[tuple[_Run, PartColumn]]) -> dict[str, npt.NDArray[Any]]:
    """Return ids, offsets and concept of one column of the result."""
    ids, lengths, concept = [np.zeros(0, "<i4")], [np.zeros(0, np.int64)], [np.zeros(0, "<i4")]
    for run, column in holders:
        bounds = column.bounds[run.first : run.last + 1]
        offsets = column.offsets[bounds[0] : bounds[-1] + 1]
        ids.append(column.ids[offsets[0] : offsets[-1]])
        lengths.append(offsets[1:] - offsets[:-1])  # np.diff costs several times as much on few rows
        numbers = np.arange(run.at, run.at + len(bounds) - 1, dtype="<i4")
        concept.append(numbers.repeat(bounds[1:] - bounds[:-1]))
    return {
        "ids": np.concatenate(ids),
        "offsets": pack_offsets(np.concatenate(lengths)),
        "concept": np.concatenate(concept),
    }


def _dtypes(parts: list[Part], holders: list[tuple[_Run, PartStream]]) -> set[str]:
    """Return the vector types of the concepts that have entries in a stream."""
    found: set[str] = set()
    for run, stream in holders:
        bounds = stream.entries.bounds[run.first : run.last + 1].tolist()
        records = parts[run.part].records[run.first : run.last]
        found.update(
            record.dtype for record, (start, stop) in zip(records, pairwise(bounds), strict=True) if start < stop
        )
    return found


class _Copy(NamedTuple):
    """Bytes of a part that become bytes of a tensor, converted when the types differ."""

    part: int
    start: int
    length: int
    tensor: str
    offset: int
    old: str
    new: str


def _plan_copies(name: str, holders: list[tuple[_Run, PartStream]], dtype: str) -> list[_Copy]:
    copies = []
    row = 0
    new = STORED_TYPES[dtype].itemsize
    for run, stream in holders:
        first, last = (int(stream.entries.bounds[index]) for index in (run.first, run.last))
        old, width = STORED_TYPES[stream.dtype].itemsize, math.prod(stream.shape)
        copies.append(
            _Copy(
                part=run.part,
                start=stream.vectors_at + first * width * old,
                length=(last - first) * width * old,
                tensor=f"{name}.vectors",
                offset=row * width * new,
                old=stream.dtype,
                new=dtype,
            )
        )
        copies.append(
            _Copy(
                part=run.part,
                start=stream.scales_at + run.first * width * 4,
                length=(run.last - run.first) * width * 4,
                tensor=f"{name}.scales",
                offset=run.at * width * 4,
                old="f32",
                new="f32",
            )
        )
        row += last - first
    return copies


def _copy(parts: list[Part], writer: ContainerWriter, copies: list[_Copy], progress: Progress | None) -> None:
    """Copy the vectors, source by source, in pieces."""
    total, done = sum(copy.length for copy in copies), 0
    for number, chosen in _group(copies).items():
        with parts[number].open() as source:
            for copy in chosen:
                for at in range(0, copy.length, _PIECE):
                    length = min(_PIECE, copy.length - at)
                    data: Any = _read(source, copy.start + at, length, parts[number].label)
                    offset = at
                    if copy.old != copy.new:
                        stored = np.frombuffer(data, STORED_TYPES[copy.old])
                        data = encode_vectors(decode_vectors(stored, copy.old), copy.new)
                        offset = at // STORED_TYPES[copy.old].itemsize * STORED_TYPES[copy.new].itemsize
                    writer.write(copy.tensor, data, copy.offset + offset)
                    done += length
            if progress is not None:
                progress(done, total)


def _group(copies: list[_Copy]) -> dict[int, list[_Copy]]:
    groups: dict[int, list[_Copy]] = {}
    for copy in copies:
        groups.setdefault(copy.part, []).append(copy)
    return groups


def _read(source: BinaryIO | memoryview, start: int, length: int, label: str) -> bytes | memoryview:
    if isinstance(source, memoryview):
        return source[start : start + length]
    try:
        source.seek(start)
        data = source.read(length)
    except OSError as error:
        raise AdapterReadError(f"{label}: cannot be read: {error.strerror}") from None
    if len(data) != length:
        raise AdapterReadError(f"{label}: ended early at byte {start + len(data)}; it was changed while being read")
    return data
