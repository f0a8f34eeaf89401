"""Clips to look at: a row for each, frames from left to right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from recipes.small_world.motion import SHORT, Frames
from recipes.small_world.video_transformer import MAX_LENGTH
from recipes.small_world.world import SIZE

STEPS, GUIDANCE = 20, 4.0
PREVIEWS = (
    "a fox jumping in the forest",
    "a penguin walking to the right in the desert",
    "a robot standing still at night",
    "a blue striped square monster with one eye and a hat coming closer on the beach",
    "a red spotted tall monster with two eyes and horns walking to the left in space",
    "a yellow plain round monster with two eyes and a crown swaying in the snow",
    "zorbit quell in the city",
    "a cat and a green plain pointed monster with one eye and an antenna jumping in a meadow",
)


def film(pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], *, frames: int = SHORT, **options: Any) -> Frames:
    """Return clips of a pipeline, uint8 [N, F, 64, 64, 3].

    Args:
        pipeline: for text or for a picture.
        prompts: N of them.
        seeds: of the noise of each.
        frames: of each clip.
        options: more arguments for the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    arguments: dict[str, Any] = {
        "prompt": list(prompts),
        "height": SIZE,
        "width": SIZE,
        "num_frames": frames,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "generator": [torch.Generator().manual_seed(seed) for seed in seeds],
        "output_type": "np",
        "max_sequence_length": MAX_LENGTH,
    }
    clips: Frames = np.round(255 * pipeline(**arguments | options).frames).astype(np.uint8)
    return clips


def save_clip_sheet(pipeline: Any, path: Path) -> None:
    """Film the preview prompts and write every second frame as one picture."""
    save_rows(film(pipeline, PREVIEWS, [0] * len(PREVIEWS)), path)


def save_rows(clips: Frames, path: Path) -> None:
    """Write every second frame of clips, uint8 [N, F, H, W, 3], as one picture."""
    rows = [np.concatenate(list(clip[::2]), axis=1) for clip in clips]
    sheet = Image.fromarray(np.concatenate(rows))
    sheet.resize((sheet.width * 3 // 2, sheet.height * 3 // 2), Image.Resampling.BILINEAR).save(path)
