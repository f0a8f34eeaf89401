"""Sites: the places of a denoiser that read text states, each with a residual of its own.

Of a stream's residuals at all sites becomes what each place reads: the edited states themselves, those states after the
denoiser's projection, or, where blocks pass the text states on changed, what the projection adds for the residual.
Shapes: B rows, L positions, d width of a stream, D width of all states, W width after the projection, S sites,
P edited positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram_core.torch import Delta
from engram_vision.families import Family

__all__ = ["Corner", "SiteEdits", "find_corners", "find_places", "join_deltas", "name_sites", "project"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteEdits:
    """What each site reads at the edited positions.

    Attributes:
        row, position: int64 [P].
        values: [P, S, W].
        length: L of the states that the positions count in; a denoiser may put others before them.
        adds: whether the values are added; else they take the place of what is there.
    """

    row: Tensor
    position: Tensor
    values: Tensor
    length: int
    adds: bool

    def apply(self, states: Tensor, site: int) -> Tensor:
        """Return the states [B, at least L, W] as a site reads them; the given ones are not modified."""
        first = states.shape[1] - self.length
        where = self.row.to(states.device), self.position.to(states.device) + first
        values = self.values[:, site].to(states.device, states.dtype)
        return states.index_put(where, states[where] + values if self.adds else values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Corner:
    """Where one stream's states begin in those that the denoiser reads, and their width."""

    position: int
    channel: int
    width: int

    def cut(self, states: Tensor) -> Tensor:
        """Return the stream's part of states [B, L, D], with whatever positions follow."""
        return states[:, self.position :, self.channel : self.channel + self.width]


def find_places(family: Family, denoiser: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a denoiser that read text states, by name, in the order of the blocks."""
    return {name: module for name, module in denoiser.named_modules() if re.fullmatch(family.readers, name)}


def name_sites(family: Family, pipeline: Any) -> tuple[str, ...]:
    """Return the names of all sites of a pipeline: the denoiser's name, and the place's within it."""
    return tuple(
        f"{name}.{place}"
        for name, denoiser in family.denoisers(pipeline).items()
        for place in find_places(family, denoiser)
    )


def find_corners(family: Family, pipeline: Any) -> dict[str, Corner]:
    """Return where in the states that a pipeline's denoiser reads each stream's are."""
    corners, channel = {}, 0
    for stream, encoder in family.encoders(pipeline).items():
        width = int(encoder.config.hidden_size)
        if family.streams[stream].follows:
            # Every CLIP of a pipeline reads as many positions as the first one's tokenizer says.
            corners[stream] = Corner(position=int(pipeline.tokenizer.model_max_length), channel=0, width=width)
        else:
            corners[stream] = Corner(position=0, channel=channel, width=width)
            channel += width
    return corners


def join_deltas(deltas: Sequence[tuple[Delta, Corner]], shape: Sequence[int]) -> Delta:
    """Return the residuals of several streams as one of the states that they make up.

    Args:
        deltas: of each stream what is added, values [P, S, d], and where its states are.
        shape: B, L and D of the states.
    """
    rows = torch.cat([delta.row for delta, _ in deltas])
    positions = torch.cat([delta.position + corner.position for delta, corner in deltas])
    padded = [
        nn.functional.pad(delta.values, (corner.channel, shape[2] - corner.channel - corner.width))
        for delta, corner in deltas
    ]
    if len(padded) == 1:
        return Delta(row=rows, position=positions, values=padded[0])
    # Streams side by side edit the same positions, in other channels.
    keys, which = torch.unique(rows * shape[1] + positions, return_inverse=True)
    values = torch.cat(padded)
    joined = values.new_zeros((len(keys), *values.shape[1:])).index_add(0, which.to(values.device), values)
    return Delta(row=keys // shape[1], position=keys % shape[1], values=joined)


def project(family: Family, denoiser: nn.Module, states: Tensor, delta: Delta) -> SiteEdits:
    """Return what the sites read at the edited positions; differentiable in the residuals.

    Args:
        family: of the denoiser.
        denoiser: with the projection.
        states: frozen states [B, L, D], as the denoiser is given them.
        delta: values [P, S, D].
    """
    values, device = delta.values.to(states.device), states.device
    kept = states[delta.row.to(device), delta.position.to(device)][:, None]
    edited = kept + values.to(states.dtype)
    if family.projection is not None:
        projection: Any = denoiser.get_submodule(family.projection)
        plain = (
            type(projection) is nn.Linear and projection.weight.is_floating_point() and not projection.weight.is_meta
        )
        if not family.passes_on:
            edited = projection(edited)
        elif plain:  # in float32: the difference of two rounded numbers would be coarser than what is added
            edited = nn.functional.linear(values.float(), projection.weight.to(device).float())
        else:
            edited = projection(edited) - projection(kept)
    return SiteEdits(
        row=delta.row, position=delta.position, values=edited, length=states.shape[1], adds=family.passes_on
    )
