"""The tiny autoencoder: 64 x 64 pictures to latents of 4 x 16 x 16 and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from recipes.training import Report, fit

BATCH = 16
PEAK_RATE = 1.5e-3
KL_WEIGHT = 1e-3
EDGE_WEIGHT = 0.5
_SHOWN = 256

Images = npt.NDArray[np.uint8]


def build_autoencoder() -> AutoencoderKL:
    """Return an untrained autoencoder of 0.65 million parameters."""
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )
    # The variance begins small; at its usual beginning the noise drowns the picture and nothing is learned.
    with torch.no_grad():
        model.quant_conv.bias[4:] = -5.0
    return model


def train_autoencoder(images: Images, folder: Path, *, steps: int, seed: int, report: Report) -> AutoencoderKL:
    """Train on pictures, uint8 [N, 64, 64, 3]; goes on where an earlier call stopped.

    Args:
        images: the world.
        folder: for the state.
        steps: in all.
        seed: initial weights, batches and noise.
        report: called with a line now and then.
    """
    torch.manual_seed(seed)
    model = build_autoencoder()

    def loss_of(step: int) -> Tensor:
        rng = np.random.default_rng([seed, step])
        torch.manual_seed(seed * 1_000_003 + step)
        pictures = to_pixels(images[np.sort(rng.choice(len(images), BATCH, replace=False))])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pictures).latent_dist
            decoded = model.decode(posterior.sample()).sample
        error = decoded.float() - pictures
        loss: Tensor = error.abs().mean() + EDGE_WEIGHT * _edges(error) + KL_WEIGHT * _divergence(posterior)
        return loss

    weights = fit(
        "autoencoder",
        {"vae": model},
        loss_of,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        decay=0.998,
        weight_decay=1e-4,
        betas=(0.9, 0.999),
        save_every=250,
        report=report,
    )
    model.load_state_dict(dict(weights["vae"]))
    redrawn = redraw_images(model.eval(), images[:_SHOWN]).astype(np.float32)
    error = np.square(redrawn - images[:_SHOWN]).mean()
    report(f"autoencoder: {10 * np.log10(255**2 / error):.2f} dB")
    return model


@torch.no_grad()
def encode_images(model: AutoencoderKL, images: Images) -> Tensor:
    """Return the means of the latents, float32 [N, 4, 16, 16], not yet scaled."""
    parts = [model.encode(to_pixels(images[i : i + 64])).latent_dist.mean for i in range(0, len(images), 64)]
    return torch.cat(parts)


@torch.no_grad()
def redraw_images(model: AutoencoderKL, images: Images) -> Images:
    """Return pictures after a way through the autoencoder and back."""
    parts = []
    for first in range(0, len(images), 64):
        latents = model.encode(to_pixels(images[first : first + 64])).latent_dist.mean
        pixels = model.decode(latents).sample.clamp(-1, 1).add(1).mul(127.5).round()
        parts.append(pixels.permute(0, 2, 3, 1).byte().numpy())
    return np.concatenate(parts)


def to_pixels(images: Images) -> Tensor:
    """Return uint8 [N, H, W, 3] as float32 [N, 3, H, W] in -1..1."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def _edges(error: Tensor) -> Tensor:
    """Return the mean difference of neighbouring errors: blurred edges cost more than a shifted colour."""
    return (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()


def _divergence(posterior: Any) -> Tensor:
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    divergence: Tensor = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return divergence
