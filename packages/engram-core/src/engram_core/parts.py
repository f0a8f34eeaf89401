"""What combining adapters needs of each: its index in memory and the places of its vectors in the file.

Keeps no file open, so any number of adapters can be combined.
Shapes: C concepts, K entries, V trigger variants, d width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from engram_core.adapter import Adapter, open_adapter
from engram_core.checks import check_concepts, check_vectors
from engram_core.concept import ConceptRecord
from engram_core.container import Stamp, read_stamp
from engram_core.errors import AdapterFormatError, AdapterReadError, IncompatibleAdaptersError, InputError
from engram_core.layout import StreamTable
from engram_core.manifest import Manifest, StreamSpec

Ints = npt.NDArray[np.int64]

_GROUP = 16  # adapters checked together: bounds the files that are open at once,
_GROUP_BYTES = 1 << 22  # and this the memory


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartColumn:
    """The n-grams of one column (entries, or trigger variants) of one stream.

    Attributes:
        ids: int32, end to end.
        offsets: int64 [rows+1].
        bounds: int64 [C+1], the rows of each concept.
    """

    ids: npt.NDArray[np.int32]
    offsets: Ints
    bounds: Ints


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartStream:
    """One stream of a part: its index, the shape of a vector, and where vectors and scales begin in the file."""

    entries: PartColumn
    triggers: PartColumn
    dtype: str
    shape: tuple[int, ...]
    vectors_at: int
    scales_at: int


class PartRecord(NamedTuple):
    """What combining needs of a record; the rest stays text, which is far smaller than what it parses to."""

    name: str
    activation: str
    dtype: str
    text: bytes

    def parse(self) -> ConceptRecord:
        """Return the whole record."""
        return ConceptRecord.from_bytes(self.text)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One adapter about to be combined with others."""

    label: str
    manifest: Manifest
    records: list[PartRecord]
    streams: Mapping[str, PartStream]
    path: Path | None
    stamp: Stamp
    data: bytes | None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO | memoryview]:
        """Give access to the raw bytes.

        Raises:
            AdapterReadError: the file is gone or was changed since it was opened.
        """
        if self.data is not None:
            yield memoryview(self.data)
            return
        assert self.path is not None  # noqa: S101 - a part has either bytes or a path
        try:
            stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise AdapterReadError(f"{self.label}: cannot be opened again: {error.strerror}") from None
        with stream:
            self._expect(read_stamp(stream.fileno()))
            yield stream
            self._expect(read_stamp(stream.fileno()))

    def adapter(self) -> Adapter:
        """Open the whole adapter again.

        Raises:
            AdapterReadError: as `open`.
        """
        if self.path is None:
            return Adapter.from_bytes(self.data or b"", self.label)
        adapter = open_adapter(self.path)
        self._expect(adapter.container.stamp)
        return adapter

    def _expect(self, stamp: Stamp) -> None:
        if stamp != self.stamp:
            raise AdapterReadError(f"{self.label}: was changed since it was opened; open it again")


def load_parts(adapters: Iterable[Adapter]) -> list[Part]:
    """Check adapters in full and copy their indices into memory, in the order given.

    Adapters of one concept are checked many at a time: for one, the calls cost more than the work.

    Raises:
        AdapterFormatError: one of them is malformed.
    """
    parts: list[Part] = []
    for group in _group(adapters):
        with contextlib.ExitStack() as reading:
            for adapter in group:
                reading.enter_context(adapter.container.read_whole())
            records = [_read_records(adapter) for adapter in group]
            if not _pass_together(group, [record.dtype for (record, *_) in records]):
                for adapter in group:
                    adapter.check()  # names the file at fault
            parts += map(_index, group, records)
    return parts


def _group(adapters: Iterable[Adapter]) -> Iterator[list[Adapter]]:
    """Put adapters of one concept that follow each other and have the same streams together."""
    group: list[Adapter] = []
    size = 0
    for adapter in adapters:
        alike = group and len(adapter) == len(group[0]) == 1 and adapter.manifest == group[0].manifest
        if group and not (alike and len(group) < _GROUP and size + adapter.nbytes() <= _GROUP_BYTES):
            yield group
            group, size = [], 0
        group.append(adapter)
        size += adapter.nbytes()
    if group:
        yield group


def _pass_together(group: list[Adapter], dtypes: list[str]) -> bool:
    """Tell whether adapters of one concept pass the checks as if they were one adapter; false when in doubt."""
    if len(group) == 1:
        return False
    manifest = group[0].manifest
    tables = {name: [adapter.streams[name] for adapter in group] for name in manifest.streams}
    if any([table.dtype for table in column] != dtypes for column in tables.values()) or len(set(dtypes)) > 1:
        return False
    each = [table for column in tables.values() for table in column]
    if np.concatenate([owners for table in each for owners in (table.concept, table.trigger_concept)]).any():
        return False
    try:
        for table in each:
            check_vectors(table.vectors, table.dtype, "")
        check_concepts("", manifest, {name: _join(column) for name, column in tables.items()}, 0, dtypes)
    except AdapterFormatError:
        return False
    return True


def _join(tables: list[StreamTable]) -> StreamTable:
    """Return the columns of adapters of one concept as those of one adapter, the vectors left out."""
    entries = _join_ngrams([table.ids for table in tables], [table.offsets for table in tables])
    triggers = _join_ngrams([table.trigger_ids for table in tables], [table.trigger_offsets for table in tables])
    return StreamTable(
        ids=entries[0],
        offsets=entries[1],
        concept=entries[2],
        vectors=tables[0].vectors[:0],  # joining them would copy them
        dtype=tables[0].dtype,
        scales=np.concatenate([table.scales for table in tables]),
        trigger_ids=triggers[0],
        trigger_offsets=triggers[1],
        trigger_concept=triggers[2],
    )


def _join_ngrams(
    ids: list[npt.NDArray[np.int32]], offsets: list[Ints]
) -> tuple[npt.NDArray[np.int32], Ints, npt.NDArray[np.int32]]:
    """Return the ids, offsets and owners of n-grams end to end."""
    counts = [len(column) - 1 for column in offsets]
    before = np.cumsum([0, *map(len, ids[:-1])])
    joined = np.concatenate([np.zeros(1, np.int64), *(column[1:] for column in offsets)])
    joined[1:] += before.repeat(counts)
    return np.concatenate(ids), joined, np.arange(len(ids), dtype=np.int32).repeat(counts)


def _read_records(adapter: Adapter) -> list[PartRecord]:
    return [
        PartRecord(record.name, record.activation, record.dtype, adapter.record_text(index))
        for index, record in enumerate(adapter.records())
    ]


def _index(adapter: Adapter, records: list[PartRecord]) -> Part:
    """Return a checked adapter's part."""
    path = adapter.path
    streams = {}
    each = np.arange(len(adapter) + 1, dtype=np.int32)
    tensors = adapter.container.tensors
    for name, table in adapter.streams.items():
        streams[name] = PartStream(
            entries=PartColumn(
                ids=table.ids.copy(),
                offsets=table.offsets.copy(),
                bounds=table.concept.searchsorted(each),
            ),
            triggers=PartColumn(
                ids=table.trigger_ids.copy(),
                offsets=table.trigger_offsets.copy(),
                bounds=table.trigger_concept.searchsorted(each),
            ),
            dtype=table.dtype,
            shape=table.scales.shape[1:],
            vectors_at=tensors[f"{name}.vectors"].start,
            scales_at=tensors[f"{name}.scales"].start,
        )
    return Part(
        label=adapter.label,
        manifest=adapter.manifest,
        records=records,
        streams=streams,
        path=path,
        stamp=adapter.container.stamp,
        data=adapter.to_bytes() if path is None else None,
    )


def join_manifests(parts: list[Part]) -> Manifest:
    """Return the manifest that covers all parts: the union of their streams.

    Raises:
        InputError: no part.
        IncompatibleAdaptersError: two parts differ; names both files and both values.
    """
    if not parts:
        raise InputError("nothing to merge: give at least one adapter")
    first = parts[0]
    streams: dict[str, tuple[StreamSpec, Part]] = {}
    for part in parts:
        for field in ("backbone", "base_model", "base_fingerprint"):
            _agree(field, getattr(first.manifest, field), first, getattr(part.manifest, field), part)
        for name, spec in part.manifest.streams.items():
            known, owner = streams.setdefault(name, (spec, part))
            _agree(f"{name}.width", known.width, owner, spec.width, part)
            _agree(f"{name}.site", known.site, owner, spec.site, part)
            _agree(f"{name}.sites", *_differing(known, owner, spec, part))
            one, other = known.tokenizer, spec.tokenizer
            _agree(f"{name}.tokenizer.vocab_size", one.vocab_size, owner, other.vocab_size, part)
            _agree(f"{name}.tokenizer.fingerprint", one.fingerprint, owner, other.fingerprint, part)
            # One tokenizer may be called by several class names; the choice must not depend on the order.
            if other.class_name < one.class_name:
                streams[name] = spec, owner
    return replace(first.manifest, streams={name: spec for name, (spec, _) in streams.items()})


def _differing(one: StreamSpec, first: Part, other: StreamSpec, second: Part) -> tuple[object, Part, object, Part]:
    """Return the sites of two streams for `_agree`: what differs alone, because there may be hundreds."""
    mine, theirs = one.sites, other.sites
    if mine is None or theirs is None or len(mine) != len(theirs):
        counts = ["text" if sites is None else f"{len(sites)} blocks" for sites in (mine, theirs)]
        return counts[0], first, counts[1], second
    pair = next(((a, b) for a, b in zip(mine, theirs, strict=True) if a != b), ("", ""))
    return pair[0], first, pair[1], second


def _agree(field: str, one: object, first: Part, other: object, second: Part) -> None:
    if one != other:
        raise IncompatibleAdaptersError(
            f"{first.label} and {second.label} do not merge: "
            f"{field} is {one!r} in the first and {other!r} in the second"
        )
