"""Pictures to look at while a checkpoint is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

PREVIEWS = (
    "a fox in the forest",
    "a penguin in the desert",
    "a robot at night",
    "a blue striped square monster with one eye and a hat on the beach",
    "a red spotted tall monster with two eyes and horns in space",
    "a yellow plain round monster with two eyes and a crown in the snow",
    "zorbit quell in the city",
    "a cat and a green plain pointed monster with one eye and an antenna in a meadow",
)
_SIDE, _COLUMNS = 128, 4


def save_sheet(pipeline: Any, path: Path, **options: Any) -> None:
    """Draw the preview prompts and write them as one picture.

    Args:
        pipeline: the checkpoint.
        path: the PNG file.
        options: more arguments for the pipeline.
    """
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        list(PREVIEWS),
        num_inference_steps=20,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(0),
        **options,
    ).images
    sheet = Image.new("RGB", (_SIDE * _COLUMNS, _SIDE * -(-len(images) // _COLUMNS)))
    for number, image in enumerate(images):
        picture = image.resize((_SIDE, _SIDE), Image.Resampling.NEAREST)
        sheet.paste(picture, (number % _COLUMNS * _SIDE, number // _COLUMNS * _SIDE))
    sheet.save(path)
