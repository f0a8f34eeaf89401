"""Table rows of hashed n-grams, on the model's device, in 64-bit integers.

Bit-compatible with `engram_core.NgramHash`. Shapes: B rows, L positions, N longest n-gram, H heads an n-gram.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engram_core import NgramHash

__all__ = ["Addresses"]


class Addresses(nn.Module):
    """Maps compressed ids to rows of one layer's table, in which all heads lie one after the other."""

    multipliers: Tensor
    primes: Tensor
    offsets: Tensor

    def __init__(self, ngrams: NgramHash, layer: int) -> None:
        """Take the multipliers and primes of a layer."""
        super().__init__()
        primes = torch.from_numpy(ngrams.primes[layer])
        ends = primes.reshape(-1).cumsum(0)
        self.n_rows, self._oldest_first = int(ends[-1]), ngrams.oldest_first
        # Buffers, so that they move with the module; not saved, because the settings determine them.
        self.register_buffer("multipliers", torch.from_numpy(ngrams.multipliers[layer]), persistent=False)
        self.register_buffer("primes", primes, persistent=False)
        self.register_buffer("offsets", (ends - primes.reshape(-1)).reshape(primes.shape), persistent=False)

    def forward(self, ids: Tensor, earlier: Sequence[Tensor]) -> Tensor:
        """Return the rows of every n-gram that ends at each position.

        Args:
            ids: compressed ids, int64 [B, L].
            earlier: the compressed ids 1, 2, ..., N-1 tokens before, each int64 [B, L].

        Returns:
            int64 [B, L, (N-1)·H]: all heads of n = 2, then of n = 3, and so on.
        """
        window = [ids, *earlier]
        if self._oldest_first:
            window.reverse()
        mix = window[0] * self.multipliers[0]
        rows = []
        for place, tokens in enumerate(window[1:]):
            mix = mix ^ (tokens * self.multipliers[place + 1])
            rows.append(mix.unsqueeze(-1) % self.primes[place] + self.offsets[place])
        return torch.cat(rows, dim=-1)
