"""How much memory training on clips will need, from the configuration files of a model alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from engram_video.settings import Wan22TrainSettings
from engram_vision.memory import Estimate, Probe, estimate_with

__all__ = ["estimate_memory"]

_META = torch.device("meta")


def estimate_memory(settings: Wan22TrainSettings) -> Estimate | None:
    """Return what a run will need; None where the model's configuration cannot be had or understood."""

    def make_probe(modules: Mapping[str, Any]) -> Probe:
        return _ClipProbe(settings, modules["vae"].config)

    return estimate_with(
        make_probe,
        settings.family,
        settings.model,
        precision=settings.precision,
        batch_size=settings.batch_size,
        gradient_checkpointing=settings.gradient_checkpointing,
        low_memory=settings.low_memory,
    )


class _ClipProbe:
    """Clips of one size, through Wan's parts."""

    def __init__(self, settings: Wan22TrainSettings, vae: Any) -> None:
        self._settings = settings
        self._spatial, self._temporal = int(vae.scale_factor_spatial), int(vae.scale_factor_temporal)

    def encode(self, vae: Any) -> None:
        settings = self._settings
        vae.encode(torch.empty(1, 3, settings.frames, settings.height, settings.width, dtype=vae.dtype, device=_META))

    def step(self, denoiser: Any) -> None:
        settings, config = self._settings, denoiser.config
        frames = (settings.frames - 1) // self._temporal + 1
        height, width = settings.height // self._spatial, settings.width // self._spatial
        _, patch_height, patch_width = config.patch_size
        n_tokens = frames * (height // patch_height) * (width // patch_width)
        size, dtype = settings.batch_size, denoiser.dtype
        (part,) = settings.family.streams.values()
        guess = denoiser(
            torch.empty(size, config.in_channels, frames, height, width, dtype=dtype, device=_META),
            # One time a token, as TI2V-5B reads them, needs the most.
            timestep=torch.empty(size, n_tokens, dtype=torch.float32, device=_META),
            encoder_hidden_states=torch.empty(
                size, part.max_length, config.text_dim, dtype=dtype, device=_META, requires_grad=True
            ),
            return_dict=False,
        )[0]
        guess.backward(torch.empty_like(guess))

    def describe(self) -> str:
        return f"for {self._settings.frames} frames of {self._settings.width}x{self._settings.height}"
