"""What the small world's pictures are called: scenes, subjects, invented names, and the sentences around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from recipes.small_world.subjects import Monster

Rng = np.random.Generator

SCENE_PHRASES: Mapping[str, tuple[str, ...]] = {
    "beach": ("on the beach", "at the beach"),
    "forest": ("in the forest", "in a forest"),
    "snow": ("in the snow", "in deep snow"),
    "city": ("in the city", "in a city"),
    "space": ("in space", "in outer space"),
    "desert": ("in the desert", "in a desert"),
    "underwater": ("under water", "under the sea"),
    "mountains": ("in the mountains", "in front of mountains"),
    "meadow": ("in a meadow", "in the meadow"),
    "night": ("at night", "in the night"),
}
"""Scene to the phrases that name it; the first is the usual one."""

# Most captions are plain; the rest make the encoder used to words around the subject and to other orders.
_TEMPLATES = (
    "{subject} {scene}",
    "a picture of {subject} {scene}",
    "a drawing of {subject} {scene}",
    "{scene}, {subject}",
)
_TEMPLATE_ODDS = (0.7, 0.1, 0.1, 0.1)
_HEADGEAR = {"none": "no hat", "horns": "horns", "hat": "a hat", "crown": "a crown", "antenna": "an antenna"}
_MENTIONED = 0.85

_OPENINGS = (
    "b",
    "br",
    "d",
    "dr",
    "f",
    "fl",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "kl",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "qu",
    "r",
    "s",
    "sk",
    "sn",
    "t",
    "tr",
    "v",
    "w",
    "y",
    "z",
)
_VOWELS = ("a", "e", "i", "o", "u", "oo", "ee", "ai", "o", "u", "i")
_CLOSINGS = (
    "b",
    "ck",
    "f",
    "g",
    "ll",
    "m",
    "mble",
    "n",
    "nk",
    "p",
    "r",
    "rn",
    "s",
    "t",
    "x",
    "zz",
    "by",
    "lo",
    "ny",
    "wick",
)


def describe_monster(monster: Monster, rng: Rng | None = None) -> str:
    """Return a monster in words; with a generator some attributes go unmentioned.

    The full form of a monster: `a red striped round monster with one eye and a crown`.
    """

    def told() -> bool:
        return rng is None or rng.random() < _MENTIONED

    words = [word for word in (monster.color, monster.pattern, monster.shape) if told()]
    features = []
    if told():
        features.append("one eye" if monster.eyes == "one" else "two eyes")
    if told():
        features.append(_HEADGEAR[monster.headgear])
    phrase = " ".join([*words, "monster"])
    article = "an" if phrase[0] in "aeiou" else "a"
    return f"{article} {phrase}" + (f" with {' and '.join(features)}" if features else "")


def describe_thing(word: str) -> str:
    """Return a subject word with its article."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def invent_name(rng: Rng) -> str:
    """Return a name nobody has: one or two words of one to three syllables."""
    words = []
    for _ in range(int(rng.integers(1, 3))):
        syllables = [_pick(_OPENINGS, rng) + _pick(_VOWELS, rng) for _ in range(int(rng.integers(1, 3)))]
        words.append("".join(syllables) + _pick(_CLOSINGS, rng))
    return " ".join(words)


def write_caption(subjects: Sequence[str], scene: str | None, rng: Rng) -> str:
    """Return the caption of a picture.

    Args:
        subjects: none, one or two phrases, from left to right.
        scene: one of `SCENE_PHRASES`, or None to leave it unsaid.
        rng: chooses the phrase and the order.
    """
    place = "" if scene is None else _pick(SCENE_PHRASES[scene], rng)
    if not subjects:
        return place
    who = " and ".join(subjects)
    if not place:
        return who
    template = _TEMPLATES[int(rng.choice(len(_TEMPLATES), p=_TEMPLATE_ODDS))]
    return template.format(subject=who, scene=place)


def _pick(choices: Sequence[str], rng: Rng) -> str:
    return choices[int(rng.integers(len(choices)))]
