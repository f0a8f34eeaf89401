"""Table rows of hashed n-grams, on the model's device, in 64-bit integers.

Bit-compatible with `engram_core.NgramHash`. Shapes: K layers, B rows, L positions, N longest n-gram, H heads an n-gram.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engram_core import NgramHash

__all__ = ["Addresses"]


class Addresses(nn.Module):
    """Maps compressed ids to rows of the layers' tables, in each of which all heads lie one after the other.

    Attributes:
        n_rows: layer to the rows of its table.
    """

    multipliers: Tensor  # [K, N, 1, 1]
    primes: Tensor  # [K, 1, 1, N-1, H]
    offsets: Tensor  # [K, 1, 1, N-1, H]: where a head's rows begin

    def __init__(self, ngrams: NgramHash) -> None:
        """Take the multipliers and primes of all layers."""
        super().__init__()
        multipliers, primes = _stack(ngrams.multipliers), _stack(ngrams.primes)
        ends = primes.flatten(1).cumsum(1).reshape(primes.shape)
        self.n_rows = {layer: int(sizes.sum()) for layer, sizes in ngrams.primes.items()}
        self._oldest_first = ngrams.oldest_first
        # Buffers, so that they move with the module; not saved, because the settings determine them.
        self.register_buffer("multipliers", multipliers[..., None, None], persistent=False)
        self.register_buffer("primes", primes[:, None, None], persistent=False)
        self.register_buffer("offsets", (ends - primes)[:, None, None], persistent=False)

    def forward(self, window: Tensor) -> Mapping[int, Tensor]:
        """Return the rows of every n-gram that ends at each position.

        Args:
            window: the compressed ids at each position and 1, 2, ..., N-1 tokens before it, int64 [N, B, L].

        Returns:
            Layer to int64 [B, L, (N-1)·H]: all heads of n = 2, then of n = 3, and so on.
        """
        # All layers and heads in one operation each.
        ordered = window.flip(0) if self._oldest_first else window
        products = (ordered * self.multipliers).unbind(1)  # of [K, B, L]
        mix, mixes = products[0], []
        for product in products[1:]:
            mix = mix ^ product
            mixes.append(mix)
        rows = (torch.stack(mixes, dim=-1).unsqueeze(-1) % self.primes).add_(self.offsets)
        return dict(zip(self.n_rows, rows.flatten(-2), strict=True))


def _stack(by_layer: Mapping[int, npt.NDArray[np.int64]]) -> Tensor:
    return torch.from_numpy(np.stack(list(by_layer.values())))
