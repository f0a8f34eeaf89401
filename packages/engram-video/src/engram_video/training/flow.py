"""What Wan's transformer was trained to predict: the velocity from clip to noise, with the model's own layout of times.

Shapes: B clips, latents [B, c, f, h, w].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_core import InputError
from engram_vision.training.objectives import spread_shares

__all__ = ["ClipFlow"]


class ClipFlow:
    """Rectified flow on the latents of clips (report, section 2.6), times shifted as the sampler shifts them."""

    def __init__(self, pipeline: Any) -> None:
        """Take a pipeline's transformer, and what its scheduler says of times.

        Raises:
            InputError: the model has two transformers, or its scheduler is not one of flows.
        """
        if getattr(pipeline, "transformer_2", None) is not None:
            raise two_experts(str(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__))
        self.transformer = pipeline.transformer
        config = pipeline.scheduler.config
        shift = config.get("flow_shift", config.get("shift"))
        if shift is None:
            raise InputError(
                f"the model's scheduler is {type(pipeline.scheduler).__name__}, expected one that matches flows"
            )
        self._shift, self._times = float(shift), int(config.num_train_timesteps)
        # One time for each token of the latents, as TI2V-5B reads them; others read one for each clip.
        self._expands = bool(pipeline.config.get("expand_timesteps"))

    def spread_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Return times, float32 [count]: even, then shifted as the sampler shifts them."""
        times = spread_shares(count, generator)
        return self._shift * times / (1 + (self._shift - 1) * times)

    def losses(self, latents: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return each clip's loss, float32 [B]; times are the share of noise, float32 [B] in 0..1."""
        dtype = self.transformer.dtype
        noisy = torch.lerp(latents, noise, times[:, None, None, None, None])
        steps = times * self._times
        if self._expands:
            _, _, frames, height, width = latents.shape
            _, patch_height, patch_width = self.transformer.config.patch_size
            n_tokens = frames * (height // patch_height) * (width // patch_width)
            steps = steps[:, None].expand(-1, n_tokens)
        guess = self.transformer(
            hidden_states=noisy.to(dtype),
            timestep=steps,
            **{name: value.to(dtype) for name, value in conditions.items()},
        ).sample
        losses: Tensor = (guess.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3, 4))
        return losses


def two_experts(model: str) -> InputError:
    """Return the error for a model with two transformers, one for the early steps and one for the late ones."""
    return InputError(
        f"{model}: has two transformers (transformer and transformer_2), which training does not support; "
        "train with Wan2.2-TI2V-5B or Wan2.1-T2V"
    )
