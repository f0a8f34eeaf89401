"""Does the tiny checkpoint obey prompts? Subjects and scenes as the judge names them, held-out ones apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from engram_vision.demo.judge import Judge
from engram_vision.drawing import Drawing, draw
from recipes.small_world.captions import SCENE_PHRASES
from recipes.small_world.subjects import ATTRIBUTES, EMOJI, Monster, random_monster
from recipes.small_world.world import CHARACTERS, Subject, describe, is_held_out, render

STEPS, GUIDANCE = 20, 4.0
_SCENES = tuple(SCENE_PHRASES)


def evaluate_drawn(pipeline: Any, judge: Judge, *, seed: int, count: int = 120) -> dict[str, dict[str, float]]:
    """Return accuracies of what the pipeline draws, for subjects and scenes shown in training and held out.

    Args:
        pipeline: the checkpoint.
        judge: names what it draws.
        seed: chooses subjects and noise.
        count: pictures of each kind.
    """
    rng = np.random.default_rng([seed, 1])
    return {
        "things, shown": _score(pipeline, judge, _things(rng, count, held_out=False), seed),
        "things, held-out scenes": _score(pipeline, judge, _things(rng, count, held_out=True), seed),
        "monsters, shown": _score(pipeline, judge, _monsters(rng, count, held_out=False), seed),
        "monsters, held out": _score(pipeline, judge, _monsters(rng, count, held_out=True), seed),
    }


def evaluate_judge(judge: Judge, *, seed: int, count: int = 300) -> dict[str, dict[str, float]]:
    """Return the judge's own accuracies on drawn pictures it never saw, the demo's characters among them."""
    rng = np.random.default_rng([seed, 2])
    kinds: dict[str, list[tuple[Subject, str]]] = {
        "things": _things(rng, count, held_out=True),
        "monsters, held out": _monsters(rng, count, held_out=True),
        **{name: [(monster, _pick(_SCENES, rng)) for _ in range(count)] for name, monster in CHARACTERS.items()},
    }
    return {
        name: _compare(judge, pairs, [Image.fromarray(render((who,), where, rng)[0]) for who, where in pairs])
        for name, pairs in kinds.items()
    }


def is_right(named: Mapping[str, str], subject: Subject) -> bool:
    """Tell whether the judge named a subject, with every attribute of a monster."""
    if not isinstance(subject, Monster):
        return named["kind"] == subject
    return named["kind"] == "monster" and all(named[name] == getattr(subject, name) for name in ATTRIBUTES)


def _score(pipeline: Any, judge: Judge, pairs: Sequence[tuple[Subject, str]], seed: int) -> dict[str, float]:
    prompts = [f"{describe(subject)} {SCENE_PHRASES[scene][0]}" for subject, scene in pairs]
    drawings = [Drawing(prompt=prompt, seed=seed + number) for number, prompt in enumerate(prompts)]
    with torch.no_grad():
        images = draw(pipeline, drawings, steps=STEPS, guidance=GUIDANCE, batch_size=10)
    return _compare(judge, pairs, images)


def _compare(judge: Judge, pairs: Sequence[tuple[Subject, str]], images: Sequence[Image.Image]) -> dict[str, float]:
    subjects, scenes = judge.name_subjects(images), judge.name_scenes(images)
    result = {
        "subject": _share(is_right(named, subject) for named, (subject, _) in zip(subjects, pairs, strict=True)),
        "scene": _share(named == scene for named, (_, scene) in zip(scenes, pairs, strict=True)),
    }
    for name in ATTRIBUTES:
        monsters = [(n, s) for n, (s, _) in zip(subjects, pairs, strict=True) if isinstance(s, Monster)]
        if monsters:
            result[name] = _share(named.get(name) == getattr(subject, name) for named, subject in monsters)
    return result


def _things(rng: np.random.Generator, count: int, *, held_out: bool) -> list[tuple[Subject, str]]:
    pairs = [(thing, scene) for thing in EMOJI for scene in _SCENES if is_held_out(thing, scene) == held_out]
    return [pairs[index] for index in rng.choice(len(pairs), count)]


def _monsters(rng: np.random.Generator, count: int, *, held_out: bool) -> list[tuple[Subject, str]]:
    pairs: list[tuple[Subject, str]] = []
    while len(pairs) < count:
        monster, scene = random_monster(rng), _pick(_SCENES, rng)
        if is_held_out(monster, scene) == held_out and monster not in CHARACTERS.values():
            pairs.append((monster, scene))
    return pairs


def _pick(choices: Sequence[str], rng: np.random.Generator) -> str:
    return choices[int(rng.integers(len(choices)))]


def _share(values: Iterable[bool]) -> float:
    flags = list(values)
    return round(float(sum(flags)) / len(flags), 4)
