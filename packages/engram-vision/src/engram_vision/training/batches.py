"""Which latents, noises, times and captions a step sees: a function of seed and step alone.

A run can therefore stop and go on anywhere, and several processes agree without talking.
Shapes: B samples, V views, latents [B, c, ...].
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engram_vision.training.frozen import FrozenData
from engram_vision.training.objectives import Objective

__all__ = ["Batch", "draw_batch", "fixed_batches"]

_OTHER_FORMS = 0.2  # share of the captions that show the trigger in another form, where there are any


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batch:
    """What one pass through the denoiser needs, on the host.

    Attributes:
        latents, noise: float32 [B, c, ...].
        times: [B], as the objective draws them.
        texts: int64 [B], rows of the frozen texts.
    """

    latents: Tensor
    noise: Tensor
    times: Tensor
    texts: Tensor

    def part(self, first: int, size: int) -> Batch:
        """Return some of the samples."""
        rows = slice(first, first + size)
        return Batch(latents=self.latents[rows], noise=self.noise[rows], times=self.times[rows], texts=self.texts[rows])


def draw_batch(data: FrozenData, objective: Objective, *, size: int, number: int, seed: int) -> Batch:
    """Return a training batch; every view comes equally often.

    Args:
        data: the training set.
        objective: for the times.
        size: B, over all processes.
        number: which batch of the run, from 0.
        seed: of the run.
    """
    random = torch.Generator().manual_seed(_mix(seed, "batch", number))
    views = torch.tensor([_shuffled(len(data.mean), seed, number * size + place) for place in range(size)])
    noise = torch.randn((size, *data.mean.shape[1:]), generator=random)
    latents = data.mean[views] + data.std[views] * torch.randn(noise.shape, generator=random)
    times = objective.spread_times(size, random)
    chances = torch.rand(size, 2, generator=random).tolist()
    forms = [data.captions[view] for view in views.tolist()]
    texts = torch.tensor([_pick_form(rows, *chance) for rows, chance in zip(forms, chances, strict=True)])
    return Batch(latents=latents, noise=noise, times=times, texts=texts)


def fixed_batches(data: FrozenData, objective: Objective, *, draws: int, size: int, seed: int) -> Sequence[Batch]:
    """Return batches for validation: `draws` noises and times for each view, captions as written."""
    random = torch.Generator().manual_seed(_mix(seed, "validation", 0))
    views = torch.arange(len(data.mean)).repeat_interleave(draws)
    every = Batch(
        latents=data.mean[views],
        noise=torch.randn((len(views), *data.mean.shape[1:]), generator=random),
        times=torch.cat([objective.spread_times(draws, random) for _ in range(len(data.mean))]),
        texts=torch.tensor([forms[0] for forms in data.captions])[views],
    )
    return [every.part(first, size) for first in range(0, len(views), size)]


def _mix(*parts: object) -> int:
    """Return a seed that differs for different parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def _shuffled(count: int, seed: int, place: int) -> int:
    """Return which of `count` views stands at a place of the endless sequence of shuffled epochs."""
    epoch, position = divmod(place, count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(_mix(seed, "epoch", epoch)))
    return int(order[position])


def _pick_form(forms: tuple[int, ...], chance: float, which: float) -> int:
    """Return the row of a caption as written, or now and then in another form."""
    if len(forms) == 1 or chance >= _OTHER_FORMS:
        return forms[0]
    return forms[1 + int(which * (len(forms) - 1))]
