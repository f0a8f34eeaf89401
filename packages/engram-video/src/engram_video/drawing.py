"""Drawing clips with a pipeline: the one path that `generate`, previews and the demo share.

Shapes: F frames, uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engram_video.clips import write_clip
from engram_video.families import WAN22
from engram_video.frames import check_frame_count, check_size
from engram_video.models import size_multiple
from engram_vision.drawing import Drawing
from engram_vision.quiet import quiet_libraries

__all__ = ["draw_clips", "read_length", "save_clip", "to_pixels"]

Pixels = npt.NDArray[np.uint8]


def draw_clips(
    pipeline: Any,
    drawings: Sequence[Drawing],
    *,
    steps: int,
    guidance: float,
    width: int,
    height: int,
    frames: int,
    negative: str = "",
    batch_size: int = 1,
    advance: Callable[[int], None] | None = None,
) -> list[Pixels]:
    """Return a clip for each drawing, with whatever is loaded into the pipeline.

    A clip depends on its prompt and seed. To compare two sets byte by byte, draw them in the same batches: matrix
    products of another shape may round differently.

    Args:
        pipeline: a `WanPipeline` on its device.
        drawings: what to draw.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        width: pixels.
        height: pixels.
        frames: F.
        negative: negative prompt.
        batch_size: clips drawn at once.
        advance: called with the number of clips that are done.

    Raises:
        InputError: the size or the number of frames is not one that the model can draw.
    """
    check_size(width, height, size_multiple(pipeline))
    check_frame_count(frames, pipeline.vae_scale_factor_temporal)
    clips: list[Pixels] = []
    for first in range(0, len(drawings), batch_size):
        batch = drawings[first : first + batch_size]
        # The noise comes from the CPU, so that a seed means the same clip on every device.
        generators = [torch.Generator("cpu").manual_seed(drawing.seed) for drawing in batch]
        with quiet_libraries():
            found = pipeline(
                [drawing.prompt for drawing in batch],
                negative_prompt=[negative] * len(batch),
                num_inference_steps=steps,
                guidance_scale=guidance,
                width=width,
                height=height,
                num_frames=frames,
                generator=generators,
                max_sequence_length=read_length(pipeline),
                output_type="np",
            ).frames
        clips += [to_pixels(clip) for clip in found]
        if advance is not None:
            advance(len(clips))
    return clips


def read_length(pipeline: Any) -> int:
    """Return how many tokens of a prompt the pipeline's encoder is given."""
    (part,) = WAN22.streams.values()
    return part.read_length(pipeline.tokenizer, pipeline.text_encoder)


def to_pixels(frames: npt.NDArray[np.floating[Any]]) -> Pixels:
    """Return frames in 0..1 as uint8."""
    pixels: Pixels = np.rint(np.clip(frames, 0, 1) * 255).astype(np.uint8)
    return pixels


def save_clip(clip: Pixels, path: Path, facts: Mapping[str, str], *, fps: int, overwrite: bool) -> None:
    """Write a clip with facts about it; it appears whole or not at all.

    Raises:
        TargetExistsError: the file exists and `overwrite` is false.
        AdapterWriteError: the file cannot be written.
    """
    write_clip(path, clip, fps, overwrite=overwrite, facts=facts)
