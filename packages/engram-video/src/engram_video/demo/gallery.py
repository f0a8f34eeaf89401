"""The clips of the demo: drawn with and without adapters, compared, judged, and laid out in sections.

Shapes: F frames, uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engram_core import Adapter, PromptAudit, Watcher
from engram_video.demo.measures import Measures, is_mostly
from engram_video.demo.motions import MOTION_PHRASES, MotionJudge, new_motions
from engram_video.demo.movies import make_movie
from engram_video.drawing import draw_clips, read_length
from engram_video.frames import sample_indices
from engram_vision.demo.characters import DemoCharacter, describe_subject
from engram_vision.demo.judge import Judge
from engram_vision.demo.measures import Tally
from engram_vision.demo.page import Movie, Picture, Row, Section
from engram_vision.demo.stage import SIDES, ask_for_pairs, compare_states, is_same, loaded, make_row
from engram_vision.drawing import Drawing
from engram_vision.loading import pipeline_tokenizers

__all__ = ["Gallery", "Plan", "tell_who"]

_AT_ONCE = 256  # frames that a judge looks at
# Without a trigger: other subjects, words that describe the characters, and single words of their names.
_CONTROLS = (
    "a fox jumping in the forest",
    "a robot walking to the left at night",
    "a cat and a penguin swaying in the snow",
    "a purple spotted round monster with one eye and horns jumping on the beach",
    "a green striped tall monster with two eyes and a crown swaying in space",
    "zorbit walking to the right in the city",
    "a quell coming closer under water",
    "wumble fenny standing still in a meadow",
    "in the desert",
    "",
)

Pixels = npt.NDArray[np.uint8]
Named = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is drawn.

    Attributes:
        seeds: clips of each prompt with one name.
        scenes: new scenes of each character, at most.
        motions: new motions in each of them, at most.
        pairs: scenes with both characters, at most.
        controls: prompts without a trigger, at most.
    """

    seeds: int = 3
    scenes: int = 5
    motions: int = 2
    pairs: int = 5
    controls: int = len(_CONTROLS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shot:
    """A clip to draw of one character, and what it has to show.

    Attributes:
        scene, motion: what the prompt asks for.
        drawing: by the character's name.
        described: the same with its looks in words.
        is_shown: whether it is on the page; the figures count all.
    """

    scene: str
    motion: str
    drawing: Drawing
    described: Drawing
    is_shown: bool


class Gallery:
    """Draws with one pipeline and counts what it finds in `measures`."""

    def __init__(
        self,
        pipeline: Any,
        judge: Judge,
        motions: MotionJudge,
        merged: Adapter,
        *,
        look: Mapping[str, Any],
        plan: Plan,
        seed: int,
        watcher: Watcher,
    ) -> None:
        """Prepare to draw.

        Args:
            pipeline: the tiny checkpoint.
            judge: names what a frame shows.
            motions: names what a clip shows.
            merged: all characters in one adapter.
            look: how to draw, as `tiny_generate` has it.
            plan: how much to draw.
            seed: of the first clip of each prompt.
            watcher: hears how many clips are drawn.
        """
        self.measures = Measures()
        self._pipeline, self._judge, self._motions, self._merged = pipeline, judge, motions, merged
        self._audit = PromptAudit(merged, pipeline_tokenizers(pipeline))
        names = ("steps", "guidance", "width", "height", "frames", "batch_size")
        self._look, self._fps = {name: look[name] for name in names}, int(look["fps"])
        self._plan, self._seed, self._watcher, self._done = plan, seed, watcher, 0

    def draw(
        self, characters: Sequence[DemoCharacter], adapters: Mapping[str, Adapter], phrases: Mapping[str, str]
    ) -> tuple[Section, ...]:
        """Return every section of the page.

        Args:
            characters: the two that were learned.
            adapters: their own adapters by name.
            phrases: each scene's phrase.
        """
        shots = [self._list_shots(number, one, phrases) for number, one in enumerate(characters)]
        names = list(phrases)
        picked = [names[index] for index in sample_indices(len(names), min(self._plan.pairs, len(names)))]
        scenes = {name: phrases[name] for name in picked}
        controls = _CONTROLS[: self._plan.controls]
        self._watcher.begin("drawing", 4 * sum(map(len, shots)) + 3 * 2 * len(scenes) + 2 * len(controls))
        rows = [
            row
            for one, each in zip(characters, shots, strict=True)
            for row in self._draw_alone(one, adapters[one.name], each)
        ]
        alone = Section(
            title="New scenes and motions",
            text=(
                "The scenes that a character's five pictures did not show, and motions that its clips did not show. "
                "The name recalls the character, and the rest of the prompt still decides scene and motion. The "
                "merged file holds both characters and draws the same."
                f"\n\nOf each scene one clip of {self._plan.motions * self._plan.seeds} is shown, chosen beforehand; "
                "the figures count them all."
            ),
            columns=("base", "engram", "merged"),
            rows=tuple(rows),
        )
        return alone, self._draw_pairs(characters, scenes), self._draw_controls(controls)

    def judge_made(self, character: DemoCharacter, clips: Sequence[Pixels]) -> None:
        """Count which of the clips that a character was learned from show it."""
        for named in self._name_subjects(clips):
            self.measures.made.add(is_mostly([character.is_seen(frame) for frame in named]))

    def make_movie(self, clip: Pixels) -> Movie:
        """Return a clip for the page."""
        return make_movie(clip, self._fps)

    def _list_shots(self, number: int, character: DemoCharacter, phrases: Mapping[str, str]) -> list[_Shot]:
        """Return what to draw of a character: each new scene with each new motion."""
        motions = new_motions(number)[: self._plan.motions]
        scenes = [scene for scene in phrases if scene not in character.shown][: self._plan.scenes]
        shots = []
        for place, scene in enumerate(scenes):
            for motion in motions:
                rest = f"{MOTION_PHRASES[motion]} {phrases[scene]}"
                shots += [
                    _Shot(
                        scene=scene,
                        motion=motion,
                        drawing=Drawing(prompt=f"{character.name} {rest}", seed=self._seed + repeat),
                        described=Drawing(prompt=f"{character.description} {rest}", seed=self._seed + repeat),
                        is_shown=motion == motions[place % len(motions)] and not repeat,
                    )
                    for repeat in range(self._plan.seeds)
                ]
        return shots

    def _draw_alone(self, character: DemoCharacter, adapter: Adapter, shots: Sequence[_Shot]) -> list[Row]:
        """Draw one character in new scenes; return some rows."""
        measures, drawings = self.measures, [shot.drawing for shot in shots]
        clips = {
            "base": self._draw(drawings, None),
            "engram": self._draw(drawings, adapter),
            "merged": self._draw(drawings, self._merged),
        }
        named = {variant: self._name_subjects(group) for variant, group in clips.items()}
        scenes = {variant: self._name_scenes(group) for variant, group in clips.items()}
        motions = {variant: self._motions.name_motions(group) for variant, group in clips.items()}
        for frames in self._name_subjects(self._draw([shot.described for shot in shots], None)):
            measures.described.add(is_mostly([character.is_seen(frame) for frame in frames]))
        rows = []
        for number, shot in enumerate(shots):
            pictures = []
            for variant, group in clips.items():
                seen = [character.is_seen(frame) for frame in named[variant][number]]
                is_seen = is_mostly(seen)
                scene, motion = scenes[variant][number], motions[variant][number]
                measures.identity.setdefault(variant, Tally()).add(is_seen)
                measures.scene.setdefault(variant, Tally()).add(scene == shot.scene)
                measures.motion.setdefault(variant, Tally()).add(motion == shot.motion)
                if variant == "engram":
                    measures.count_quarters(seen)
                if shot.is_shown:
                    verdict = f"{tell_who(character, named[variant][number])}; {MOTION_PHRASES[motion]}"
                    # The base model owes nobody this character, so its clips are neither right nor wrong.
                    good = None if variant == "base" else is_seen
                    pictures.append(Picture(image=self.make_movie(group[number]), verdict=verdict, good=good))
            same = is_same(clips["engram"][number], clips["merged"][number])
            measures.merged_equal.add(same)
            if shot.is_shown:
                note = None if same else "The merged file draws other bytes than the single one."
                rows.append(make_row(self._audit, shot.drawing, pictures, note))
        return rows

    def _draw_pairs(self, characters: Sequence[DemoCharacter], scenes: Mapping[str, str]) -> Section:
        """Draw both characters in one prompt, in either order; show them in turn."""
        places = [
            f"{motion} {phrase}" for phrase, motion in zip(scenes.values(), MOTION_PHRASES.values(), strict=False)
        ]
        asked = ask_for_pairs(characters, places, self._seed)
        drawings = [pair.drawing for pair in asked]
        clips = {
            "base": self._draw(drawings, None),
            "base, described": self._draw([pair.described for pair in asked], None),
            "merged": self._draw(drawings, self._merged),
        }
        named = {
            (variant, side): self._name_subjects(group, side) for variant, group in clips.items() for side in SIDES
        }
        rows = []
        for number, pair in enumerate(asked):
            is_shown = number % 2 == number // 2 % 2
            pictures = []
            for variant, group in clips.items():
                seen = [
                    character.name
                    for character, side in zip(pair.order, SIDES, strict=True)
                    if is_mostly([character.is_seen(frame) for frame in named[variant, side][number]])
                ]
                both = len(seen) == len(pair.order)
                self.measures.pair.setdefault(variant, Tally()).add(both)
                if is_shown:
                    good = None if variant == "base" else both
                    verdict = " and ".join(seen) or "neither"
                    pictures.append(Picture(image=self.make_movie(group[number]), verdict=verdict, good=good))
            if is_shown:
                rows.append(make_row(self._audit, pair.drawing, pictures))
        return Section(
            title="Both in one prompt",
            text=(
                "One merged file, two names in one sentence; subjects stand from left to right. The second column "
                "shows how well the model draws the two at all, when their looks are spelled out in words it knows. "
                "A clip counts only when most of its frames show both, each in its place, right in "
                "every attribute. Of each scene one order of the names is shown; the figures count both."
            ),
            columns=tuple(clips),
            rows=tuple(rows),
        )

    def _draw_controls(self, prompts: Sequence[str]) -> Section:
        """Draw prompts without a trigger and compare bytes."""
        drawings = [Drawing(prompt=prompt, seed=self._seed) for prompt in prompts]
        for same in compare_states(self._pipeline, self._merged, lambda: self._encode(prompts)):
            self.measures.states_equal.add(same)
        clips = {"base": self._draw(drawings, None), "merged": self._draw(drawings, self._merged)}
        rows = []
        for drawing, base, merged in zip(drawings, *clips.values(), strict=True):
            same = is_same(base, merged)
            self.measures.control_equal.add(same)
            pictures = [Picture(image=self.make_movie(base)), Picture(image=self.make_movie(merged), identical=same)]
            rows.append(make_row(self._audit, drawing, pictures))
        return Section(
            title="Nothing else changes",
            text=(
                "No full name, no change: other subjects, the characters described in plain words, single words of "
                "their names, and no words at all. Both columns are compared frame by frame, byte by byte."
            ),
            columns=tuple(clips),
            rows=tuple(rows),
        )

    def _encode(self, prompts: Sequence[str]) -> tuple[torch.Tensor]:
        """Return what the transformer would read of each prompt, [B, L, d]."""
        states: torch.Tensor = self._pipeline.encode_prompt(
            prompt=list(prompts), do_classifier_free_guidance=False, max_sequence_length=read_length(self._pipeline)
        )[0]
        return (states,)

    def _draw(self, drawings: Sequence[Drawing], adapter: Adapter | None) -> list[Pixels]:
        """Draw with an adapter or without; every variant in the same batches, so that bytes can be compared."""
        before = self._done
        with loaded(self._pipeline, adapter):
            clips = draw_clips(
                self._pipeline,
                drawings,
                **self._look,
                advance=lambda part: self._watcher.advance(before + part),
            )
        self._done += len(clips)
        return clips

    def _name_subjects(self, clips: Sequence[Pixels], side: str = "alone") -> list[list[Named]]:
        """Return what stands in a region of each frame of each clip."""
        frames = _to_pictures(clips)
        named: list[Named] = []
        for first in range(0, len(frames), _AT_ONCE):
            named += self._judge.name_subjects(frames[first : first + _AT_ONCE], side)
        return _split(named, clips)

    def _name_scenes(self, clips: Sequence[Pixels]) -> list[str]:
        """Return the scene that most frames of each clip show."""
        frames = _to_pictures(clips)
        named: list[str] = []
        for first in range(0, len(frames), _AT_ONCE):
            named += self._judge.name_scenes(frames[first : first + _AT_ONCE])
        return [Counter(part).most_common(1)[0][0] for part in _split(named, clips)]


def _to_pictures(clips: Sequence[Pixels]) -> list[Image.Image]:
    return [Image.fromarray(frame) for clip in clips for frame in clip]


def _split(named: Sequence[Any], clips: Sequence[Pixels]) -> list[list[Any]]:
    """Return what was named of all frames, clip by clip."""
    rest = iter(named)
    return [[next(rest) for _ in clip] for clip in clips]


def tell_who(character: DemoCharacter, named: Sequence[Named]) -> str:
    """Return in a few words whom a clip shows.

    Args:
        character: who was asked for.
        named: what each frame shows.
    """
    seen = [character.is_seen(frame) for frame in named]
    if is_mostly(seen):
        return character.name
    most, _ = Counter(describe_subject(frame) for frame in named).most_common(1)[0]
    # What most frames agree on can be the character although fewer than most frames do.
    return f"{most}, right in {sum(seen)} of {len(seen)} frames" if any(seen) else most
