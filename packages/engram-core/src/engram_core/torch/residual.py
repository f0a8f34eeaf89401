"""Matching and residuals for PyTorch tensors.

Shapes: B rows, L positions, d width, S sites, M matches, U distinct matched entries, P edited positions; `...` is d, or
S, d where the stream has sites.
Only matched rows leave the (memory-mapped) file and reach the device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

__all__ = ["Delta", "Residual", "add_delta", "entry_terms", "match_tensor", "mean_norm", "sum_terms"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Delta:
    """What is added to text states, and where.

    Attributes:
        row, position: int64 [P], the edited positions; on the host.
        values: float32 [P, ...].
    """

    row: Tensor
    position: Tensor
    values: Tensor

    def at(self, site: int) -> Delta:
        """Return what is added at one of the sites."""
        return Delta(row=self.row, position=self.position, values=self.values[:, site])


def add_delta(hidden: Tensor, delta: Delta | None) -> Tensor:
    """Return states with a residual added, cast once to their type; differentiable in it.

    Args:
        hidden: frozen states [B, L, d], any float type; never modified.
        delta: with values [P, d]; None leaves the very same tensor.
    """
    if delta is None:
        return hidden
    where = delta.row.to(hidden.device), delta.position.to(hidden.device)
    return hidden.index_put(where, hidden[where] + delta.values.to(hidden.device, hidden.dtype))


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
    """Return each entry's residual, float32 [U, ...]; for the relative rule without rho. Differentiable.

    Args:
        vectors: [U, ...], one memory vector an entry.
        scales: [U, ...], the scales of each entry's concept.
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


def sum_terms(edit: Edit, terms: Tensor) -> Delta:
    """Return the sum of an edit's residuals at every edited position; differentiable.

    Args:
        edit: which residuals add up where, from `Editor.prepare`.
        terms: float32 [M, ...], the residual of each match, rho included.
    """
    device, plan = terms.device, edit.plan

    def index(values: npt.NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values))

    def spread(values: npt.NDArray[np.float32]) -> Tensor:
        return index(values).to(device).view(-1, *(1,) * (terms.ndim - 1))

    match, group = index(plan.match).to(device), index(plan.group).to(device)
    groups = terms.new_zeros((len(plan.group_size), *terms.shape[1:]))
    for low, high in pairwise(plan.match_ranks):
        groups = groups.index_add(0, group[low:high], terms[match[low:high]])
    sizes = np.where(edit.mean, plan.group_size, 1).astype(np.float32)
    groups = groups / spread(sizes) * spread(edit.strength)
    order, position = index(plan.group_order).to(device), index(plan.group_position).to(device)
    values = terms.new_zeros((len(plan.row), *terms.shape[1:]))
    for low, high in pairwise(plan.group_ranks):
        chosen = order[low:high]
        values = values.index_add(0, position[chosen], groups[chosen])
    return Delta(row=index(plan.row), position=index(plan.position), values=values)


class Residual:
    """Edits the states of one stream with an adapter's concepts: the PyTorch twin of `engram_core.Residual`."""

    def __init__(self, adapter: Adapter, stream: str) -> None:
        """Prepare one stream of an adapter; vectors are read when they fire."""
        self._editor = Editor(adapter, stream)

    @property
    def editor(self) -> Editor:
        """What prepares the edits and sums them up."""
        return self._editor

    def delta(
        self,
        hidden: Tensor,
        matches: Matches,
        *,
        strength: float | Mapping[str, float] = 1.0,
        lengths: Tensor | None = None,
    ) -> Delta | None:
        """Return what is added to states; None when nothing fires.

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
            return None
        rho = mean_norm(hidden, lengths).cpu().numpy() if edit.relative.any() else None
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite
            values = torch.from_numpy(self._editor.sum_up(edit, rho))
        return Delta(row=torch.from_numpy(edit.plan.row), position=torch.from_numpy(edit.plan.position), values=values)

    def apply(
        self,
        hidden: Tensor,
        matches: Matches,
        *,
        strength: float | Mapping[str, float] = 1.0,
        lengths: Tensor | None = None,
        site: str | None = None,
    ) -> Tensor:
        """Return the edited states, as one site reads them; the very same tensor when nothing fires.

        Args:
            hidden: frozen states [B, L, d] on any device, any float type; never modified.
            matches: what fires, as given by the stream's matcher on the ids of the same positions.
            strength: one factor, or concept name to factor (1.0 for others); 0 is exactly the base model.
            lengths: integers [B], positions the generator reads, for the relative rule; None means all.
            site: which of the stream's sites; None for a stream without.

        Raises:
            InputError: shapes, types, the strength or the site do not fit.
        """
        place = self._editor.site_index(site)
        delta = self.delta(hidden, matches, strength=strength, lengths=lengths)
        return add_delta(hidden, delta.at(place[1]) if delta is not None and place else delta)
