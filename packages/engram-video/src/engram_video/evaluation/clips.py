"""`engram eval` for clips: what differs from pictures; the rest is `engram_vision.evaluation`.

Shapes: F frames, uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engram_core import EvaluateReport, InputError, Watcher
from engram_video.clips import SUFFIXES as CLIP_SUFFIXES
from engram_video.clips import probe_clip, read_clip, read_facts
from engram_video.evaluation.warping import check_flow, has_flow, measure_warping
from engram_video.generation import ClipCanvas
from engram_video.settings import Wan22EvaluateSettings, Wan22GenerateSettings
from engram_video.shipped import judge_folder
from engram_vision.evaluation import run
from engram_vision.evaluation.measures import Figure
from engram_vision.evaluation.shown import Shown, describe_file, open_files, open_picture
from engram_vision.images import SUFFIXES as PICTURE_SUFFIXES
from engram_vision.images import is_animated, show_path

__all__ = ["CLIPS", "evaluate"]

_FLOW = "optical flow"

Pixels = npt.NDArray[np.uint8]


class Clips:
    """Clips, and pictures beside them; see `engram_vision.evaluation.kind.Kind`."""

    name = "clips"

    def check(self, settings: Wan22EvaluateSettings, watcher: Watcher) -> None:
        """Refuse the warping error, or tell that it is left out, where its library is missing."""
        if settings.warping:
            check_flow()
        elif settings.warping is None and not has_flow():
            watcher.note("the warping error is left out: OpenCV is not installed (opencv-python-headless)")

    def canvas(self, drawing: Wan22GenerateSettings) -> ClipCanvas:
        """Return what draws clips."""
        return ClipCanvas(drawing)

    def to_frames(self, thing: Pixels) -> Pixels:
        """Return a clip's frames."""
        return thing

    def open(self, places: Sequence[Path]) -> list[Shown]:
        """Return clips on disk, and of folders without any the pictures."""
        return open_files(places, _find, _open)

    def judge_folder(self) -> Path:
        """Return where the judge of clips is."""
        return judge_folder()

    def measure(self, frames: Pixels, settings: Wan22EvaluateSettings) -> list[Figure]:
        """Return the warping error and what it must be read with; nothing of a single frame."""
        warps = has_flow() if settings.warping is None else settings.warping
        warping = measure_warping(frames) if warps else None
        if warping is None:
            return []
        figures = [
            Figure(subject=_FLOW, metric="motion", value=warping.motion, higher_is_better=None),
            Figure(subject=_FLOW, metric="pixels compared", value=warping.coverage, higher_is_better=None),
        ]
        if warping.error is None:
            return figures
        return [Figure(subject=_FLOW, metric="warping error", value=warping.error, higher_is_better=False), *figures]


CLIPS = Clips()


def evaluate(
    settings: Wan22EvaluateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
) -> EvaluateReport:
    """Measure clips; see `engram_vision.evaluation.run.evaluate`, whose errors are these.

    Args:
        settings: what to measure, on what and with what.
        overwrite: replace files of the same names in the output folder.
        watcher: hears how it goes.
    """
    return run.evaluate(settings, overwrite=overwrite, watcher=watcher, kind=CLIPS)


def _find(place: Path, files: Sequence[Path]) -> list[Path]:
    clips = [file for file in files if file.suffix.lower() in CLIP_SUFFIXES and file.suffix.lower() != ".gif"]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES]
    if not clips and not pictures:
        raise InputError(
            f"{show_path(place)}: holds neither clips ({', '.join(CLIP_SUFFIXES)}) nor pictures "
            f"({', '.join(PICTURE_SUFFIXES)}); give a folder that does"
        )
    return clips or pictures


def _open(file: Path, caption: str | None) -> Shown:
    suffix = file.suffix.lower()
    if suffix in PICTURE_SUFFIXES and (suffix != ".gif" or not is_animated(file)):
        return open_picture(file, caption)
    probe_clip(file)
    return describe_file(file, read_facts(file), caption, lambda: read_clip(file).frames)
