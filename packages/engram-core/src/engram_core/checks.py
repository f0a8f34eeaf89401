"""Strict validation of an adapter's tensors, by range of concepts, so that reading one concept checks only it.

Shapes: C concepts, K entries, V trigger variants, d width of the stream.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.errors import AdapterFormatError
from engram_core.layout import StreamTable
from engram_core.manifest import Manifest
from engram_core.storage import are_finite, decode_vectors, encode_vectors

MAX_TOKENS = 4096
"""Most tokens of an n-gram. A trigger has at most 256 characters; indexing costs some time a token of the longest."""

_BLOCK = 1 << 16  # tokens compared at a time: bounds memory
_VALUES = 1 << 20  # vector components looked at together: the same


def check_offsets(offsets: npt.NDArray[np.int64], total: int, where: str, *, row: int = 0) -> None:
    """Check that consecutive offsets, from a row on, describe n-grams of 1..MAX_TOKENS ids within `total`.

    Raises:
        AdapterFormatError: naming `where` and the first bad row.
    """
    # All of them, not the ends alone: a difference of two offsets could wrap around. Unsigned, a negative is huge.
    if len(offsets) and offsets.view("<u8").max() > total:
        raise AdapterFormatError(f"{where}: reaches from {offsets.min()} to {offsets.max()}, outside 0..{total}")
    lengths = offsets[1:] - offsets[:-1]
    bad = ((lengths < 1) | (lengths > MAX_TOKENS)).nonzero()[0]
    if bad.size:
        start, stop = offsets[bad[0] : bad[0] + 2].tolist()
        raise AdapterFormatError(
            f"{where}: row {row + int(bad[0])} reaches from {start} to {stop}, expected 1..{MAX_TOKENS} ids"
        )


def check_ids(ids: npt.NDArray[np.int32], vocab_size: int, where: str) -> None:
    """Check that token ids lie within the vocabulary."""
    if ids.size and ids.view("<u4").max() >= vocab_size:  # unsigned, a negative id is huge
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise AdapterFormatError(f"{where}: holds the id {bad}, the vocabulary has {vocab_size}")


def check_owners(concept: npt.NDArray[np.int32], first: int, last: int, where: str, *, row: int = 0) -> None:
    """Check that the concepts of consecutive rows, from a row on, ascend within first..last-1."""
    bad = (concept[1:] < concept[:-1]).nonzero()[0]
    if bad.size:
        before, after = concept[bad[0] : bad[0] + 2].tolist()
        raise AdapterFormatError(
            f"{where}: row {row + int(bad[0]) + 1} is {after} after {before}, expected ascending concepts"
        )
    if concept.size and not (concept[0] >= first and concept[-1] < last):
        raise AdapterFormatError(f"{where}: reaches from {concept[0]} to {concept[-1]}, outside {first}..{last - 1}")


def check_ngram_order(
    ids: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    concept: npt.NDArray[np.int32],
    where: str,
    *,
    row: int = 0,
) -> None:
    """Check that n-grams, from a row on, ascend by (concept, length, ids), so that each is unique in its concept."""
    if len(concept) < 2:
        return
    lengths = offsets[1:] - offsets[:-1]
    same = (concept[1:] == concept[:-1]).nonzero()[0]
    growth = lengths[same + 1] - lengths[same]
    shorter = same[growth < 0]
    if shorter.size:
        raise AdapterFormatError(
            f"{where}: row {row + int(shorter[0]) + 1} is shorter than the one before; expected length order"
        )
    equal = same[growth == 0]
    ends = lengths[equal].cumsum()
    block = 0
    while block < len(equal):
        first_row, block = block, int(ends.searchsorted(ends[block] + _BLOCK, side="right"))
        rows = equal[first_row:block]
        # All tokens of these rows end to end, each beside the token at the same place of the next row.
        width = lengths[rows]
        stop = width.cumsum()
        start = stop - width
        at = np.arange(stop[-1]) + np.repeat(offsets[rows] - start, width)
        before, after = ids[at], ids[at + np.repeat(width, width)]
        differs = np.concatenate([(before != after).nonzero()[0], stop[-1:]])
        first = differs[differs.searchsorted(start)]
        bad = rows[(first >= stop) | (before.take(first, mode="clip") > after.take(first, mode="clip"))]
        if bad.size:
            raise AdapterFormatError(
                f"{where}: row {row + int(bad[0]) + 1} repeats or precedes the one before; expected ascending ids"
            )


def check_vectors(stored: npt.NDArray[Any], dtype: str, where: str) -> None:
    """Check that no stored value is NaN or infinite."""
    for block in _blocks(stored):
        if not are_finite(block, dtype):
            raise AdapterFormatError(f"{where}: holds NaN or infinity")


def check_fits(stored: npt.NDArray[Any], dtype: str, narrower: str, where: str) -> None:
    """Check that vectors stored in a wider type are exactly those of the narrower type they came from."""
    for block in _blocks(stored):
        values = decode_vectors(block, dtype)
        again = decode_vectors(encode_vectors(values, narrower), narrower)
        if not np.array_equal(again.view("<u4"), values.view("<u4")):
            raise AdapterFormatError(f"{where}: holds values that are not {narrower}, as its concept's record claims")


def _blocks(stored: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
    step = max(1, _VALUES // math.prod(stored.shape[1:]))
    return (stored[first : first + step] for first in range(0, len(stored), step))


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
