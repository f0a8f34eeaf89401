"""The small world in motion: short clips of a scene in which one thing happens, with captions that name it.

A clip begins as a still picture of the world does: subjects stand in their places. Then all of them do the clip's
motion in front of a scene that does not move. What `world` holds out is held out here too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_video.demo.motions import MOTION_PHRASES
from recipes.small_world.captions import SCENE_PHRASES, invent_name, write_caption
from recipes.small_world.scenes import CANVAS, draw_scene
from recipes.small_world.subjects import EMOJI, Monster, draw_emoji, draw_monster, random_monster
from recipes.small_world.world import SIZE, Box, Rng, Subject, describe, is_held_out

FRAMES, RATE = 17, 8
"""Frames of a clip, and frames a second."""

SHORT = 9
"""Frames of a clip of which every second one is shown: what is filmed unless said otherwise."""

# Where subjects stand, as in still pictures; in pixels of the canvas: (left, size) for one and for two.
_PLACES = (((20, 88),), ((1, 62), (65, 62)))
_GROUND, _JITTER = 122, 2
# How far they go, in sizes of a subject; two have less room.
_WALK, _BOB, _LEAP, _GROWTH = (0.36, 0.22), 0.05, (0.32, 0.4), (0.32, 0.25)
_TILT = 13.0  # degrees
_PACE = 0.12
# Shares of the clips, as in still pictures; and of captions that name no motion.
_EMPTY, _TWO, _MONSTERS, _INVENTED, _SCENE_UNSAID = 0.04, 0.2, 0.6, 0.08, 0.03
_MOTION_UNSAID = 0.12
_ANY_MONSTER = 0.5
_STREAM, _VEIL = 22, 23

_SCENES, _THINGS, _MOTIONS = tuple(SCENE_PHRASES), tuple(EMOJI), tuple(MOTION_PHRASES)
Frames = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pose:
    """How a subject differs from standing in its place; lengths in sizes of the subject.

    Attributes:
        right: how far it is to the right.
        up: how far above the ground.
        growth: how much larger.
        tilt: degrees to the right, around its feet.
    """

    right: float = 0.0
    up: float = 0.0
    growth: float = 0.0
    tilt: float = 0.0


def pick_frames(count: int) -> list[int]:
    """Return which of a clip's frames a shorter one shows: evenly spread, the first and the last among them."""
    return [round(float(at)) for at in np.linspace(0, FRAMES - 1, count)]


def pose(motion: str, frame: int, *, pace: float = 1.0, mirrored: bool = False, crowded: bool = False) -> Pose:
    """Return the pose of a frame; that of frame 0 is to stand in one's place.

    Args:
        motion: one of `MOTION_PHRASES`.
        frame: 0 to 16.
        pace: speed, about 1.
        mirrored: whether swaying begins to the left.
        crowded: whether another subject stands beside.
    """
    done = min(1.0, pace * frame / (FRAMES - 1))
    if motion in ("left", "right"):
        way = _WALK[crowded] * done
        return Pose(right=way if motion == "right" else -way, up=_BOB * np.sin(np.pi * pace * frame / 4) ** 2)
    if motion == "jump":
        return Pose(up=_LEAP[crowded] * abs(np.sin(np.pi * pace * frame / 8)))
    if motion == "sway":
        tilt = _TILT * np.sin(2 * np.pi * pace * frame / 9)
        return Pose(tilt=-tilt if mirrored else tilt)
    if motion == "closer":
        return Pose(growth=_GROWTH[crowded] * done)
    return Pose()


def render_clip(
    subjects: Sequence[Subject], scene: str, motion: str, rng: Rng, frames: Sequence[int] = range(FRAMES)
) -> tuple[Frames, tuple[tuple[Box, ...], ...]]:
    """Return some frames of a clip, uint8 [F, 64, 64, 3], and for each of them the subjects' boxes.

    Args:
        subjects: none, one or two.
        scene: one of the ten.
        motion: one of `MOTION_PHRASES`.
        rng: decides the scene's colours, places and pace.
        frames: which to draw.
    """
    canvas = draw_scene(scene, rng)
    crowded = len(subjects) > 1
    actors = []
    for subject, (left, size) in zip(subjects, _PLACES[crowded], strict=False):
        x, y = (int(value) for value in rng.integers(-_JITTER, _JITTER + 1, size=2))
        sprite = draw_monster(subject) if isinstance(subject, Monster) else draw_emoji(subject)
        actors.append(_Actor(sprite=sprite, left=left + x, ground=_GROUND + y, size=size))
    pace, mirrored = float(rng.uniform(1 - _PACE, 1 + _PACE)), bool(rng.random() < 0.5)
    pictures, boxes = [], []
    for frame in frames:
        picture = canvas.copy()
        now = pose(motion, frame, pace=pace, mirrored=mirrored, crowded=crowded)
        boxes.append(tuple(actor.paste(picture, now) for actor in actors))
        pictures.append(np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS)))
    return np.stack(pictures), tuple(boxes)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Actor:
    """A subject on stage: its sprite, and where it stands in pixels of the canvas."""

    sprite: Image.Image
    left: int
    ground: int
    size: int

    def paste(self, picture: Image.Image, now: Pose) -> Box:
        """Draw the subject and return its box in pixels of the clip."""
        size = round(self.size * (1 + now.growth))
        # Who comes closer stands lower; the middle stays where it is.
        x = self.left - (size - self.size) // 2 + round(now.right * self.size)
        y = self.ground - size - round(now.up * self.size) + (size - self.size) // 4
        sprite = self.sprite.resize((size, size), Image.Resampling.LANCZOS)
        side = 0
        if now.tilt:
            side = size // 4  # room for the head
            wide = Image.new("RGBA", (size + 2 * side, size), (0, 0, 0, 0))
            wide.paste(sprite, (side, 0))
            foot = (side + size / 2, size)
            sprite = wide.rotate(-now.tilt, Image.Resampling.BICUBIC, center=foot)
        picture.paste(sprite, (x - side, y), sprite)
        scale = CANVAS // SIZE
        lean = round(size * abs(np.sin(np.radians(now.tilt))) / 2)
        box = (x - lean) // scale, y // scale, (x + size + lean) // scale, (y + size) // scale
        left, top, right, bottom = (min(SIZE, max(0, edge)) for edge in box)
        return left, top, right, bottom


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """What a clip shows, before it is drawn.

    Attributes:
        caption: what it is called.
        veiled: the same, but what it shows goes by names that tell nothing of its looks.
        scene: its scene.
        subjects: what is shown, from left to right.
        motion: what they do.
    """

    caption: str
    veiled: str
    scene: str
    subjects: tuple[Subject, ...]
    motion: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """One clip.

    Attributes:
        plan: what it shows.
        frames: uint8 [F, 64, 64, 3].
        boxes: for each frame where each subject is, in pixels (left, top, right, bottom).
    """

    plan: Plan
    frames: Frames
    boxes: tuple[tuple[Box, ...], ...]


def plan_clip(seed: int, index: int) -> Plan:
    """Return what a training clip shows; depends on seed and index alone."""
    return _plan(np.random.default_rng([seed, index, _STREAM]), np.random.default_rng([seed, index, _VEIL]))


def draw_clip(seed: int, index: int, frames: Sequence[int] = range(FRAMES)) -> Clip:
    """Return one training clip; what happens depends on seed and index alone.

    Args:
        seed: of the world.
        index: of the clip.
        frames: which of its 17 frames to draw.
    """
    rng = np.random.default_rng([seed, index, _STREAM])
    plan = _plan(rng, np.random.default_rng([seed, index, _VEIL]))
    pictures, boxes = render_clip(plan.subjects, plan.scene, plan.motion, rng, frames)
    return Clip(plan=plan, frames=pictures, boxes=boxes)


def _plan(rng: Rng, veil: Rng) -> Plan:
    scene = _SCENES[int(rng.integers(len(_SCENES)))]
    odds = rng.random()
    number = 0 if odds < _EMPTY else 2 if odds < _EMPTY + _TWO else 1
    subjects = tuple(_shown_subject(scene, rng) for _ in range(number))
    motion = _MOTIONS[int(rng.integers(len(_MOTIONS)))] if subjects else "still"
    phrases = [invent_name(rng) if rng.random() < _INVENTED else describe(subject, rng) for subject in subjects]
    said = None if rng.random() < _MOTION_UNSAID else motion
    caption = write_motion_caption(phrases, said, scene, rng)
    veiled = write_motion_caption([_veil(subject, veil) for subject in subjects], said, scene, veil)
    return Plan(caption=caption, veiled=veiled, scene=scene, subjects=subjects, motion=motion)


def _veil(subject: Subject, rng: Rng) -> str:
    return "a monster" if isinstance(subject, Monster) and rng.random() < _ANY_MONSTER else invent_name(rng)


def write_motion_caption(phrases: Sequence[str], motion: str | None, scene: str, rng: Rng) -> str:
    """Return a caption such as `a fox jumping in the forest`; now and then it leaves out the scene.

    Args:
        phrases: none, one or two subjects in words.
        motion: one of `MOTION_PHRASES`, or None to leave it unsaid.
        scene: one of the ten.
        rng: chooses words and order.
    """
    said = None if phrases and rng.random() < _SCENE_UNSAID else scene
    if phrases and motion:
        phrases = [*phrases[:-1], f"{phrases[-1]} {MOTION_PHRASES[motion]}"]
    return write_caption(phrases, said, rng)


def draw_clips(seed: int, indices: Sequence[int], frames: Sequence[int] = range(FRAMES)) -> Iterator[Clip]:
    """Return clips one after another, drawn ahead by all cores."""
    with ProcessPoolExecutor() as pool:
        yield from pool.map(draw_clip, [seed] * len(indices), indices, [frames] * len(indices), chunksize=32)


def _shown_subject(scene: str, rng: Rng) -> Subject:
    while True:
        monster = rng.random() < _MONSTERS
        subject: Subject = random_monster(rng) if monster else _THINGS[int(rng.integers(len(_THINGS)))]
        if not is_held_out(subject, scene):
            return subject
