"""The adapter file, version 1, of kind `concept-table`: opening, checking, reading, building, saving.

Shapes: C concepts; per stream K entries, V trigger variants, d width.
docs/file-format.md describes the file in full.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.checks import check_concepts, check_owners
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
from engram_core.errors import AdapterFormatError, ConceptNotFoundError, InputError
from engram_core.layout import (
    RECORD_OFFSETS,
    RECORDS,
    StreamTable,
    pack_metadata,
    pack_offsets,
    pack_stream,
    read_manifest,
    read_records,
    read_streams,
)
from engram_core.manifest import Manifest
from engram_core.storage import decode_vectors, widest

_CHECK_BLOCK = 1024  # concepts checked at a time: bounds memory


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
        self.manifest = read_manifest(container)
        self._record_bytes, self._record_offsets = read_records(container)
        self.streams = read_streams(container, self.manifest, len(self))

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
        arrays[RECORDS] = "U8", np.frombuffer(b"".join(texts), np.uint8)
        arrays[RECORD_OFFSETS] = "I64", pack_offsets([len(text) for text in texts])
        for name, spec in manifest.streams.items():
            arrays.update(pack_stream(name, spec, ordered))
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
                f"{self.label}: {RECORD_OFFSETS}: record {index} reaches from {start} to {stop}, "
                f"{RECORDS} has {len(self._record_bytes)} bytes"
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
            raise AdapterFormatError(f"{self.label}: {RECORDS}: record {index}: {error}") from None

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
            raise AdapterFormatError(f"{self.label}: {RECORD_OFFSETS}: out of range")
        letters = self._record_bytes[where]
        bad = np.flatnonzero((letters != ord("a")) & (letters != ord("s")))
        if bad.size:
            self.record(int(bad[0]))  # says what is wrong with it
            raise AdapterFormatError(f"{self.label}: {RECORDS}: record {int(bad[0])}: has no activation")
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
        with self._container.read_whole():
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
        with open_target(path, overwrite=overwrite) as target, self._container.read_whole():
            write_all(target, memoryview(self._container.buffer))
        return self.identity()

    def check(self) -> None:
        """Go through every byte that has a meaning, in bounded memory.

        Raises:
            AdapterFormatError: naming the file and the first field at fault.
        """
        with self._container.read_whole():
            self._check()

    def _check(self) -> None:
        previous = ""
        dtypes: list[str] = []
        for record in self.records():
            if record.name <= previous:
                raise AdapterFormatError(
                    f"{self.label}: {RECORDS}: {record.name!r} follows {previous!r}; names are unique and in order"
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
