"""Hashed n-gram addresses of the language-model memory, bit-compatible with the published hash (deepseek-ai/Engram).

Shapes: B rows, L positions, H heads an n-gram, N longest n-gram.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from engram_core.errors import InputError

Ints = npt.NDArray[np.int64]

_LAYER_STEP = 10007  # spreads the seeds of layers, as published
# Deterministic Miller-Rabin for all 64-bit integers needs just these bases (Sorenson and Webster, 2015).
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37)


@dataclass(frozen=True, kw_only=True)
class NgramHash:
    """Maps compressed token ids to table rows, for every memory layer and head.

    Attributes:
        engram_vocab_size: requested table size for n = 2, 3, ..., N; each head takes the next unused prime.
        max_ngram_size: N.
        n_head_per_ngram: H.
        layer_ids: decoder layers that hold a memory; their order decides which primes they get.
        compressed_vocab_size: number of compressed ids.
        compressed_pad_id: compressed id that stands left of the text.
        seed: seeds the multipliers.
        n_ids: ids there are, when some tokens have ids beyond the compressed vocabulary; None means they have none.
        oldest_first: engram-peft's order: multipliers go to the N newest tokens from the oldest on, so that an n-gram
            with n < N ends N - n tokens before its position. The published order goes back from the newest.
    """

    engram_vocab_size: Sequence[int]
    max_ngram_size: int
    n_head_per_ngram: int
    layer_ids: Sequence[int]
    compressed_vocab_size: int
    compressed_pad_id: int
    seed: int = 0
    n_ids: int | None = None
    oldest_first: bool = False

    def __post_init__(self) -> None:
        """Check the settings; raises InputError."""
        if self.max_ngram_size < 2 or len(self.engram_vocab_size) != self.max_ngram_size - 1:
            raise InputError(
                f"engram_vocab_size has {len(self.engram_vocab_size)} sizes; max_ngram_size {self.max_ngram_size} "
                f"needs {max(1, self.max_ngram_size - 1)}, one for each n from 2"
            )
        if min(self.engram_vocab_size) < 1 or self.n_head_per_ngram < 1:
            raise InputError("engram_vocab_size and n_head_per_ngram must be positive")
        if len(set(self.layer_ids)) != len(self.layer_ids) or not self.layer_ids or min(self.layer_ids) < 0:
            raise InputError(f"layer_ids {list(self.layer_ids)} must be distinct, not negative, and at least one")
        if not 0 <= self.compressed_pad_id < self._n_ids:
            raise InputError(f"compressed_pad_id {self.compressed_pad_id} is outside 0..{self._n_ids - 1}")

    @property
    def _n_ids(self) -> int:
        return self.compressed_vocab_size if self.n_ids is None else self.n_ids

    @cached_property
    def multipliers(self) -> Mapping[int, Ints]:
        """Layer to its odd multipliers, int64 [N]."""
        bound = max(1, np.iinfo(np.int64).max // self.compressed_vocab_size // 2)
        return {
            layer: np.random.default_rng(self.seed + _LAYER_STEP * layer).integers(
                0, bound, self.max_ngram_size, dtype=np.int64
            )
            * 2
            + 1
            for layer in self.layer_ids
        }

    @cached_property
    def primes(self) -> Mapping[int, Ints]:
        """Layer to its table sizes, int64 [N-1, H]: primes, unique across the model."""
        taken: set[int] = set()
        tables: dict[int, Ints] = {}
        begin = {size: size for size in self.engram_vocab_size}  # no prime from the size up to here is left
        for layer in self.layer_ids:
            rows = []
            for size in self.engram_vocab_size:
                candidate = begin[size]
                row: list[int] = []
                while len(row) < self.n_head_per_ngram:
                    if candidate not in taken and is_prime(candidate):
                        taken.add(candidate)
                        row.append(candidate)
                    candidate += 1
                begin[size] = candidate
                rows.append(row)
            tables[layer] = np.array(rows, np.int64)
        return tables

    def addresses(self, ids: npt.ArrayLike, layer: int) -> Ints:
        """Return the table row of every n-gram that ends at each position, for one layer.

        Args:
            ids: compressed token ids, integers [B, L].
            layer: one of `layer_ids`.

        Returns:
            int64 [B, L, (N-1)*H]: all heads of n = 2, then of n = 3, and so on.

        Raises:
            InputError: another shape or type, an unknown layer, or an id outside the compressed vocabulary.
        """
        tokens = np.asarray(ids)
        if tokens.ndim != 2 or tokens.dtype.kind not in "iu":
            raise InputError(f"ids are {tokens.dtype} with {tokens.ndim} axes, expected integers [B, L]")
        if layer not in self.layer_ids:
            raise InputError(f"layer {layer} has no memory; layers {list(self.layer_ids)} have")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._n_ids):
            raise InputError(f"ids reach from {tokens.min()} to {tokens.max()}, outside 0..{self._n_ids - 1}")
        tokens = tokens.astype(np.int64)
        multipliers, primes = self.multipliers[layer], self.primes[layer]
        window = [tokens]
        for back in range(1, self.max_ngram_size):
            earlier = np.full_like(tokens, self.compressed_pad_id)
            earlier[:, back:] = tokens[:, : max(0, tokens.shape[1] - back)]
            window.append(earlier)
        if self.oldest_first:
            window.reverse()
        mix = window[0] * multipliers[0]
        parts = []
        for place in range(1, self.max_ngram_size):
            mix = mix ^ (window[place] * multipliers[place])
            parts.append(mix[:, :, None] % primes[place - 1])
        return np.concatenate(parts, axis=2)


def is_prime(number: int) -> bool:
    """Tell whether an integer below 2**64 is prime."""
    if number < 2:
        return False
    for prime in _WITNESSES:
        if number % prime == 0:
            return number == prime
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in _WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True
