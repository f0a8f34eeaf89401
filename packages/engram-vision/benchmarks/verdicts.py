"""What pictures show: counts of the shipped judge's verdicts, and of bytes.

Each count is how much was right, and of how many, so that rows can be added up.

Shapes: pictures uint8 [N, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from questions import BESIDE, FORMS, NEW, PAIR, QUIET, SHOWN, WITHOUT_NAME, Question

from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.judge import Judge
from engram_vision.demo.stage import SIDES
from engram_vision.features import JudgeModel

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How much of something there was.

    Attributes:
        right: how much.
        count: of how many.
    """

    right: float = 0.0
    count: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(right=self.right + other.right, count=self.count + other.count)

    def __str__(self) -> str:
        return f"{self.right:.6g} of {self.count}"

    @property
    def share(self) -> float | None:
        """The share; None where nothing was counted."""
        return self.right / self.count if self.count else None


Counts = dict[str, Count]


def count_of(flags: Sequence[float]) -> Count:
    """Return a count of flags, or of values."""
    return Count(right=float(sum(flags)), count=len(flags))


class Verdicts:
    """Looks at pictures."""

    def __init__(self, judge: Judge) -> None:
        """Take the judge."""
        self._judge, self._features = judge, JudgeModel(judge)

    def judge_alone(
        self, character: DemoCharacter, questions: Sequence[Question], pixels: Pixels, base: Pixels
    ) -> Counts:
        """Return the counts of one character's pictures.

        Args:
            character: who was learned.
            questions: N of them.
            pixels: what a method drew.
            base: what the base model drew, which counts where the name is not said.
        """
        counts: Counts = {}
        for group in (SHOWN, NEW, FORMS):
            chosen, images, _ = _choose(group, questions, pixels, base)
            named, places = self._judge_all(images)
            counts[f"{group}: identity"] = count_of([character.is_seen(one) for one in named])
            counts[f"{group}: attributes"] = _count_attributes(character, named)
            counts[f"{group}: scene"] = count_of(
                [place == question.scene for place, question in zip(places, chosen, strict=True)]
            )
        chosen, images, _ = _choose(BESIDE, questions, pixels, base)
        counts |= self._judge_beside(character, chosen, images)
        for group in WITHOUT_NAME:
            chosen, images, before = _choose(group, questions, pixels, base)
            counts |= self._compare(character, group, images, before)
            if group == QUIET:
                counts[f"{group}: obeyed"] = self._count_obeyed(chosen, images)
        return counts

    def judge_pair(self, characters: Sequence[DemoCharacter], questions: Sequence[Question], pixels: Pixels) -> Counts:
        """Return the counts of two characters' pictures.

        Args:
            characters: `who` and `other`.
            questions: N of them.
            pixels: what a method drew.
        """
        images = [Image.fromarray(each) for each in pixels]
        sides = self._judge_sides(images)
        roles = dict(zip(("who", "other"), characters, strict=True))
        seen = [
            [roles[name].is_seen(sides[question.side(name)][at]) for name in roles]
            for at, question in enumerate(questions)
        ]
        return {
            f"{PAIR}: both": count_of([all(flags) for flags in seen]),
            f"{PAIR}: each": count_of([flag for flags in seen for flag in flags]),
        }

    def _judge_all(self, images: Sequence[Image.Image]) -> tuple[list[dict[str, str]], list[str]]:
        return (self._judge.name_subjects(images), self._judge.name_scenes(images)) if images else ([], [])

    def _judge_sides(self, images: Sequence[Image.Image]) -> Mapping[str, list[dict[str, str]]]:
        return {side: self._judge.name_subjects(images, side) if images else [] for side in SIDES}

    def _judge_beside(
        self, character: DemoCharacter, questions: Sequence[Question], images: Sequence[Image.Image]
    ) -> Counts:
        """Return how often the character, and the subject beside it, are right; and what that one borrows."""
        sides = self._judge_sides(images)
        own, other, borrowed = [], {"thing": list[float](), "monster": list[float]()}, list[float]()
        for at, question in enumerate(questions):
            own.append(float(character.is_seen(sides[question.side("who")][at])))
            named, asked = sides[question.side("")][at], question.beside
            kind = "monster" if asked["kind"] == "monster" else "thing"
            other[kind].append(float(all(named.get(name) == value for name, value in asked.items())))
            if kind == "monster" and named["kind"] == "monster":
                differ = [name for name in character.attributes if character.attributes[name] != asked[name]]
                borrowed += [float(named[name] == character.attributes[name]) for name in differ]
        counts = {f"{BESIDE}: {kind} right": count_of(flags) for kind, flags in other.items()}
        return counts | {f"{BESIDE}: identity": count_of(own), f"{BESIDE}: borrowed": count_of(borrowed)}

    def _compare(
        self,
        character: DemoCharacter,
        group: str,
        images: Sequence[Image.Image],
        before: Sequence[Image.Image],
    ) -> Counts:
        """Return how far pictures of prompts without the name are from the base model's."""
        if not images:
            return {}
        cosines = (self._features.embed(images) * self._features.embed(before)).sum(axis=1)
        named, was = self._judge.name_subjects(images), self._judge.name_subjects(before)
        return {
            f"{group}: identical": count_of(
                [one.tobytes() == other.tobytes() for one, other in zip(images, before, strict=True)]
            ),
            f"{group}: difference": count_of(
                [
                    float(np.abs(np.asarray(one, np.float32) - np.asarray(other, np.float32)).mean() / 255)
                    for one, other in zip(images, before, strict=True)
                ]
            ),
            f"{group}: distance": count_of([float(1 - min(1.0, cosine)) for cosine in cosines]),
            f"{group}: shows the character": count_of([character.is_seen(one) for one in named]),
            f"{group}: another subject": count_of([one != other for one, other in zip(named, was, strict=True)]),
        }

    def _count_obeyed(self, questions: Sequence[Question], images: Sequence[Image.Image]) -> Count:
        """Return how often all that a prompt asks for is there."""
        named, places = self._judge_all(images)
        return count_of(
            [
                question.scene in (None, place) and question.subject in (None, one["kind"])
                for question, one, place in zip(questions, named, places, strict=True)
                if question.scene or question.subject
            ]
        )


def _count_attributes(character: DemoCharacter, named: Sequence[Mapping[str, str]]) -> Count:
    """Return how many of the character's attributes are right; what is no monster has none."""
    return count_of([one.get(name) == value for one in named for name, value in character.attributes.items()])


def _choose(
    group: str, questions: Sequence[Question], pixels: Pixels, base: Pixels
) -> tuple[list[Question], list[Image.Image], list[Image.Image]]:
    """Return a group's questions, with a method's pictures and the base model's."""
    rows = [at for at, question in enumerate(questions) if question.group == group]
    return (
        [questions[at] for at in rows],
        [Image.fromarray(pixels[at]) for at in rows],
        [Image.fromarray(base[at]) for at in rows],
    )
