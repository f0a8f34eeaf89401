"""Texts packed into rows of one length, none of them cut, and none reading another.

Shapes: B rows of a batch, R rows, L length of a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Rows = npt.NDArray[np.int64]

IGNORED = -100
_OPEN = 24  # rows that are filled at a time: more waste less and take longer


def pack(texts: Sequence[Sequence[int]], length: int, stop: int) -> Rows:
    """Return rows of whole texts; those that do not fit in a row are left out.

    Args:
        texts: their token ids, each with `stop` at its end and nowhere else.
        length: L, ids of a row.
        stop: ends a text; what a row has left is filled with it.

    Returns:
        int64 [R, L].
    """
    done: list[list[int]] = []
    open_rows: list[list[int]] = []
    for text in texts:
        if len(text) > length:
            continue
        for row in open_rows:
            if len(row) + len(text) <= length:
                row.extend(text)
                break
        else:
            if len(open_rows) == _OPEN:
                fullest = max(range(_OPEN), key=lambda index: len(open_rows[index]))
                done.append(open_rows.pop(fullest))
            open_rows.append(list(text))
    done += open_rows
    rows = np.full((len(done), length), stop, np.int64)
    for at, row in enumerate(done):
        rows[at, : len(row)] = row
    return rows


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """What the model reads, and what it should say.

    Attributes:
        ids: int64 [B, L].
        positions: int64 [B, L], counted from each text's begin.
        mask: bool [B, 1, L, L], true where a position (third axis) may read another (fourth).
        labels: int64 [B, L], the next id of the same text, or -100 at its end.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor


def separate(ids: Tensor, stop: int) -> Batch:
    """Return packed rows with what keeps their texts apart.

    Args:
        ids: int64 [B, L], rows of `pack`.
        stop: the id that ends a text.
    """
    length = ids.shape[1]
    ends = ids == stop
    text = ends.cumsum(1) - ends.long()  # the number of the text that an id belongs to
    index = torch.arange(length).expand_as(ids)
    begins = torch.where(ends, index + 1, 0).roll(1, 1)
    begins[:, 0] = 0
    positions = index - begins.cummax(1).values
    earlier = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (text[:, :, None] == text[:, None, :]) & earlier
    following = torch.full_like(ids, IGNORED)
    following[:, :-1] = ids[:, 1:]
    return Batch(ids=ids, positions=positions, mask=mask[:, None], labels=following.masked_fill(ends, IGNORED))
