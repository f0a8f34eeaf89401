"""What a clip shows, as the judges of the small world name it, and how it hangs together.

Shapes: F frames, uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from checkpoint import Checkpoint
from PIL import Image

from engram_video.demo.motions import MotionJudge
from engram_video.evaluation.warping import has_flow, measure_warping
from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.judge import Judge
from engram_vision.evaluation.measures import measure_consistency, measure_drop, measure_identity
from engram_vision.features import Features, JudgeModel, read_references

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A clip to draw, and what it has to show.

    Attributes:
        prompt, seed: of the clip.
        scene, motion: what the prompt asks for.
    """

    prompt: str
    seed: int
    scene: str
    motion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """The figures of one clip.

    Attributes:
        identity: share of frames that show the character, every attribute right.
        identity_drop: that of the first quarter less that of the last.
        likeness: mean cosine of the frames' features to those of the character's pictures.
        likeness_drop: that of the first quarter less that of the last.
        consistency: mean cosine of neighbouring frames' features.
        warping: error of frames warped onto one another; None where it cannot be measured.
        flow: mean length of the optical flow in sides of a frame; None likewise.
        scene, motion: whether most frames show the scene, and the clip the motion, 1 or 0.
    """

    identity: float
    identity_drop: float
    likeness: float
    likeness_drop: float
    consistency: float
    warping: float | None
    flow: float | None
    scene: float
    motion: float


class Judges:
    """All that looks at clips."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._judge, self._motions = Judge.load(checkpoint.judge), MotionJudge.load(checkpoint.motions)
        self._features = JudgeModel(self._judge)
        self._references: dict[str, Features] = {}

    def score(self, character: DemoCharacter, asked: Sequence[Asked], clips: Sequence[Pixels]) -> list[Score]:
        """Return each clip's figures."""
        motions = self._motions.name_motions(clips)
        return [
            self._score(character, one, clip, motion) for one, clip, motion in zip(asked, clips, motions, strict=True)
        ]

    def share_showing(self, character: DemoCharacter, clips: Sequence[Pixels]) -> float:
        """Return the share of all frames that show a character."""
        seen = [flag for clip in clips for flag in self._look_for(character, _pictures(clip))]
        return sum(seen) / len(seen)

    def _score(self, character: DemoCharacter, asked: Asked, clip: Pixels, motion: str) -> Score:
        pictures = _pictures(clip)
        seen = np.array(self._look_for(character, pictures), float)
        features = self._features.embed(pictures)
        if character.name not in self._references:
            self._references[character.name] = self._features.embed(read_references(character.folder))
        # One after the other: likeness, and its drop.
        likeness, drop = measure_identity("judge", features, self._references[character.name])[0]
        (consistency,) = measure_consistency("judge", features)
        warping = measure_warping(clip) if has_flow() else None
        scene, _ = Counter(self._judge.name_scenes(pictures)).most_common(1)[0]
        return Score(
            identity=float(seen.mean()),
            identity_drop=measure_drop(seen),
            likeness=likeness.value,
            likeness_drop=drop.value,
            consistency=consistency.value,
            warping=None if warping is None else warping.error,
            flow=None if warping is None else warping.motion,
            scene=float(scene == asked.scene),
            motion=float(motion == asked.motion),
        )

    def _look_for(self, character: DemoCharacter, pictures: Sequence[Image.Image]) -> list[bool]:
        return [character.is_seen(named) for named in self._judge.name_subjects(pictures)]


def compare_clips(one: Pixels, other: Pixels) -> float:
    """Return the mean absolute difference of two clips, in 0..1."""
    return float(np.abs(one.astype(np.int16) - other.astype(np.int16)).mean() / 255)


def _pictures(clip: Pixels) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in clip]
