"""The memory before one decoder layer: retrieval, gate, short convolution (arXiv:2601.07372, sections 2.2 to 2.4).

Parameters have the field's usual names, so a layer's `state_dict` is what the file holds.
Shapes: B rows, L positions, d width of the model, E channels retrieved, M branches, C = M·d, k taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import vecdot
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from engram_core import MemorySettings

__all__ = ["MemoryLayer", "ShortConvolution", "Table"]

GATE_EPS = 2.0**-23  # PyTorch's default in float32, which the published modules use
CONVOLUTION_EPS = 1e-5
_SMALLEST = 1e-6  # below it the square root of a gate's score is cut off, as published


class Table(nn.Module):
    """All heads' rows, one after the other, beside the weights of the model."""

    def __init__(self, n_rows: int, width: int, *, sparse: bool = False) -> None:
        """Make a table of zeros.

        Args:
            n_rows: rows of all heads.
            width: channels of a row.
            sparse: whether gradients hold the touched rows alone.
        """
        super().__init__()
        self.embedding = nn.Embedding(n_rows, width, sparse=sparse, _weight=torch.zeros(n_rows, width))

    def forward(self, rows: Tensor) -> Tensor:
        """Return the channels of rows: [..., R] to [..., R·width]."""
        found: Tensor = self.embedding(rows)
        return found.flatten(-2)


class ShortConvolution(nn.Module):
    """SiLU of a dilated causal depthwise convolution over RMS-normed values."""

    def __init__(self, width: int, branches: int, kernel_size: int) -> None:
        """Make a convolution that gives zero."""
        super().__init__()
        channels = width * branches
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=CONVOLUTION_EPS) for _ in range(branches))
        self.conv = nn.Conv1d(channels, channels, kernel_size, groups=channels, bias=False)
        nn.init.zeros_(self.conv.weight)

    def normalize(self, values: Tensor) -> Tensor:
        """Return what the convolution reads: [B, L, M, d] to [B, L, C]."""
        parts = [norm(part) for norm, part in zip(self.norms, values.unbind(2), strict=True)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Return the output.

        Args:
            taps: what is read at each position and 1, 2, ..., k-1 dilations before it, each [B, L, C].

        Returns:
            [B, L, C].
        """
        # A sum over taps: they may come from a window, or from anywhere when a batch is padded.
        weights = self.conv.weight[:, 0].t().contiguous().unbind()  # of [C] each, the newest position last
        total = taps[0] * weights[-1]
        for tap, weight in zip(taps[1:], weights[-2::-1], strict=True):
            total = torch.addcmul(total, tap, weight)
        return F.silu(total)


def _inverse_rms(values: Tensor) -> Tensor:
    mean: Tensor = vecdot(values, values) / values.shape[-1]
    return (mean + GATE_EPS).rsqrt()


class MemoryLayer(nn.Module):
    """One layer's memory.

    Attributes:
        gate_floor: gates are at least this: 1 keeps them open, as in a warm-up (TinyEngram, engram.py).
    """

    def __init__(self, settings: MemorySettings, width: int, table: nn.Module) -> None:
        """Make a memory whose projections have PyTorch's random values and whose convolution gives zero.

        Args:
            settings: its shape.
            width: d.
            table: gives the channels of rows.
        """
        super().__init__()
        branches, retrieved = settings.hc_mult, settings.memory_width
        self.gate_floor = 0.0
        self.multi_head_embedding = table
        self.value_proj = nn.Linear(retrieved, width, bias=settings.bias)
        self.key_projs = nn.ModuleList(nn.Linear(retrieved, width, bias=settings.bias) for _ in range(branches))
        self.norm1 = nn.ModuleList(nn.RMSNorm(width, eps=GATE_EPS) for _ in range(branches))
        self.norm2 = nn.ModuleList(nn.RMSNorm(width, eps=GATE_EPS) for _ in range(branches))
        self.short_conv = ShortConvolution(width, branches, settings.kernel_size)

    def gates(self, hidden: Tensor, retrieved: Tensor) -> Tensor:
        """Return how far each branch opens at each position, [B, L, M]."""
        # Both are RMS-normed and multiplied without being written out: their product needs three sums alone.
        wide = torch.promote_types(hidden.dtype, torch.float32)
        query = hidden.to(wide)
        scores = []
        weights: Any = zip(self.norm1, self.norm2, strict=True)
        for project, (norm_key, norm_query) in zip(self.key_projs, weights, strict=True):
            key = project(retrieved).to(wide)
            product = vecdot(key * (norm_key.weight.to(wide) * norm_query.weight), query)
            scores.append(product * _inverse_rms(key) * _inverse_rms(query))
        score = torch.stack(scores, dim=-1) / math.sqrt(hidden.shape[-1])
        gate = (score.abs().clamp_min(_SMALLEST).sqrt() * score.sign()).sigmoid()
        return gate.clamp_min(self.gate_floor) if self.gate_floor else gate

    def values(self, hidden: Tensor, retrieved: Tensor) -> Tensor:
        """Return the gated values.

        Args:
            hidden: what enters the decoder layer, [B, L, d].
            retrieved: the rows of all heads, [B, L, E].

        Returns:
            [B, L, M, d].
        """
        gate = self.gates(hidden, retrieved).to(hidden.dtype)
        value: Tensor = self.value_proj(retrieved)
        return gate.unsqueeze(-1) * value.unsqueeze(2)

    def residual(self, values: Tensor, taps: Sequence[Tensor]) -> Tensor:
        """Return what is added to the hidden states, [B, L, d].

        Args:
            values: gated, [B, L, M, d].
            taps: normed values at each position and k-1 dilations before it, each [B, L, C].
        """
        mixed: Tensor = self.short_conv(taps)
        total = values + mixed.reshape(values.shape)
        return total.squeeze(2) if total.shape[2] == 1 else total.sum(2)
