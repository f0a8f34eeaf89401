"""Samples of tokens: documents packed into rows of one length, or one document a row.

Shapes: B rows, L positions, S samples, P pieces of documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engram_llm.data.documents import Documents

__all__ = ["IGNORED", "Collator", "Samples", "pack_documents", "truncate_documents"]

IGNORED = -100
"""Label of a token that is not learned."""

Sample = Mapping[str, npt.NDArray[np.int64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples(Dataset[Sample]):
    """Samples, each of one or more pieces of documents.

    Attributes:
        documents: where the tokens are.
        starts, stops: where each piece begins and ends among them, int64 [P].
        offsets: the first piece of each sample, and the number of pieces, int64 [S+1].
        n_cut: documents that were longer than a sample.
        n_dropped: pieces without a token to learn, which are left out.
    """

    documents: Documents
    starts: npt.NDArray[np.int64]
    stops: npt.NDArray[np.int64]
    offsets: npt.NDArray[np.int64]
    n_cut: int
    n_dropped: int

    def __len__(self) -> int:
        """Return S."""
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Sample:
        """Return token ids, labels and positions of a sample, int64 each.

        A piece begins at position 0, and its first token is no label: nothing stands before it.
        """
        ids, labels, positions = [], [], []
        for piece in range(int(self.offsets[index]), int(self.offsets[index + 1])):
            part = slice(int(self.starts[piece]), int(self.stops[piece]))
            tokens = self.documents.ids[part].astype(np.int64)
            label = np.where(self.documents.learns[part], tokens, IGNORED)
            label[0] = IGNORED
            ids.append(tokens)
            labels.append(label)
            positions.append(np.arange(len(tokens)))
        return {
            "input_ids": np.concatenate(ids),
            "labels": np.concatenate(labels),
            "position_ids": np.concatenate(positions),
        }

    def count_tokens(self) -> int:
        """Return how many tokens are learned in one pass over all samples."""
        learned = np.concatenate((np.zeros(1, np.int64), np.cumsum(self.documents.learns)))
        return int(learned[self.stops].sum()) - int(learned[self.starts + 1].sum())


def pack_documents(documents: Documents, max_length: int) -> Samples:
    """Return samples of whole documents, filled up as well as a greedy choice can (best fit, the longest first).

    Documents that are longer than a sample are cut into pieces; each piece begins anew, without what came before it.
    """
    starts, stops, n_cut, n_dropped = _cut(documents, max_length, keep_rest=True)
    lengths = stops - starts
    bins: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]
    rooms = 0  # bit r is set when some sample has room for exactly r more tokens
    for piece in np.argsort(-lengths, kind="stable"):
        length = int(lengths[piece])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            number = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, number = max_length, len(bins)
            bins.append([])
        bins[number].append(int(piece))
        left = room - length
        by_room[left].append(number)
        rooms |= 1 << left
    order = np.array([piece for pieces in bins for piece in pieces], np.int64)
    offsets = np.cumsum([0, *map(len, bins)], dtype=np.int64)
    return Samples(
        documents=documents,
        starts=starts[order],
        stops=stops[order],
        offsets=offsets,
        n_cut=n_cut,
        n_dropped=n_dropped,
    )


def truncate_documents(documents: Documents, max_length: int) -> Samples:
    """Return one sample for each document, without what is beyond `max_length` tokens."""
    starts, stops, n_cut, n_dropped = _cut(documents, max_length, keep_rest=False)
    offsets = np.arange(len(starts) + 1, dtype=np.int64)
    return Samples(documents=documents, starts=starts, stops=stops, offsets=offsets, n_cut=n_cut, n_dropped=n_dropped)


def _cut(
    documents: Documents, max_length: int, *, keep_rest: bool
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int, int]:
    """Return where the pieces begin and end, how many documents were cut, and how many pieces teach nothing."""
    begins, ends = documents.offsets[:-1], documents.offsets[1:]
    lengths = ends - begins
    n_cut = int((lengths > max_length).sum())
    if keep_rest:
        counts = -(-lengths // max_length)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = np.repeat(begins, counts) + within * max_length
        stops = np.minimum(starts + max_length, np.repeat(ends, counts))
    else:
        starts, stops = begins, np.minimum(ends, begins + max_length)
    learned = np.concatenate((np.zeros(1, np.int64), np.cumsum(documents.learns)))
    teaches = learned[stops] > learned[np.minimum(starts + 1, stops)]
    return starts[teaches], stops[teaches], n_cut, int((~teaches).sum())


class Collator:
    """Puts samples of a batch side by side, padded on the right.

    Packed samples have no attention mask: where documents begin is known from their positions, and the padding is one
    more document. Others have one.
    """

    def __init__(self, pad_id: int, *, packed: bool) -> None:
        """Take the token that pads."""
        self._pad_id, self._packed = pad_id, packed

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """Return a batch: int64 [B, L] each."""
        length = max(len(sample["input_ids"]) for sample in samples)
        shape = (len(samples), length)
        ids, labels = np.full(shape, self._pad_id), np.full(shape, IGNORED)
        positions, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            ids[row, :size], labels[row, :size] = sample["input_ids"], sample["labels"]
            positions[row, :size], positions[row, size:] = sample["position_ids"], np.arange(length - size)
            mask[row, :size] = 1
        batch = {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels)}
        if self._packed:
            return batch | {"position_ids": torch.from_numpy(positions)}
        return batch | {"attention_mask": torch.from_numpy(mask)}
