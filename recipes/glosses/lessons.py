"""What the base learns from at each step: the general synsets, anew shuffled and phrased in every epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recipes.glosses.packing import Rows, pack
from recipes.glosses.synsets import Synset
from recipes.glosses.texts import write_answer, write_chat, write_entry, write_question
from recipes.glosses.tokenizer import STOP

CHATS = 0.15
"""Share of the texts that are a question and its answer; the others are entries of a dictionary."""


class Lessons:
    """Batches by number: the same number gives the same batch, whatever was asked for before."""

    def __init__(
        self, synsets: Sequence[Synset], tokenizer: Any, *, rows: int, length: int, seed: int, chats: float = CHATS
    ) -> None:
        """Take over the texts' source; nothing is tokenised yet.

        Args:
            synsets: to learn from.
            tokenizer: of the model, in transformers' class.
            rows: B, of a batch.
            length: L, of a row.
            seed: of the order and of the phrasing.
            chats: share of the texts that are conversations.
        """
        self.synsets = synsets
        self.stop = int(tokenizer.convert_tokens_to_ids(STOP))
        self._tokenizer = tokenizer
        self._batch, self._length, self._seed, self._chats = rows, length, seed, chats
        self._epoch, self._begin = -1, 0
        self._rows: Rows = np.zeros((0, length), np.int64)

    def batch(self, number: int) -> Tensor:
        """Return a batch of packed rows: int64 [B, L]."""
        if number < self._begin:
            self._epoch, self._begin, self._rows = -1, 0, self._rows[:0]
        while number >= self._begin + len(self._rows) // self._batch:
            self._begin += len(self._rows) // self._batch
            self._epoch += 1
            self._rows = self._pack(self._epoch)
            if len(self._rows) < self._batch:
                raise ValueError(f"{len(self.synsets)} synsets fill {len(self._rows)} rows, fewer than a batch")
        at = (number - self._begin) * self._batch
        return torch.from_numpy(self._rows[at : at + self._batch])

    def count_tokens(self, steps: int) -> int:
        """Return how many tokens the batches before a number ask the model for."""
        return sum(int((self.batch(number) != self.stop).sum()) for number in range(steps))

    def phrase(self, epoch: int) -> list[str]:
        """Return the epoch's texts in their order."""
        rng = np.random.default_rng([self._seed, epoch])
        order = rng.permutation(len(self.synsets))
        odds = rng.random((len(self.synsets), 3))
        texts = []
        for index, (kind, word, form) in zip(order, odds, strict=True):
            synset = self.synsets[index]
            if kind < self._chats:
                question = write_question(synset, int(word * len(synset.words)), int(form < 0.5))
                texts.append(write_chat(question, write_answer(synset)))
            else:
                texts.append(write_entry(synset))
        return texts

    def _pack(self, epoch: int) -> Rows:
        texts = self._tokenizer.backend_tokenizer.encode_batch(self.phrase(epoch))
        return pack([[*text.ids, self.stop] for text in texts], self._length, self.stop)
