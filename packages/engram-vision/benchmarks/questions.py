"""The prompts of each measure, the same for every method but for what it calls the character.

Pictures of different groups answer different questions; `verdicts` counts them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.stage import SIDES
from engram_vision.drawing import Drawing

SHOWN, NEW, FORMS, BESIDE = "scenes shown", "new scenes", "other wordings", "beside another subject"
QUIET, CLASS, SINGLE = "other subjects", "words of the class", "single words of the name"
PAIR = "two characters"
WITHOUT_NAME = (QUIET, CLASS, SINGLE)

WHO, OTHER = "{who}", "{other}"
_FORMS = (
    "a picture of {who} {scene}",
    "a drawing of {who} {scene}",
    "{scene}, {who}",
    "{scene}, {who}",
    "{who}, {scene}",
)
_THINGS = ("fox", "robot", "penguin", "mushroom")
# Monsters to stand beside a character; none is one of the characters.
_MONSTERS: Sequence[tuple[str, Mapping[str, str]]] = (
    (
        "a yellow plain square monster with two eyes and an antenna",
        {"color": "yellow", "shape": "square", "pattern": "plain", "headgear": "antenna", "eyes": "two"},
    ),
    (
        "a red striped pointed monster with one eye and no hat",
        {"color": "red", "shape": "pointed", "pattern": "striped", "headgear": "none", "eyes": "one"},
    ),
)
_QUIET: Sequence[tuple[str, str | None, str | None]] = (
    ("a fox in the forest", "fox", "forest"),
    ("a robot at night", "robot", "night"),
    ("an octopus under water", "octopus", "underwater"),
    ("a rocket in space", "rocket", "space"),
    ("a cat on the beach", "cat", "beach"),
    ("a picture of a penguin in the snow", "penguin", "snow"),
    ("in the mountains, a dog", "dog", "mountains"),
    ("a car in the city", "car", "city"),
    ("in the desert", None, "desert"),
    ("", None, None),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A picture to ask for, and what it has to show.

    Attributes:
        group: what it measures.
        prompt: with `{who}` where the character is named, and `{other}` where a second one is.
        seed: of the first noise.
        scene: that it has to show; None where the prompt says none.
        subject: the thing that has to stand alone in it; None where there is no such.
        order: for two subjects what stands left and right: `who`, `other`, or empty for what `beside` tells.
        beside: the kind, and for a monster the attributes, of what stands beside the character.
    """

    group: str
    prompt: str
    seed: int
    scene: str | None = None
    subject: str | None = None
    order: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)

    def drawing(self, who: str, other: str = "") -> Drawing:
        """Return what to draw, given what the characters are called."""
        return Drawing(prompt=self.prompt.replace(WHO, who).replace(OTHER, other), seed=self.seed)

    def side(self, name: str) -> str:
        """Return the region in which one of `order` stands."""
        return SIDES[self.order.index(name)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Amount:
    """How many pictures there are of each scene, and how many prompts of each group at most.

    Attributes:
        shown, new: pictures of each scene.
        prompts: of every other group.
        scenes: of each kind.
    """

    shown: int = 2
    new: int = 3
    prompts: int = 100
    scenes: int = 100


def ask_alone(
    character: DemoCharacter, phrases: Mapping[str, str], seed: int, amount: Amount | None = None
) -> list[Question]:
    """Return all questions about one character.

    Args:
        character: who is learned.
        phrases: each scene's phrase.
        seed: of the run; pictures of different runs have different noise.
        amount: how many.
    """
    amount = amount or Amount()
    shown = list(character.shown)[: amount.scenes]
    new = [scene for scene in phrases if scene not in character.shown][: amount.scenes]
    plain = [
        Question(group=group, prompt=f"{WHO} {phrases[scene]}", seed=0, scene=scene)
        for group, scenes, count in ((SHOWN, shown, amount.shown), (NEW, new, amount.new))
        for scene in scenes
        for _ in range(count)
    ]
    forms = [
        Question(group=FORMS, prompt=form.replace("{scene}", phrases[scene]), seed=0, scene=scene)
        for form, scene in zip(_FORMS, new, strict=False)
    ]
    groups = [forms, _ask_beside(phrases, new), _ask_quiet(), _ask_class(phrases), _ask_single(character, phrases)]
    rest = [question for group in groups for question in group[: amount.prompts]]
    return [replace(question, seed=1000 * seed + number) for number, question in enumerate((*plain, *rest))]


def ask_pair(phrases: Mapping[str, str], seed: int, amount: Amount | None = None) -> list[Question]:
    """Return the questions about two characters in one prompt: every scene, either one first."""
    found = [
        Question(
            group=PAIR,
            prompt=f"{WHO} and {OTHER} {phrase}" if order[0] == "who" else f"{OTHER} and {WHO} {phrase}",
            seed=1000 * seed + 500 + number,
            scene=scene,
            order=order,
        )
        for number, (scene, phrase) in enumerate(phrases.items())
        for order in (("who", "other"), ("other", "who"))
    ]
    return found[: (amount or Amount()).prompts]


def _ask_beside(phrases: Mapping[str, str], scenes: Sequence[str]) -> list[Question]:
    others = [(f"a {thing}", {"kind": thing}) for thing in _THINGS]
    others += [(words, {"kind": "monster", **attributes}) for words, attributes in _MONSTERS for _ in range(2)]
    found = []
    for number, (words, what) in enumerate(others):
        scene = scenes[number % len(scenes)]
        first = number % 2 == 0
        prompt = f"{WHO} and {words} {phrases[scene]}" if first else f"{words} and {WHO} {phrases[scene]}"
        order = ("who", "") if first else ("", "who")
        found.append(Question(group=BESIDE, prompt=prompt, seed=0, scene=scene, order=order, beside=what))
    return found


def _ask_quiet() -> list[Question]:
    return [
        Question(group=QUIET, prompt=prompt, seed=0, scene=scene, subject=subject) for prompt, subject, scene in _QUIET
    ]


def _ask_class(phrases: Mapping[str, str]) -> list[Question]:
    prompts = [f"a monster {phrase}" for phrase in list(phrases.values())[::2]]
    prompts += ["a monster", "a picture of a monster", "a round monster in the city"]
    return [Question(group=CLASS, prompt=prompt, seed=0) for prompt in prompts]


def _ask_single(character: DemoCharacter, phrases: Mapping[str, str]) -> list[Question]:
    places = list(phrases.values())
    words = character.name.split()
    prompts = [f"{word} {places[3 * number + at]}" for at, word in enumerate(words) for number in range(2)]
    prompts.append(" ".join(reversed(words)) + f" {places[-1]}")
    return [Question(group=SINGLE, prompt=prompt, seed=0) for prompt in prompts]
