"""Matching and residuals for PyTorch tensors.

Shapes: B rows, L positions, d width, M matches, U distinct matched entries.
Only matched rows leave the (memory-mapped) file and reach the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_core.adapter import Adapter
from engram_core.errors import InputError
from engram_core.matcher import Matcher, Matches
from engram_core.residual import Edit, Editor, check_lengths

__all__ = ["Residual", "add_terms", "entry_terms", "match_tensor", "mean_norm"]


def match_tensor(matcher: Matcher, ids: Tensor) -> Matches:
    """Return what fires in token ids on any device.

    The ids (8 bytes a token) are copied to the host: the index lives there, and so do the vectors.

    Args:
        matcher: the stream's matcher.
        ids: integers [L] or [B, L].

    Raises:
        InputError: not integers, or another number of axes.
    """
    return matcher.match(ids.detach().cpu().numpy())


def mean_norm(hidden: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Return rho, float32 [B]: the mean over positions of the L2 norm of the frozen states, without gradient.

    Args:
        hidden: [B, L, d].
        lengths: integers [B], positions the generator reads; None means all L, padding included.

    Raises:
        InputError: the lengths are not B integers in 1..L.
    """
    wide = torch.promote_types(hidden.dtype, torch.float32)  # torch refuses to narrow float64 on the way
    norms: Tensor = torch.linalg.vector_norm(hidden.detach(), dim=-1, dtype=wide).float()
    if lengths is None:
        return norms.mean(dim=-1)
    check_lengths(lengths.detach().cpu().numpy(), norms.shape)
    real = torch.arange(norms.shape[1], device=norms.device) < lengths[:, None].to(norms.device)
    means: Tensor = (norms * real).sum(dim=-1) / real.sum(dim=-1)
    return means


def entry_terms(vectors: Tensor, scales: Tensor, rules: Sequence[str]) -> Tensor:
    """Return each entry's residual, float32 [U, d]; for the relative rule without rho. Differentiable.

    Args:
        vectors: [U, d], one memory vector an entry.
        scales: [U, d], the scales of each entry's concept.
        rules: U rules: `absolute`, `absolute-tanh` or `relative`.
    """
    vectors, scales = vectors.float(), scales.float()
    kinds = set(rules)
    if kinds == {"absolute"}:
        return vectors * scales
    if kinds == {"absolute-tanh"}:
        return vectors * scales.tanh()
    if kinds == {"relative"}:
        return torch.nn.functional.normalize(vectors, dim=-1) * scales.tanh()
    terms = torch.empty_like(vectors)
    for rule in sorted(kinds):
        rows = [index for index, name in enumerate(rules) if name == rule]
        terms[rows] = entry_terms(vectors[rows], scales[rows], [rule])
    return terms


def add_terms(hidden: Tensor, edit: Edit, terms: Tensor) -> Tensor:
    """Return states with the residuals of an edit added; differentiable in `terms`.

    Args:
        hidden: frozen states [B, L, d], any float type; not modified.
        edit: which residuals add up where, from `Editor.prepare`.
        terms: float32 [M, d], the residual of each match, rho included.
    """
    device, plan = terms.device, edit.plan

    def index(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device)

    match, group = index(plan.match), index(plan.group)
    groups = terms.new_zeros((len(plan.group_size), terms.shape[1]))
    for low, high in pairwise(plan.match_ranks):
        groups = groups.index_add(0, group[low:high], terms[match[low:high]])
    sizes = np.where(edit.mean, plan.group_size, 1).astype(np.float32)
    groups = groups / index(sizes)[:, None] * index(edit.strength)[:, None]
    order, position = index(plan.group_order), index(plan.group_position)
    delta = terms.new_zeros((len(plan.row), terms.shape[1]))
    for low, high in pairwise(plan.group_ranks):
        chosen = order[low:high]
        delta = delta.index_add(0, position[chosen], groups[chosen])
    where = (index(plan.row).to(hidden.device), index(plan.position).to(hidden.device))
    return hidden.index_put(where, hidden[where] + delta.to(hidden.device, hidden.dtype))


class Residual:
    """Edits the states of one stream with an adapter's concepts: the PyTorch twin of `engram_core.Residual`."""

    def __init__(self, adapter: Adapter, stream: str) -> None:
        """Prepare one stream of an adapter; vectors are read when they fire."""
        self._editor = Editor(adapter, stream)

    def apply(
        self,
        hidden: Tensor,
        matches: Matches,
        *,
        strength: float | Mapping[str, float] = 1.0,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the edited states; the very same tensor when nothing fires.

        Args:
            hidden: frozen states [B, L, d] on any device, any float type; never modified.
            matches: what fires, as given by the stream's matcher on the ids of the same positions.
            strength: one factor, or concept name to factor (1.0 for others); 0 is exactly the base model.
            lengths: integers [B], positions the generator reads, for the relative rule; None means all.

        Raises:
            InputError: shapes, types or the strength do not fit.
        """
        if not hidden.is_floating_point():
            raise InputError(f"states are {hidden.dtype}, expected floats")
        edit = self._editor.prepare(hidden.shape, matches, strength)
        if edit is None:
            return hidden
        rho = mean_norm(hidden, lengths).cpu().numpy() if edit.relative.any() else None
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite
            delta = torch.from_numpy(self._editor.sum_up(edit, rho)).to(hidden.device, hidden.dtype)
        # Not in place: the frozen states may be kept elsewhere.
        edited = hidden.clone()
        edited[edit.plan.row, edit.plan.position] += delta
        return edited
