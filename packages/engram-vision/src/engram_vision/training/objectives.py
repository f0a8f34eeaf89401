"""What the denoisers were trained to predict, as a loss: the noise (or v) of DDPM, or the velocity of a flow.

Shapes: B samples, latents [B, c, h, w]. Conditions are the denoiser's keyword arguments, see
`engram_vision.conditions`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from engram_core import InputError
from engram_vision.settings import SD15TrainSettings, SD35TrainSettings, TrainSettings

__all__ = ["Diffusion", "Flow", "Objective", "make_objective", "spread_shares"]


class Objective(Protocol):
    """A denoiser's loss, by the model's own noise schedule."""

    def spread_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Return times for a batch [count]: one in each of `count` equally likely parts, in random order.

        Each time is as likely as with free draws, but a batch covers all noise levels, so its loss varies less.
        """
        ...

    def losses(self, latents: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return each sample's loss, float32 [B].

        Args:
            latents: clean, scaled latents, float [B, c, h, w].
            noise: standard normal, of the same shape.
            times: from `spread_times`, [B].
            conditions: what else the denoiser reads.
        """
        ...


def make_objective(settings: TrainSettings, pipeline: Any) -> Objective:
    """Return the objective of a family's pipeline."""
    denoiser = getattr(pipeline, settings.family.denoiser)
    if isinstance(settings, SD35TrainSettings):
        return Flow(denoiser, pipeline.scheduler, mean=settings.logit_mean, std=settings.logit_std)
    min_snr = settings.min_snr if isinstance(settings, SD15TrainSettings) else None
    return Diffusion(denoiser, pipeline.scheduler, min_snr=min_snr)


class Diffusion:
    """The objective of Stable Diffusion 1.x and XL: predict the noise (or v) that DDPM added to a latent."""

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

    def losses(self, latents: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return each sample's loss, float32 [B]; times are int64."""
        noisy = self._noiser.add_noise(latents, noise, times)
        guess = self.unet(noisy.to(self.unet.dtype), times, **_cast(conditions, self.unet.dtype)).sample
        predicts_noise = self._noiser.config.prediction_type == "epsilon"
        target = noise if predicts_noise else self._noiser.get_velocity(latents, noise, times)
        losses: Tensor = (guess.float() - target.float()).square().mean(dim=(1, 2, 3))
        if self._min_snr is not None:
            # Weights for x0, turned into weights for what the model predicts; 1e-8 because SNR can be 0 at the end.
            snr = compute_snr(self._noiser, times)
            losses = losses * (snr.clamp(max=self._min_snr) + 1e-8) / (snr + 1e-8 if predicts_noise else snr + 1)
        return losses

    def spread_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Return times, int64 [count]."""
        return (spread_shares(count, generator) * self.n_times).long().clamp(max=self.n_times - 1)


class Flow:
    """The objective of Stable Diffusion 3: the velocity of a straight path from latent to noise (arXiv:2403.03206)."""

    def __init__(self, transformer: Any, scheduler: Any, *, mean: float = 0.0, std: float = 1.0) -> None:
        """Take a transformer and the scheduler of its pipeline.

        Args:
            transformer: a frozen `SD3Transformer2DModel`.
            scheduler: a `FlowMatchEulerDiscreteScheduler`; its shift moves times towards the noise.
            mean: times are drawn as the sigmoid of a normal variable with this mean.
            std: and this standard deviation.

        Raises:
            InputError: the scheduler is not one of flows.
        """
        self.transformer = transformer
        config = scheduler.config
        if "shift" not in config:
            raise InputError(f"the model's scheduler is {type(scheduler).__name__}, expected one that matches flows")
        self._shift, self._times = float(config.shift), int(config.num_train_timesteps)
        self._mean, self._std = mean, std

    def losses(self, latents: Tensor, noise: Tensor, times: Tensor, conditions: Mapping[str, Any]) -> Tensor:
        """Return each sample's loss, float32 [B]; times are the share of noise, float32 in 0..1."""
        noisy = torch.lerp(latents, noise, times[:, None, None, None])
        guess = self.transformer(
            hidden_states=noisy.to(self.transformer.dtype),
            timestep=times * self._times,
            **_cast(conditions, self.transformer.dtype),
        ).sample
        losses: Tensor = (guess.float() - (noise - latents).float()).square().mean(dim=(1, 2, 3))
        return losses

    def spread_times(self, count: int, generator: torch.Generator) -> Tensor:
        """Return times, float32 [count]: logit-normal, then shifted as the sampler shifts them."""
        # In float64, where no share rounds to the ends 0 and 1.
        shares = spread_shares(count, generator).double().clamp(1e-6, 1 - 1e-6)
        times: Tensor = (torch.special.ndtri(shares) * self._std + self._mean).sigmoid().float()
        return self._shift * times / (1 + (self._shift - 1) * times)


def spread_shares(count: int, generator: torch.Generator) -> Tensor:
    """Return shares, float32 [count] in 0..1: one in each of `count` equal parts, in random order."""
    parts = (torch.arange(count) + torch.rand(count, generator=generator)) / count
    return parts[torch.randperm(count, generator=generator)]


def _cast(conditions: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return conditions in the denoiser's number type."""
    return {
        name: _cast(value, dtype) if isinstance(value, Mapping) else value.to(dtype)
        for name, value in conditions.items()
    }
