"""What evaluation must know of what a family draws: pictures here, clips in engram-video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from engram_core import Watcher
from engram_vision.evaluation.measures import Figure
from engram_vision.evaluation.shown import Shown, find_pictures, open_files, open_picture
from engram_vision.generation import CANVAS, Canvas
from engram_vision.shipped import judge_folder

__all__ = ["PICTURES", "Kind"]

Pixels = npt.NDArray[np.uint8]


class Kind(Protocol):
    """Draws, reads and measures one kind of thing. `settings` are always those of its own families."""

    @property
    def name(self) -> str:
        """What the things are called, in the plural."""

    def check(self, settings: Any, watcher: Watcher) -> None:
        """Refuse what cannot be measured, and tell what will not be; raises InputError."""

    def canvas(self, drawing: Any) -> Canvas:
        """Return what draws with settings for generating."""

    def to_frames(self, thing: Any) -> Pixels:
        """Return what was drawn, uint8 [F, H, W, 3]."""

    def open(self, places: Sequence[Path]) -> list[Shown]:
        """Return what is on disk; raises InputError when something cannot be measured."""

    def judge_folder(self) -> Path:
        """Return where the judge is of what `tiny` draws; raises InputError when it is missing."""

    def measure(self, frames: Pixels, settings: Any) -> list[Figure]:
        """Return the figures that need no model."""


class Pictures:
    """Pictures, which are clips of one frame."""

    name = "pictures"

    def check(self, settings: Any, watcher: Watcher) -> None:
        """Everything can be measured."""

    def canvas(self, drawing: Any) -> Canvas:  # noqa: ARG002
        """Return what draws pictures."""
        return CANVAS

    def to_frames(self, thing: Any) -> Pixels:
        """Return a picture, uint8 [1, H, W, 3]."""
        return np.asarray(thing.convert("RGB"))[None]

    def open(self, places: Sequence[Path]) -> list[Shown]:
        """Return pictures on disk."""
        return open_files(places, find_pictures, open_picture)

    def judge_folder(self) -> Path:
        """Return where the judge of pictures is."""
        return judge_folder()

    def measure(self, frames: Pixels, settings: Any) -> list[Figure]:  # noqa: ARG002
        """Return nothing: all figures of pictures need a model."""
        return []


PICTURES: Kind = Pictures()
