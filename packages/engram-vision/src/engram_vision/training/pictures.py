"""Training on pictures: how they are read, encoded, and drawn as previews.

Shapes: V views (pictures, mirrored and cropped), latents [V, c, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from engram_core import InputError, Watcher
from engram_vision.conditions import Conditioner
from engram_vision.dataset import CaptionedImage, read_dataset
from engram_vision.drawing import Drawing, draw
from engram_vision.generation import save_png
from engram_vision.images import Note, fit_square, ignore_note, load_picture
from engram_vision.memory import Estimate, estimate_memory, views_at_once
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import ImageTrainSettings, without_streams
from engram_vision.training.frozen import Latents, digest_parts
from engram_vision.training.objectives import Objective, make_objective

__all__ = ["PICTURES", "Pictures", "encode_pictures", "encode_views"]

Advance = Callable[[int], None]

_PREVIEW_STEPS, _PREVIEW_GUIDANCE = 25, 5.0


class Pictures:
    """What training must know of pictures; see `engram_vision.training.medium.Medium`."""

    name = "pictures"

    def read(self, folder: Path, settings: ImageTrainSettings, watcher: Watcher) -> Sequence[CaptionedImage]:
        """Return a folder's pictures with their captions."""
        return read_dataset(folder, settings.trigger, insert_trigger=settings.insert_trigger, note=watcher.note)

    def encode(
        self,
        items: Sequence[CaptionedImage],
        settings: ImageTrainSettings,
        pipeline: Any,
        device: torch.device,
        watcher: Watcher,
        *,
        learning: bool,
    ) -> Latents:
        """Return the pictures' latents, of those to learn from with mirror images and crops as the settings say."""
        flip, crops = (settings.flip, settings.crops) if learning else (False, 1)
        watcher.begin("encoding pictures and captions", len(items) * crops * (2 if flip else 1))
        return encode_pictures(
            pipeline.vae,
            items,
            resolution=_resolution(settings, pipeline),
            flip=flip,
            crops=crops,
            seed=settings.seed,
            device=device,
            advance=watcher.advance,
            note=watcher.note,
        )

    def conditioner(
        self, settings: ImageTrainSettings, pipeline: Any
    ) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Any]]:
        """Return what makes the denoiser's keyword arguments out of text states."""
        return Conditioner(settings.family, pipeline, _resolution(settings, pipeline))

    def objective(self, settings: ImageTrainSettings, pipeline: Any) -> Objective:
        """Return the loss."""
        return make_objective(settings, pipeline)

    def estimate(self, settings: ImageTrainSettings) -> Estimate | None:
        """Return how much memory a run will need."""
        return estimate_memory(
            settings.family,
            settings.model,
            precision=settings.precision,
            resolution=settings.resolution,
            batch_size=settings.batch_size,
            gradient_checkpointing=settings.gradient_checkpointing,
            low_memory=settings.low_memory,
            without=without_streams(settings),
        )

    def preview(
        self, prompts: Sequence[str], settings: ImageTrainSettings, pipeline: Any, folder: Path, step: int
    ) -> None:
        """Draw prompts with what is loaded, and write the pictures to a folder."""
        images = draw(
            pipeline,
            [Drawing(prompt=prompt, seed=settings.seed) for prompt in prompts],
            steps=_PREVIEW_STEPS,
            guidance=_PREVIEW_GUIDANCE,
        )
        for number, (image, prompt) in enumerate(zip(images, prompts, strict=True)):
            facts = {"prompt": prompt, "seed": str(settings.seed), "step": str(step)}
            save_png(image, folder / f"step-{step:06d}-{number}.png", facts, overwrite=True)


PICTURES = Pictures()


def encode_pictures(
    vae: Any,
    data: Sequence[CaptionedImage],
    *,
    resolution: int,
    flip: bool,
    crops: int,
    seed: int,
    device: torch.device,
    advance: Advance,
    note: Note = ignore_note,
) -> Latents:
    """Return the latents of a data set's pictures.

    Args:
        vae: the pipeline's.
        data: pictures.
        resolution: pixels a side.
        flip: also the mirror images.
        crops: 1 for the centre alone, else so many random squares of each picture.
        seed: of the crops.
        device: where the VAE computes; it returns to the host.
        advance: called with the number of views that are encoded.
        note: told about pictures that must be enlarged.

    Raises:
        InputError: a picture cannot be read.
    """
    groups = [
        _views(item, resolution, flip, crops, np.random.default_rng([seed, n]), note) for n, item in enumerate(data)
    ]
    views = [view for group in groups for view in group]
    mean, std = encode_views(vae, views, device, advance)
    return Latents(
        mean=mean,
        std=std,
        owners=[number for number, group in enumerate(groups) for _ in group],
        digest=digest_parts(view.tobytes() for view in views),
        kind="pictures",
    )


@torch.no_grad()
def encode_views(
    vae: Any, views: Sequence[Image.Image], device: torch.device, advance: Advance | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the scaled latents of RGB pictures, float32 [V, c, h, w] on the host."""
    before, dtype = vae.device, vae.dtype
    # Some VAEs overflow in half precision and say so.
    with quiet_libraries():  # diffusers warns of every cast
        vae.to(device, torch.float32 if vae.config.force_upcast and dtype == torch.float16 else dtype)
    parts = []
    size = views_at_once(views[0].width)
    for first in range(0, len(views), size):
        pixels = np.stack([np.asarray(view) for view in views[first : first + size]])
        inputs = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(127.5).sub(1)
        latents = vae.encode(inputs.to(vae.device, vae.dtype)).latent_dist
        parts.append((latents.mean.float().cpu(), latents.std.float().cpu()))
        if advance is not None:
            advance(min(len(views), first + size))
    with quiet_libraries():
        vae.to(before, dtype)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    mean, std = (torch.cat(group) for group in zip(*parts, strict=True))
    return (mean - shift) * scale, std * scale


def _resolution(settings: ImageTrainSettings, pipeline: Any) -> int:
    """Return the pixels a side to train with."""
    family, asked = settings.family, settings.resolution
    factor, config = int(pipeline.vae_scale_factor), getattr(pipeline, family.denoiser).config
    # The U-Net halves the latents between its blocks; the transformer cuts them into patches.
    step = 2 ** (len(config.block_out_channels) - 1) if family.denoiser == "unet" else config.patch_size
    if asked is not None and asked % (factor * step):
        raise InputError(f"resolution is {asked}, expected a multiple of {factor * step}")
    return asked or int(config.sample_size) * factor


def _views(
    item: CaptionedImage, resolution: int, flip: bool, crops: int, rng: np.random.Generator, note: Note
) -> list[Image.Image]:
    picture = load_picture(item.path, resolution=resolution, note=note)
    places = [(0.5, 0.5)] if crops == 1 else [(float(x), float(y)) for x, y in rng.random((crops, 2))]
    views = [fit_square(picture, resolution, place) for place in places]
    return [form for view in views for form in ((view, ImageOps.mirror(view)) if flip else (view,))]
