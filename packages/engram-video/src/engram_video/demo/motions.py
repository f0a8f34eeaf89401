"""The motions of the small world: how prompts name them, which of them clips show first, and their judge.

The judge is a small classifier, trained by `recipes/small_world` on drawn clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import ResNetForImageClassification

from engram_core import InputError
from engram_vision.quiet import quiet_libraries

__all__ = ["LOOKS", "MOTION_PHRASES", "MotionJudge", "look_at", "new_motions", "shown_motions"]

MOTION_PHRASES: Mapping[str, str] = {
    "right": "walking to the right",
    "left": "walking to the left",
    "jump": "jumping",
    "sway": "swaying",
    "closer": "coming closer",
    "still": "standing still",
}
"""Motion to the phrase that names it, in the order of the judge's outputs."""

LOOKS = 9
"""Frames that the judge looks at, evenly spread."""

# A character's five clips show four motions; the two that are left are new. What is new to one, the other shows.
_SHOWN = (("jump", "right", "sway", "still", "jump"), ("left", "closer", "sway", "still", "left"))
_SIDE = 64

Pixels = npt.NDArray[np.uint8]


def shown_motions(number: int) -> tuple[str, ...]:
    """Return the motions of the clips that a character is learned from, one for each of its pictures in turn.

    Args:
        number: of the character, from 0.
    """
    return _SHOWN[number % len(_SHOWN)]


def new_motions(number: int) -> tuple[str, ...]:
    """Return the motions that those clips do not show.

    Args:
        number: of the character, from 0.
    """
    return tuple(motion for motion in MOTION_PHRASES if motion not in shown_motions(number))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MotionJudge:
    """Tells the motion of a clip.

    Attributes:
        model: over the grey frames of a clip, as channels.
    """

    model: ResNetForImageClassification

    @classmethod
    def load(cls, folder: Path) -> MotionJudge:
        """Load a judge from the folder that the recipe wrote.

        Raises:
            InputError: the folder is not a judge of these motions.
        """
        try:
            with quiet_libraries():
                model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: is not a judge: {type(error).__name__}: {error}") from None
        told = (model.config.num_channels, model.config.num_labels)
        if told != (LOOKS, len(MOTION_PHRASES)):
            raise InputError(
                f"{folder}: tells {told[1]} motions by {told[0]} frames, expected {len(MOTION_PHRASES)} by {LOOKS}; "
                "run its recipe again"
            )
        return cls(model=model.requires_grad_(False).train(False))

    @torch.no_grad()
    def name_motions(self, clips: Sequence[Pixels]) -> list[str]:
        """Return the motion of each clip, uint8 [F, 64, 64, 3].

        Raises:
            InputError: a clip has another size.
        """
        if not clips:
            return []
        for clip in clips:
            if clip.shape[1:] != (_SIDE, _SIDE, 3):
                raise InputError(f"a clip is {list(clip.shape)}, the judge of motions reads [F, {_SIDE}, {_SIDE}, 3]")
        looks = np.stack([look_at(clip) for clip in clips])
        logits = self.model(torch.from_numpy(looks).float().div(127.5).sub(1)).logits
        names = tuple(MOTION_PHRASES)
        return [names[index] for index in logits.argmax(-1).tolist()]


def look_at(clip: Pixels) -> Pixels:
    """Return what the judge sees of a clip, uint8 [F, H, W, 3]: nine of its frames without their colours, [9, H, W]."""
    places = np.linspace(0, len(clip) - 1, LOOKS).round().astype(np.int64)
    means: Pixels = clip[places].mean(axis=-1).round().astype(np.uint8)
    return means
