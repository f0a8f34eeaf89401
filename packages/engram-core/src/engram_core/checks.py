"""Strict validation of an adapter's tensors, by range of concepts, so that reading one concept checks only it.

Shapes: C concepts, K entries, V trigger variants, d width of the stream.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.errors import AdapterFormatError
from engram_core.storage import are_finite, decode_vectors, encode_vectors


def check_offsets(offsets: npt.NDArray[np.int64], total: int, where: str, *, minimum: int = 1) -> None:
    """Check that consecutive offsets describe ranges of at least `minimum` within `total`.

    Raises:
        AdapterFormatError: naming `where` and the first bad row.
    """
    if len(offsets) and (offsets[0] < 0 or offsets[-1] > total):
        raise AdapterFormatError(f"{where}: reaches from {offsets[0]} to {offsets[-1]}, outside 0..{total}")
    lengths = np.diff(offsets)
    bad = np.flatnonzero(lengths < minimum)
    if bad.size:
        row = int(bad[0])
        raise AdapterFormatError(
            f"{where}: out of order at row {row}: {offsets[row]} then {offsets[row + 1]}, "
            f"expected at least {minimum} more"
        )


def check_ids(ids: npt.NDArray[np.int32], vocab_size: int, where: str) -> None:
    """Check that token ids lie within the vocabulary."""
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise AdapterFormatError(f"{where}: holds the id {bad}, the vocabulary has {vocab_size}")


def check_ngram_order(
    ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], concept: npt.NDArray[np.int32], where: str
) -> None:
    """Check that n-grams ascend by (concept, length, ids), which also makes each unique in its concept."""
    lengths = np.diff(offsets)
    same = np.flatnonzero(concept[1:] == concept[:-1])
    shorter = same[lengths[same + 1] < lengths[same]]
    if shorter.size:
        raise AdapterFormatError(
            f"{where}: row {int(shorter[0]) + 1} is shorter than the one before; expected length order"
        )
    equal = same[lengths[same + 1] == lengths[same]]
    for length in np.unique(lengths[equal]):
        rows = equal[lengths[equal] == length]
        window = np.arange(length)
        before, after = ids[offsets[rows, None] + window], ids[offsets[rows + 1, None] + window]
        differs = before != after
        first = differs.argmax(axis=1)
        at = np.arange(len(rows))
        bad = rows[~(differs.any(axis=1) & (before[at, first] < after[at, first]))]
        if bad.size:
            raise AdapterFormatError(
                f"{where}: row {int(bad[0]) + 1} repeats or precedes the one before; expected ascending ids"
            )


def check_vectors(stored: npt.NDArray[Any], dtype: str, where: str) -> None:
    """Check that no stored value is NaN or infinite."""
    if not are_finite(stored, dtype):
        raise AdapterFormatError(f"{where}: holds NaN or infinity")


def check_fits(stored: npt.NDArray[Any], dtype: str, narrower: str, where: str) -> None:
    """Check that vectors stored in a wider type are exactly those of the narrower type they came from."""
    values = decode_vectors(stored, dtype)
    if not np.array_equal(decode_vectors(encode_vectors(values, narrower), narrower).view("<u4"), values.view("<u4")):
        raise AdapterFormatError(f"{where}: holds values that are not {narrower}, as its concept's record claims")
