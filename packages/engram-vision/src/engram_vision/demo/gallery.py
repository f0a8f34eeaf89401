"""The pictures of the demo: drawn with and without adapters, compared, judged, and laid out in sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from engram_core import Adapter, PromptAudit, Watcher
from engram_vision.conditions import encode_prompts
from engram_vision.demo.characters import DemoCharacter, describe_subject
from engram_vision.demo.judge import Judge
from engram_vision.demo.measures import Measures, Tally
from engram_vision.demo.page import Picture, Row, Section
from engram_vision.demo.stage import SIDES, ask_for_pairs, compare_states, is_same, loaded, make_row
from engram_vision.drawing import Drawing, draw
from engram_vision.loading import pipeline_tokenizers

__all__ = ["Gallery"]

_STEPS, _GUIDANCE, _BATCH = 20, 4.0, 10
_SEEDS = 3
# Without a trigger: other subjects, words that describe the characters, and single words of their names.
_CONTROLS = (
    "a fox in the forest",
    "a robot at night",
    "a cat and a penguin in the snow",
    "a purple spotted round monster with one eye and horns on the beach",
    "a green striped tall monster with two eyes and a crown in space",
    "zorbit in the city",
    "a quell under water",
    "wumble fenny in a meadow",
    "in the desert",
    "",
)


class Gallery:
    """Draws with one pipeline and counts what it finds in `measures`."""

    def __init__(self, pipeline: Any, judge: Judge, merged: Adapter, *, seed: int, watcher: Watcher) -> None:
        """Prepare to draw.

        Args:
            pipeline: the tiny checkpoint.
            judge: names what is drawn.
            merged: all characters in one adapter.
            seed: of the first picture of each prompt.
            watcher: hears how many pictures are drawn.
        """
        self.measures = Measures()
        self._pipeline, self._judge, self._merged = pipeline, judge, merged
        self._audit = PromptAudit(merged, pipeline_tokenizers(pipeline))
        self._seed, self._watcher, self._done = seed, watcher, 0

    def draw(
        self, characters: Sequence[DemoCharacter], adapters: Mapping[str, Adapter], phrases: Mapping[str, str]
    ) -> tuple[Section, ...]:
        """Return every section of the page.

        Args:
            characters: the two that were learned.
            adapters: their own adapters by name.
            phrases: each scene's phrase.
        """
        scenes = len(phrases)
        pictures = 3 * len(characters) * scenes * _SEEDS + 3 * 2 * scenes + 2 * 2 * len(_CONTROLS)
        self._watcher.begin("drawing", pictures)
        rows = [row for one in characters for row in self._draw_alone(one, adapters[one.name], phrases)]
        columns = ("base", "engram", "merged")
        return (
            Section(
                title="New scenes",
                text=(
                    "The scenes that a character's five pictures did not show. The name recalls the character, and "
                    "the rest of the prompt still decides the scene. The merged file holds both characters and draws "
                    "the same."
                ),
                columns=columns,
                rows=tuple(row for row, held_out in rows if held_out),
            ),
            self._draw_pairs(characters, phrases),
            Section(
                title="Scenes from the pictures",
                text="The scenes that the five pictures did show, drawn anew.",
                columns=columns,
                rows=tuple(row for row, held_out in rows if not held_out),
            ),
            self._draw_controls(),
        )

    def _draw_alone(
        self, character: DemoCharacter, adapter: Adapter, phrases: Mapping[str, str]
    ) -> list[tuple[Row, bool]]:
        """Draw one character in every scene; return the rows of the first seed, and whether the scene is new."""
        measures, scenes = self.measures, [scene for scene in phrases for _ in range(_SEEDS)]
        drawings = [
            Drawing(prompt=f"{character.name} {phrase}", seed=self._seed + number)
            for phrase in phrases.values()
            for number in range(_SEEDS)
        ]
        images = {
            "base": self._draw(drawings, None),
            "engram": self._draw(drawings, adapter),
            "merged": self._draw(drawings, self._merged),
        }
        named = {variant: self._judge.name_subjects(group) for variant, group in images.items()}
        places = {variant: self._judge.name_scenes(group) for variant, group in images.items()}
        rows = []
        for number, (scene, drawing) in enumerate(zip(scenes, drawings, strict=True)):
            held_out = scene not in character.shown
            pictures = []
            for variant, group in images.items():
                is_seen = character.is_seen(named[variant][number])
                measures.identity.setdefault((variant, held_out), Tally()).add(is_seen)
                measures.scene.setdefault((variant, held_out), Tally()).add(places[variant][number] == scene)
                verdict = character.name if is_seen else describe_subject(named[variant][number])
                # The base model owes nobody this character, so its pictures are neither right nor wrong.
                good = None if variant == "base" else is_seen
                pictures.append(Picture(image=group[number], verdict=verdict, good=good))
            same = is_same(images["engram"][number], images["merged"][number])
            measures.merged_equal.add(same)
            if drawing.seed == self._seed:
                note = None if same else "The merged file draws other bytes than the single one."
                rows.append((make_row(self._audit, drawing, pictures, note), held_out))
        return rows

    def _draw_pairs(self, characters: Sequence[DemoCharacter], phrases: Mapping[str, str]) -> Section:
        """Draw both characters in one prompt, in either order."""
        asked = ask_for_pairs(characters, list(phrases.values()), self._seed)
        drawings = [pair.drawing for pair in asked]
        images = {
            "base": self._draw(drawings, None),
            "base, described": self._draw([pair.described for pair in asked], None),
            "merged": self._draw(drawings, self._merged),
        }
        named = {
            (variant, side): self._judge.name_subjects(group, side)
            for variant, group in images.items()
            for side in SIDES
        }
        rows = []
        for number, pair in enumerate(asked):
            pictures = []
            for variant, group in images.items():
                seen = [
                    character.name
                    for character, side in zip(pair.order, SIDES, strict=True)
                    if character.is_seen(named[variant, side][number])
                ]
                both = len(seen) == len(pair.order)
                self.measures.pair.setdefault(variant, Tally()).add(both)
                good = None if variant == "base" else both
                pictures.append(Picture(image=group[number], verdict=" and ".join(seen) or "neither", good=good))
            rows.append(make_row(self._audit, pair.drawing, pictures))
        return Section(
            title="Both in one prompt",
            text=(
                "One merged file, two names in one sentence, in either order; subjects stand from left to right. The "
                "model is weak here: the second column shows how well it draws the two when all their looks are "
                "spelled out in words it knows. Looks wander between the two; a picture counts only when both are "
                "right in every attribute."
            ),
            columns=tuple(images),
            rows=tuple(rows),
        )

    def _draw_controls(self) -> Section:
        """Draw prompts without a trigger and compare bytes."""
        drawings = [Drawing(prompt=prompt, seed=self._seed + number) for prompt in _CONTROLS for number in range(2)]
        for same in compare_states(self._pipeline, self._merged, lambda: encode_prompts(self._pipeline, _CONTROLS)):
            self.measures.states_equal.add(same)
        images = {"base": self._draw(drawings, None), "merged": self._draw(drawings, self._merged)}
        rows = []
        for drawing, base, merged in zip(drawings, *images.values(), strict=True):
            same = is_same(base, merged)
            self.measures.control_equal.add(same)
            if drawing.seed == self._seed:
                rows.append(
                    make_row(self._audit, drawing, [Picture(image=base), Picture(image=merged, identical=same)])
                )
        return Section(
            title="Nothing else changes",
            text=(
                "No full name, no change: other subjects, the characters described in plain words, single words of "
                "their names, and no words at all. Both columns are compared byte by byte."
            ),
            columns=tuple(images),
            rows=tuple(rows),
        )

    def _draw(self, drawings: Sequence[Drawing], adapter: Adapter | None) -> list[Image.Image]:
        """Draw with an adapter or without; every variant in the same batches, so that bytes can be compared."""
        before = self._done
        with loaded(self._pipeline, adapter):
            images = draw(
                self._pipeline,
                drawings,
                steps=_STEPS,
                guidance=_GUIDANCE,
                batch_size=_BATCH,
                advance=lambda part: self._watcher.advance(before + part),
            )
        self._done += len(images)
        return images
