"""What combining adapters needs of each: its index in memory and the places of its vectors in the file.

Keeps no file open, so any number of adapters can be combined.
Shapes: C concepts, K entries, V trigger variants, d width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from engram_core.adapter import Adapter, open_adapter
from engram_core.concept import ConceptRecord
from engram_core.errors import AdapterReadError, IncompatibleAdaptersError, InputError
from engram_core.manifest import Manifest, StreamSpec

Ints = npt.NDArray[np.int64]


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
    """One stream of a part: its index, and where vectors and scales begin in the file."""

    entries: PartColumn
    triggers: PartColumn
    dtype: str
    width: int
    vectors_at: int
    scales_at: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One adapter about to be combined with others."""

    label: str
    manifest: Manifest
    records: list[ConceptRecord]
    streams: Mapping[str, PartStream]
    path: Path | None
    stamp: tuple[int, int]
    data: memoryview | None

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO | memoryview]:
        """Give access to the raw bytes.

        Raises:
            AdapterReadError: the file is gone or was changed since it was indexed.
        """
        if self.data is not None:
            yield self.data
            return
        assert self.path is not None  # noqa: S101 - a part has either bytes or a path
        try:
            stream = self.path.open("rb", buffering=0)
        except OSError as error:
            raise AdapterReadError(f"{self.label}: cannot be opened again: {error.strerror}") from None
        with stream:
            if _stamp(self.path) != self.stamp:
                raise AdapterReadError(f"{self.label}: was changed while it was being read; try again")
            yield stream

    def adapter(self) -> Adapter:
        """Open the whole adapter again."""
        return (
            open_adapter(self.path)
            if self.path is not None
            else Adapter.from_bytes(bytes(self.data or b""), self.label)
        )


def load_part(adapter: Adapter) -> Part:
    """Check an adapter in full and copy its index into memory.

    Raises:
        AdapterFormatError: the adapter is malformed.
    """
    adapter.check()
    path = adapter.path
    streams = {}
    for name, table in adapter.streams.items():
        each = np.arange(len(adapter) + 1)
        tensors = adapter.container.tensors
        streams[name] = PartStream(
            entries=PartColumn(
                ids=table.ids.copy(),
                offsets=table.offsets.copy(),
                bounds=np.searchsorted(table.concept, each),
            ),
            triggers=PartColumn(
                ids=table.trigger_ids.copy(),
                offsets=table.trigger_offsets.copy(),
                bounds=np.searchsorted(table.trigger_concept, each),
            ),
            dtype=table.dtype,
            width=table.scales.shape[1],
            vectors_at=tensors[f"{name}.vectors"].start,
            scales_at=tensors[f"{name}.scales"].start,
        )
    return Part(
        label=adapter.label,
        manifest=adapter.manifest,
        records=list(adapter.records()),
        streams=streams,
        path=path,
        stamp=_stamp(path) if path is not None else (0, 0),
        data=memoryview(adapter.to_bytes()) if path is None else None,
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
            one, other = known.tokenizer, spec.tokenizer
            _agree(f"{name}.tokenizer.vocab_size", one.vocab_size, owner, other.vocab_size, part)
            _agree(f"{name}.tokenizer.fingerprint", one.fingerprint, owner, other.fingerprint, part)
            # One tokenizer may be called by several class names; the choice must not depend on the order.
            if other.class_name < one.class_name:
                streams[name] = spec, owner
    return replace(first.manifest, streams={name: spec for name, (spec, _) in streams.items()})


def _agree(field: str, one: object, first: Part, other: object, second: Part) -> None:
    if one != other:
        raise IncompatibleAdaptersError(
            f"{first.label} and {second.label} do not merge: "
            f"{field} is {one!r} in the first and {other!r} in the second"
        )


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise AdapterReadError(f"{path}: cannot be read: {error.strerror}") from None
    return status.st_size, status.st_mtime_ns
