"""The objective of Stable Diffusion 1.x: predict the noise (or v) that DDPM added to a latent.

Shapes: B samples, latents [B, 4, h, w], states [B, L, d].
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from engram_core import InputError

__all__ = ["Diffusion"]


class Diffusion:
    """The denoiser's loss, by the model's own noise schedule."""

    def __init__(self, unet: Any, scheduler: Any, *, min_snr: float | None = None) -> None:
        """Take a U-Net and the scheduler of its pipeline.

        Args:
            unet: a frozen `UNet2DConditionModel`.
            scheduler: any diffusers scheduler; its configuration tells schedule and prediction type.
            min_snr: gamma of min-SNR weighting (arXiv:2303.09556); None weights all times alike.

        Raises:
            InputError: the prediction type is neither the noise nor v.
        """
        self.unet = unet
        self._noiser: Any = DDPMScheduler.from_config(scheduler.config)
        self._min_snr = min_snr
        if self._noiser.config.prediction_type not in ("epsilon", "v_prediction"):
            raise InputError(
                f"the model predicts {self._noiser.config.prediction_type!r}, expected epsilon or v_prediction"
            )

    @property
    def n_times(self) -> int:
        """The number of noise levels; times are 0..n_times-1."""
        return int(self._noiser.config.num_train_timesteps)

    def losses(self, latents: Tensor, noise: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """Return each sample's loss, float32 [B].

        Args:
            latents: clean, scaled latents, float [B, 4, h, w].
            noise: standard normal, of the same shape.
            times: int64 [B].
            states: text states [B, L, d].
        """
        noisy = self._noiser.add_noise(latents, noise, times)
        guess = self.unet(noisy.to(self.unet.dtype), times, states.to(self.unet.dtype)).sample
        predicts_noise = self._noiser.config.prediction_type == "epsilon"
        target = noise if predicts_noise else self._noiser.get_velocity(latents, noise, times)
        losses: Tensor = (guess.float() - target.float()).square().mean(dim=(1, 2, 3))
        if self._min_snr is not None:
            # Weights for x0, turned into weights for what the model predicts; 1e-8 because SNR can be 0 at the end.
            snr = compute_snr(self._noiser, times)
            losses = losses * (snr.clamp(max=self._min_snr) + 1e-8) / (snr + 1e-8 if predicts_noise else snr + 1)
        return losses

    def spread_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Return times for a batch, int64 [count]: one in each of `count` equal parts, in random order.

        Each time is as likely as with free draws, but a batch covers all noise levels, so its loss varies less.
        """
        parts = (torch.arange(count) + torch.rand(count, generator=generator)) * (self.n_times / count)
        return parts.long().clamp(max=self.n_times - 1)[torch.randperm(count, generator=generator)]
