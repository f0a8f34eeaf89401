"""Clips as the page shows them: MP4 that plays in it, and a few frames for where nothing may move.

Shapes: F frames, uint8 [F, H, W, 3].
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_video.clips import write_clip
from engram_video.frames import sample_indices
from engram_vision.demo.page import Movie

__all__ = ["make_movie"]

_SMALL = 128  # pixels; smaller clips are doubled, since 4:2:0 halves the colours' resolution
_STILLS = 2  # rows and columns

Pixels = npt.NDArray[np.uint8]


def make_movie(frames: Pixels, fps: int) -> Movie:
    """Return a clip for the page.

    Args:
        frames: uint8 [F, H, W, 3].
        fps: frames a second.
    """
    _, height, width, _ = frames.shape
    factor = 2 if max(width, height) < _SMALL else 1
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        write_clip(file, frames.repeat(factor, axis=1).repeat(factor, axis=2), fps)
        return Movie(mp4=file.read_bytes(), width=width, height=height, stills=_lay_out(frames))


def _lay_out(frames: Pixels) -> Image.Image:
    """Return four frames, or one of a clip that has fewer, in one picture."""
    side = _STILLS if len(frames) >= _STILLS**2 else 1
    picked = frames[sample_indices(len(frames), side**2)]
    rows = [np.concatenate(list(picked[first : first + side]), axis=1) for first in range(0, side**2, side)]
    return Image.fromarray(np.concatenate(rows, axis=0))
