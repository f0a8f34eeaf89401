"""The tiny video autoencoder: clips of 64 x 64 pixels to latents of 8 channels, 16 x 16, half of the frames."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanResample
from torch import Tensor, nn

from recipes.small_world.motion import FRAMES, Frames, draw_clips
from recipes.small_world.world import SIZE
from recipes.training import Report, fit

CHANNELS = 8
"""Of the latents: 16 pixels of 2 frames in 8 numbers."""

SPATIAL = 4
"""Pixels along a side of a place in the latents."""

LATENT_FRAMES = 2
"""Frames that one latent frame stands for; the first stands for one."""

STILLS = 0.7
"""Of the steps, the share that sees single frames, which cost little: looks are learned first, motion afterwards."""

STILL_RATE, CLIP_RATE = 4e-3, 6e-4
KL_WEIGHT = 1e-4
SQUARE_WEIGHT = 5.0
EDGE_WEIGHT = 0.2
# Frames to clips of a step, in turn.
_STILL_SHAPES, _CLIP_SHAPES = ((1, 8),), ((17, 1), (1, 8), (9, 2), (5, 3))
_BATCH = 16

Shapes = tuple[tuple[int, int], ...]


def build_video_autoencoder() -> AutoencoderKLWan:
    """Return an untrained autoencoder of 0.6 million parameters, built as that of Wan2.2-TI2V-5B is.

    The real one has patches of 2 x 2 pixels and three times half the size, twice half the frames; this one halves size
    and frames once. Every further halving made small pictures many times slower to learn.
    """
    model = AutoencoderKLWan(
        base_dim=32,
        decoder_base_dim=32,
        z_dim=CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=LATENT_FRAMES,
        scale_factor_spatial=SPATIAL,
    )
    # The variance begins small; at its usual beginning the noise drowns the clip and nothing is learned.
    with torch.no_grad():
        model.quant_conv.bias[CHANNELS:] = -5.0
    begin_frame_by_frame(model)
    return model


@torch.no_grad()
def begin_frame_by_frame(model: AutoencoderKLWan) -> None:
    """Let a model treat frames by themselves: where it halves their number it takes means, and doubles those again.

    What single frames taught it then holds for clips from the first step on.
    """
    for module in model.modules():
        if isinstance(module, WanResample) and hasattr(module, "time_conv"):
            kernel = module.time_conv.weight  # [C, C, 3, 1, 1], or [2 C, C, 3, 1, 1] where a frame becomes two
            one = torch.eye(kernel.shape[1])[:, :, None, None]
            kernel.zero_()
            module.time_conv.bias.zero_()
            if len(kernel) == len(one):
                kernel[:, :, 1] = kernel[:, :, 2] = one / 2
            else:
                kernel[:, :, 2] = torch.cat([one, one])
        elif isinstance(module, WanCausalConv3d) and module.kernel_size[0] > 1 and module.kernel_size[1] > 1:
            module.weight[:, :, :-1] = 0  # of what came before


def draw_films(seed: int, count: int, path: Path) -> Frames:
    """Return the frames of `count` clips, uint8 [N, 17, 64, 64, 3], from a file that is written when it is missing."""
    if not path.exists():
        partial = path.with_suffix(".partial.npy")
        films = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, FRAMES, SIZE, SIZE, 3))
        for number, clip in enumerate(draw_clips(seed, range(count))):
            films[number] = clip.frames
        films.flush()
        partial.replace(path)
    drawn: Frames = np.load(path, mmap_mode="r")
    return drawn


def train_video_autoencoder(films: Frames, folder: Path, *, steps: int, seed: int, report: Report) -> AutoencoderKLWan:
    """Train on parts of clips; goes on where an earlier call stopped.

    Encoding and decoding are the class's own, a frame first and then four at a time, so that what is learned for one
    frame, for 9 and for 17 is what the pipelines do. Single frames come first, clips afterwards.

    Args:
        films: uint8 [N, 17, 64, 64, 3].
        folder: for the state.
        steps: in all.
        seed: initial weights, batches and noise.
        report: called with a line now and then.
    """
    torch.manual_seed(seed)
    model = build_video_autoencoder()
    stills = round(STILLS * steps)
    stages = (
        ("video_autoencoder_stills", _STILL_SHAPES, stills, STILL_RATE),
        ("video_autoencoder", _CLIP_SHAPES, steps - stills, CLIP_RATE),
    )
    for number, (name, shapes, count, rate) in enumerate(stages):

        def loss_of(step: int, number: int = number, shapes: Shapes = shapes) -> Tensor:
            rng = np.random.default_rng([seed, number, step])
            torch.manual_seed((seed * len(stages) + number) * 1_000_003 + step)
            clips = to_video(_cut(films, *shapes[step % len(shapes)], rng))
            return measure_loss(model, clips)

        with flat_convolutions():
            weights = fit(
                name,
                {"vae": model},
                loss_of,
                folder=folder,
                steps=count,
                peak_rate=rate,
                decay=0.998,
                weight_decay=1e-4,
                warm_up=100,
                save_every=100,
                report=report,
            )
        model.load_state_dict(dict(weights["vae"]))
    return model.eval()


def measure_loss(model: AutoencoderKLWan, clips: Tensor) -> Tensor:
    """Return how far clips are from themselves after a way through the autoencoder, and its latents from noise.

    Args:
        model: the autoencoder.
        clips: float32 [N, 3, F, 64, 64] in -1..1.
    """
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(clips).latent_dist
        decoded = model.decode(posterior.sample()).sample
    error = decoded.float() - clips
    exact = error.abs().mean() + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * _edges(error)
    loss: Tensor = exact + KL_WEIGHT * _divergence(posterior)
    return loss


@contextmanager
def flat_convolutions() -> Iterator[None]:
    """Compute causal convolutions in two dimensions where the third adds nothing: five times faster for stills.

    A single frame has zeros in place of what came before, so that only the newest slice of a kernel counts.
    """
    full = WanCausalConv3d.forward

    def forward(self: WanCausalConv3d, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        depth = self.kernel_size[0]
        if self.stride[0] > 1 or (depth > 1 and (x.shape[2] > 1 or cache_x is not None)):
            result: Tensor = full(self, x, cache_x)
            return result
        frames = nn.functional.pad(x.transpose(1, 2).flatten(0, 1), self._padding[:4])
        flat: Tensor = nn.functional.conv2d(frames, self.weight[:, :, -1], self.bias, self.stride[1:])
        return flat.view(len(x), x.shape[2], *flat.shape[1:]).transpose(1, 2)

    WanCausalConv3d.forward = forward
    try:
        yield
    finally:
        WanCausalConv3d.forward = full


def measure_latents(model: AutoencoderKLWan, films: Frames) -> None:
    """Let the autoencoder's configuration tell mean and standard deviation of each channel, measured on clips."""
    latents = encode_clips(model, films, normal=False).transpose(0, 1).flatten(1)
    model.register_to_config(latents_mean=latents.mean(1).tolist(), latents_std=latents.std(1).tolist())


@torch.no_grad()
def encode_clips(model: AutoencoderKLWan, clips: Frames, *, normal: bool = True) -> Tensor:
    """Return the means of the latents, float32 [N, 8, (F + 1) / 2, 16, 16].

    Args:
        model: the autoencoder.
        clips: uint8 [N, F, 64, 64, 3], F one more than a multiple of 4.
        normal: whether to shift and scale them as the pipelines do.
    """
    starts = range(0, len(clips), _BATCH)
    latents = torch.cat([model.encode(to_video(clips[at : at + _BATCH])).latent_dist.mean for at in starts])
    if not normal:
        return latents
    mean, deviation = (torch.tensor(v).view(-1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    return (latents - mean) / deviation


@torch.no_grad()
def redraw_clips(model: AutoencoderKLWan, clips: Frames) -> Frames:
    """Return clips after a way through the autoencoder and back."""
    parts = []
    for first in range(0, len(clips), _BATCH):
        latents = model.encode(to_video(clips[first : first + _BATCH])).latent_dist.mean
        pixels = model.decode(latents).sample.add(1).mul(127.5).round()
        parts.append(pixels.permute(0, 2, 3, 4, 1).byte().numpy())
    return np.concatenate(parts)


def measure_psnr(before: Frames, after: Frames) -> float:
    """Return the peak signal-to-noise ratio in decibels, over everything."""
    error = np.square(before.astype(np.float32) - after).mean()
    return float(10 * np.log10(255**2 / error))


def to_video(clips: Frames) -> Tensor:
    """Return uint8 [N, F, H, W, 3] as float32 [N, 3, F, H, W] in -1..1."""
    return torch.from_numpy(np.array(clips)).permute(0, 4, 1, 2, 3).float().div(127.5).sub(1).contiguous()


def _cut(films: Frames, frames: int, count: int, rng: np.random.Generator) -> Frames:
    """Return parts of some clips: consecutive frames, or every second one where there are enough."""
    parts = []
    for row in rng.integers(len(films), size=count):
        stride = int(rng.integers(1, 3)) if frames in (5, 9) else 1
        first = int(rng.integers(FRAMES - stride * (frames - 1)))
        parts.append(films[row, first : first + stride * frames : stride][:frames])
    return np.stack(parts)


def _edges(error: Tensor) -> Tensor:
    """Return the mean difference of neighbouring errors: blurred edges and flicker cost more than a shifted colour."""
    total = (error[..., 1:, :] - error[..., :-1, :]).abs().mean() + (error[..., 1:] - error[..., :-1]).abs().mean()
    return total + (error[:, :, 1:] - error[:, :, :-1]).abs().mean() if error.shape[2] > 1 else total


def _divergence(posterior: Any) -> Tensor:
    mean, logvar = posterior.mean, posterior.logvar
    divergence: Tensor = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return divergence
