"""Pictures of the small world with their captions, and what of it is held out.

Held out, so that evaluation can ask for what training never showed:

- two of the ten scenes for each emoji subject;
- one in ten monsters (a combination of attributes), in every scene;
- the demo's two characters: their combinations of attributes, and their names.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from recipes.small_world.captions import SCENE_PHRASES, describe_monster, describe_thing, invent_name, write_caption
from recipes.small_world.scenes import CANVAS, draw_scene
from recipes.small_world.subjects import EMOJI, Monster, draw_emoji, draw_monster, random_monster

SIZE = 64
"""Pixels a side of a picture."""

Subject = str | Monster
Rng = np.random.Generator
Box = tuple[int, int, int, int]

CHARACTERS: Mapping[str, Monster] = {
    "Zorbit Quell": Monster(color="purple", shape="round", pattern="spotted", headgear="horns", eyes="one"),
    "Fenny Wumble": Monster(color="green", shape="tall", pattern="striped", headgear="crown", eyes="two"),
}
"""The demo's characters, by name; the world never shows them."""

_SCENES = tuple(SCENE_PHRASES)
_THINGS = tuple(EMOJI)
# Where subjects stand, in pixels of the canvas: (left, size) for one and for two; all stand on _GROUND.
_ALONE = ((20, 88),)
_PAIR = ((1, 62), (65, 62))
_GROUND = 122
REGIONS: Mapping[str, Box] = {"alone": (7, 14, 57, 64), "left": (0, 28, 34, 62), "right": (30, 28, 64, 62)}
"""Where the judge looks for a subject: its place with some room around, in pixels of the picture."""

_JITTER = 2
# Shares of the pictures: no subject at all, two subjects; the rest has one.
_EMPTY, _TWO = 0.04, 0.22
_MONSTERS = 0.58
_INVENTED = 0.08
_SCENE_UNSAID = 0.03


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Example:
    """One picture.

    Attributes:
        image: uint8 [64, 64, 3].
        caption: what it is called.
        scene: its scene.
        subjects: what is shown, from left to right.
        boxes: where, in pixels (left, top, right, bottom).
    """

    image: npt.NDArray[np.uint8]
    caption: str
    scene: str
    subjects: tuple[Subject, ...]
    boxes: tuple[Box, ...]


def is_held_out(subject: Subject, scene: str) -> bool:
    """Tell whether training never shows this subject in this scene."""
    if isinstance(subject, Monster):
        return subject in CHARACTERS.values() or zlib.crc32(repr(subject).encode()) % 10 == 0
    return (_SCENES.index(scene) - 3 * _THINGS.index(subject)) % 5 == 0


def describe(subject: Subject, rng: Rng | None = None) -> str:
    """Return a subject in words; with a generator a monster's attributes may go unmentioned."""
    return describe_monster(subject, rng) if isinstance(subject, Monster) else describe_thing(subject)


def render(subjects: tuple[Subject, ...], scene: str, rng: Rng) -> tuple[npt.NDArray[np.uint8], tuple[Box, ...]]:
    """Return a picture, uint8 [64, 64, 3], and the subjects' boxes in its pixels."""
    canvas = draw_scene(scene, rng)
    boxes = []
    for subject, (left, size) in zip(subjects, _PAIR if len(subjects) > 1 else _ALONE, strict=False):
        sprite = draw_monster(subject) if isinstance(subject, Monster) else draw_emoji(subject)
        x = left + int(rng.integers(-_JITTER, _JITTER + 1))
        y = _GROUND - size + int(rng.integers(-_JITTER, _JITTER + 1))
        sprite = sprite.resize((size, size), Image.Resampling.LANCZOS)
        canvas.paste(sprite, (x, y), sprite)
        scale = CANVAS // SIZE
        boxes.append((max(0, x // scale), y // scale, min(SIZE, (x + size) // scale), (y + size) // scale))
    image = canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)
    return np.asarray(image), tuple(boxes)


def draw_example(seed: int, index: int) -> Example:
    """Return one training picture; depends on seed and index alone."""
    rng = np.random.default_rng([seed, index])
    scene = _SCENES[int(rng.integers(len(_SCENES)))]
    odds = rng.random()
    number = 0 if odds < _EMPTY else 2 if odds < _EMPTY + _TWO else 1
    subjects = tuple(_shown_subject(scene, rng) for _ in range(number))
    phrases = [invent_name(rng) if rng.random() < _INVENTED else describe(subject, rng) for subject in subjects]
    said = None if subjects and rng.random() < _SCENE_UNSAID else scene
    caption = write_caption(phrases, said, rng)
    image, boxes = render(subjects, scene, rng)
    return Example(image=image, caption=caption, scene=scene, subjects=subjects, boxes=boxes)


def _shown_subject(scene: str, rng: Rng) -> Subject:
    while True:
        subject: Subject
        subject = random_monster(rng) if rng.random() < _MONSTERS else _THINGS[int(rng.integers(len(_THINGS)))]
        if not is_held_out(subject, scene):
            return subject


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """Many examples as arrays.

    Attributes:
        images: uint8 [N, 64, 64, 3].
        captions: N captions.
        scenes: N scenes.
        subjects: N tuples of subjects.
        boxes: N tuples of boxes.
    """

    images: npt.NDArray[np.uint8]
    captions: list[str]
    scenes: list[str]
    subjects: list[tuple[Subject, ...]]
    boxes: list[tuple[Box, ...]]


def draw_world(seed: int, count: int) -> World:
    """Return `count` examples, drawn on all cores.

    Args:
        seed: makes the world.
        count: how many.
    """
    with ProcessPoolExecutor() as pool:
        examples = list(pool.map(draw_example, [seed] * count, range(count), chunksize=256))
    return World(
        images=np.stack([example.image for example in examples]),
        captions=[example.caption for example in examples],
        scenes=[example.scene for example in examples],
        subjects=[example.subjects for example in examples],
        boxes=[example.boxes for example in examples],
    )
