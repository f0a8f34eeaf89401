"""What training must know of what a family draws: pictures here, clips in engram-video."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from engram_core import Watcher
from engram_vision.memory import Estimate
from engram_vision.training.frozen import Captioned, Latents
from engram_vision.training.objectives import Objective

__all__ = ["Conditions", "Medium"]

Conditions = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Any]]
"""From text states [B, L, d] and pooled states [B, p] by stream to what else the denoiser reads."""


class Medium(Protocol):
    """Reads, encodes and draws one kind of thing. `settings` are always those of its own families.

    Attributes:
        name: what the things are called, in the plural.
    """

    @property
    def name(self) -> str:
        """What the things are called, in the plural."""

    def read(self, folder: Path, settings: Any, watcher: Watcher) -> Sequence[Captioned]:
        """Return a folder's samples with their captions; raises InputError when one cannot be used."""

    def encode(
        self,
        items: Sequence[Any],
        settings: Any,
        pipeline: Any,
        device: torch.device,
        watcher: Watcher,
        *,
        learning: bool,
    ) -> Latents:
        """Return the samples' latents; raises InputError when one cannot be read or the size does not fit."""

    def conditioner(self, settings: Any, pipeline: Any) -> Conditions:
        """Return what makes the denoiser's keyword arguments out of text states."""

    def objective(self, settings: Any, pipeline: Any) -> Objective:
        """Return the loss; raises InputError when the model is of another kind."""

    def estimate(self, settings: Any) -> Estimate | None:
        """Return how much memory a run will need, from configuration files alone; None where that is not known."""

    def preview(self, prompts: Sequence[str], settings: Any, pipeline: Any, folder: Path, step: int) -> None:
        """Draw prompts with what is loaded into the pipeline, and write the results to a folder."""
