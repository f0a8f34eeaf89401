"""Training on clips: how they are read, encoded, and drawn as previews.

Shapes: V clips, F frames, latents [V, c, f, h, w].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from torch import Tensor

from engram_core import TrainReport, Watcher
from engram_video.clips import read_clip
from engram_video.dataset import CaptionedClip, read_clips
from engram_video.drawing import draw_clips, save_clip
from engram_video.frames import sample_indices
from engram_video.memory import estimate_memory
from engram_video.models import check_model, check_shape
from engram_video.settings import Wan22TrainSettings
from engram_video.training.flow import ClipFlow
from engram_vision.drawing import Drawing
from engram_vision.memory import Estimate
from engram_vision.training import trainer
from engram_vision.training.frozen import Latents, digest_parts

__all__ = ["CLIPS", "Clips", "encode_clips", "train", "train_together"]

_PREVIEW_STEPS, _PREVIEW_GUIDANCE, _PREVIEW_FPS = 25, 5.0, 8

Pixels = npt.NDArray[np.uint8]


class Clips:
    """What training must know of clips; see `engram_vision.training.medium.Medium`."""

    name = "clips"

    def read(self, folder: Path, settings: Wan22TrainSettings, watcher: Watcher) -> Sequence[CaptionedClip]:
        """Return a folder's clips with their captions, as the pipeline would clean them."""
        check_model(settings.model)
        check_shape(settings.model, settings.width, settings.height, settings.frames)
        clips = read_clips(
            folder,
            settings.trigger,
            insert_trigger=settings.insert_trigger,
            frames=settings.frames,
            size=(settings.width, settings.height),
            note=watcher.note,
        )
        return [replace(clip, caption=prompt_clean(clip.caption)) for clip in clips]

    def encode(
        self,
        items: Sequence[CaptionedClip],
        settings: Wan22TrainSettings,
        pipeline: Any,
        device: torch.device,
        watcher: Watcher,
        *,
        learning: bool,  # noqa: ARG002 - clips are neither mirrored nor cropped at random
    ) -> Latents:
        """Return the clips' latents."""
        watcher.begin("encoding clips and captions", len(items))
        clips = [_sample(item, settings) for item in items]
        mean, std = encode_clips(pipeline.vae, clips, device, watcher.advance)
        digest = digest_parts(clip.tobytes() for clip in clips)
        return Latents(mean=mean, std=std, owners=range(len(items)), digest=digest, kind=self.name)

    def conditioner(
        self,
        settings: Wan22TrainSettings,  # noqa: ARG002
        pipeline: Any,  # noqa: ARG002
    ) -> Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], dict[str, Any]]:
        """Return what makes the transformer's keyword arguments out of text states."""
        return lambda states, _: {"encoder_hidden_states": states["umt5"]}

    def objective(self, settings: Wan22TrainSettings, pipeline: Any) -> ClipFlow:  # noqa: ARG002
        """Return the loss."""
        return ClipFlow(pipeline)

    def estimate(self, settings: Wan22TrainSettings) -> Estimate | None:
        """Return how much memory a run will need."""
        return estimate_memory(settings)

    def preview(
        self, prompts: Sequence[str], settings: Wan22TrainSettings, pipeline: Any, folder: Path, step: int
    ) -> None:
        """Draw prompts with what is loaded, and write the clips to a folder."""
        clips = draw_clips(
            pipeline,
            [Drawing(prompt=prompt, seed=settings.seed) for prompt in prompts],
            steps=_PREVIEW_STEPS,
            guidance=_PREVIEW_GUIDANCE,
            width=settings.width,
            height=settings.height,
            frames=settings.frames,
        )
        for number, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
            facts = {"prompt": prompt, "seed": str(settings.seed), "step": str(step)}
            save_clip(clip, folder / f"step-{step:06d}-{number}.mp4", facts, fps=_PREVIEW_FPS, overwrite=True)


CLIPS = Clips()


def train(
    settings: Wan22TrainSettings, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
) -> TrainReport:
    """Train one concept from clips; see `engram_vision.training.trainer.train`, whose errors are these.

    Args:
        settings: what to train, on what and how.
        resume: go on with an interrupted run.
        overwrite: replace the adapter file, and begin anew in a run folder that is in use.
        watcher: hears how it goes.
    """
    return trainer.train(settings, resume=resume, overwrite=overwrite, watcher=watcher, medium=CLIPS)


def train_together(
    settings: Sequence[Wan22TrainSettings],
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> list[TrainReport]:
    """Train several concepts from clips at once; see `engram_vision.training.trainer.train_together`.

    Args:
        settings: of each concept.
        resume: go on with interrupted runs.
        overwrite: as for `train`.
        watcher: hears how it goes.
    """
    return trainer.train_together(settings, resume=resume, overwrite=overwrite, watcher=watcher, medium=CLIPS)


@torch.no_grad()
def encode_clips(
    vae: Any, clips: Sequence[Pixels], device: torch.device, advance: Callable[[int], None] | None = None
) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of the latents of clips, float32 [V, c, f, h, w] on the host.

    Args:
        vae: an `AutoencoderKLWan`; it returns to where it was.
        clips: uint8 [F, H, W, 3] each, of one shape.
        device: where to compute.
        advance: called with the number of clips that are encoded.
    """
    before = vae.device
    vae.to(device)
    shape = (1, vae.config.z_dim, 1, 1, 1)
    shift, scale = (torch.tensor(vae.config[name]).view(shape) for name in ("latents_mean", "latents_std"))
    parts = []
    for done, clip in enumerate(clips, start=1):  # one at a time: a single one fills the device
        pixels = torch.from_numpy(clip).permute(3, 0, 1, 2).unsqueeze(0).float().div(127.5).sub(1)
        found = vae.encode(pixels.to(device, vae.dtype)).latent_dist
        mean, std = found.mean.float().cpu(), found.std.float().cpu()
        parts.append(((mean - shift) / scale, std / scale))
        if advance is not None:
            advance(done)
    vae.to(before)
    means, stds = zip(*parts, strict=True)
    return torch.cat(means), torch.cat(stds)


def _sample(item: CaptionedClip, settings: Wan22TrainSettings) -> Pixels:
    """Return the frames that are learned from, uint8 [F, H, W, 3]."""
    indices = sample_indices(item.info.frames, settings.frames)
    return read_clip(item.path, frames=indices, size=(settings.width, settings.height)).frames
