"""`engram generate` for clips: prompts and seeds to MP4 files, with and without adapters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_core import GenerateReport, Watcher
from engram_video.drawing import draw_clips, save_clip
from engram_video.models import check_shape
from engram_video.settings import Wan22GenerateSettings
from engram_video.sheet import draw_sheet
from engram_vision import generation
from engram_vision.drawing import Drawing

__all__ = ["generate"]

Pixels = npt.NDArray[np.uint8]


class ClipCanvas:
    """Draws clips; see `engram_vision.generation.Canvas`."""

    suffix, overview = ".mp4", "sheet.png"

    def __init__(self, settings: Wan22GenerateSettings) -> None:
        """Take the frames a second of the files."""
        self._fps = settings.fps

    def check(self, settings: Wan22GenerateSettings) -> None:
        """Refuse sizes and lengths that do not suit the model."""
        check_shape(settings.model, settings.width or 0, settings.height or 0, settings.frames)

    def draw(self, pipeline: Any, drawings: Sequence[Drawing], settings: Wan22GenerateSettings) -> list[Pixels]:
        """Return the clips."""
        return draw_clips(
            pipeline,
            drawings,
            steps=settings.steps,
            guidance=settings.guidance,
            width=settings.width or 0,
            height=settings.height or 0,
            frames=settings.frames,
            negative=settings.negative,
            batch_size=len(drawings),
        )

    def save(self, thing: Pixels, path: Path, facts: Mapping[str, str], *, overwrite: bool) -> None:
        """Write a clip."""
        save_clip(thing, path, facts, fps=self._fps, overwrite=overwrite)

    def compare(self, variants: Sequence[str], rows: Sequence[tuple[str, Sequence[Pixels]]]) -> Image.Image:
        """Return a contact sheet: for each prompt a row of frames for every variant."""
        strips = [
            (f"{variant}: {label}", clip)
            for label, clips in rows
            for variant, clip in zip(variants, clips, strict=True)
        ]
        return draw_sheet(strips)


def generate(
    settings: Wan22GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
) -> GenerateReport:
    """Draw every prompt with every seed; see `engram_vision.generation.generate`, whose errors are these.

    Args:
        settings: what to draw.
        overwrite: replace files of the same names.
        watcher: hears how it goes, and which triggers do not fire.
    """
    return generation.generate(settings, overwrite=overwrite, watcher=watcher, canvas=ClipCanvas(settings))
