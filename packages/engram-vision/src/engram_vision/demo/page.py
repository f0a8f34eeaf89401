"""The demo's page: what it shows, and the one HTML file that shows it; importing this imports no torch."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources

from jinja2 import Environment, StrictUndefined, Template
from PIL import Image

from engram_core import InputError
from engram_vision.demo.curve import Curve, plot_curve

__all__ = [
    "Character",
    "Curve",
    "Figure",
    "Movie",
    "Page",
    "Picture",
    "Reference",
    "Row",
    "Section",
    "Token",
    "render_page",
]

# The template has as many colours for concepts; the numbers beside them go on counting.
_COLORS = 8
# Smaller pictures are shown enlarged, with their pixels as they are; larger ones are scaled down smoothly.
_PIXEL_ART = 128
_SHORT_IDENTITY = 12
# Figures' values longer than this are set smaller.
_LONG_VALUE = 12
# Browsers begin clips when they come into view, each by itself; side by side they are compared best in step.
_IN_STEP = """
setInterval(() => {
  for (const row of document.querySelectorAll("tr")) {
    const [first, ...others] = row.querySelectorAll("video");
    for (const clip of others) {
      if (Math.abs(clip.currentTime - first.currentTime) > 0.06) clip.currentTime = first.currentTime;
    }
  }
}, 1000);
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number that the demo is judged by.

    Attributes:
        label: what was counted or measured.
        value: the result, as text.
        bar: what it has to be, e.g. `at least 0.80`; empty when nothing is asked of it.
        met: whether it is; None when nothing is asked.
        explanation: what the number means, in a sentence.
    """

    label: str
    value: str
    bar: str = ""
    met: bool | None = None
    explanation: str = ""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Movie:
    """A clip, which plays in the page.

    Attributes:
        mp4: the file, H.264.
        width: of the clip, in pixels.
        height: likewise.
        stills: some of its frames in one picture of the clip's shape: for paper, for readers who want nothing to
            move, and for browsers that do not play the clip.
    """

    mp4: bytes
    width: int
    height: int
    stills: Image.Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """A picture that a character was learned from.

    Attributes:
        image: the picture.
        caption: the caption it was learned with.
        clip: what was made of it to be learned from; None where that is the picture itself.
    """

    image: Image.Image
    caption: str
    clip: Movie | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Character:
    """One character that was learned.

    Attributes:
        name: the concept's name, as `Token.concept` gives it.
        trigger: the phrase that recalls it; None means the name.
        references: what it was learned from.
        curve: how the loss went.
        seconds: how long training took.
        n_bytes: size of the adapter file.
        identity: SHA-256 of the adapter file, in hexadecimal.
        entries: how many vectors the file holds.
    """

    name: str
    trigger: str | None = None
    references: tuple[Reference, ...]
    curve: Curve
    seconds: float
    n_bytes: int
    identity: str
    entries: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of a prompt.

    Attributes:
        text: what it stands for.
        concept: the concept that fires there; None when none does.
    """

    text: str
    concept: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A picture or clip that was drawn.

    Attributes:
        image: the picture or clip.
        verdict: what a judge saw in it; None when none was asked.
        good: whether that is as it should be; None when nothing is asked.
        identical: for controls: whether it has the same bytes as the base model's; None otherwise.
    """

    image: Image.Image | Movie
    verdict: str | None = None
    good: bool | None = None
    identical: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """The pictures of one prompt and seed.

    Attributes:
        prompt: what was asked for.
        tokens: the prompt as the model reads it, by the name of who reads it; empty shows none.
        seed: of the first noise.
        pictures: one for each column of the section.
        note: a remark on this row.
    """

    prompt: str
    tokens: Mapping[str, tuple[Token, ...]] = field(default_factory=dict)
    seed: int
    pictures: tuple[Picture, ...]
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table of pictures.

    Attributes:
        title: its heading.
        text: what to look at; an empty line begins a new paragraph.
        columns: what the pictures were drawn with, e.g. `base`, `engram`, `merged`.
        rows: the pictures; none shows the text alone.
    """

    title: str
    text: str
    columns: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        """Refuse rows that do not fill the columns."""
        for row in self.rows:
            if len(row.pictures) != len(self.columns):
                raise InputError(
                    f"section {self.title!r}: the row of {row.prompt!r} has {len(row.pictures)} pictures for "
                    f"{len(self.columns)} columns; give one for each"
                )

    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts that fire somewhere in the section, in the order they are met."""
        fired = (token.concept for row in self.rows for tokens in row.tokens.values() for token in tokens)
        return tuple(dict.fromkeys(concept for concept in fired if concept is not None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Everything on the demo's page.

    Attributes:
        title: the heading.
        lead: one or two sentences below it.
        passed: whether every check held; figures that miss their bar are said beside it all the same.
        failures: what did not hold, a sentence each.
        figures: the numbers it is judged by.
        learning: how the characters were learned, in a sentence or two.
        characters: what was learned.
        sections: the pictures that were drawn.
        facts: where and how it ran, by name.
        commands: the lines that do the same by hand.
    """

    title: str
    lead: str
    passed: bool
    failures: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    learning: str = (
        "Each character was learned from the pictures below and is kept in a small file of its own. The model itself "
        "did not change."
    )
    characters: tuple[Character, ...] = ()
    sections: tuple[Section, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[str, ...] = ()

    @property
    def moves(self) -> bool:
        """Whether there are clips on it."""
        drawn = (picture.image for section in self.sections for row in section.rows for picture in row.pictures)
        made = (reference.clip for character in self.characters for reference in character.references)
        return any(isinstance(one, Movie) for one in (*drawn, *made))


def render_page(page: Page) -> str:
    """Return the page as one HTML document that loads nothing from anywhere.

    It runs no script, but for one that keeps clips of a row in step where there are clips; they play without it.
    Pictures are PNG and clips MP4 inside it, each concept has one colour throughout, and all text is escaped.

    Args:
        page: what to show.
    """
    return _load_template().render(
        page=page,
        numbers=_number_concepts(page),
        colors=_COLORS,
        pixel_art=_PIXEL_ART,
        long_value=_LONG_VALUE,
        in_step=_IN_STEP,
        in_step_digest=base64.b64encode(hashlib.sha256(_IN_STEP.encode()).digest()).decode("ascii"),
    )


@functools.cache
def _load_template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "address": _write_address,
        "movie_address": lambda movie: _write_data("video/mp4", movie.mp4),
        "duration": _write_duration,
        "group": _group_tokens,
        "paragraphs": _split_paragraphs,
        "plot": plot_curve,
        "short": lambda identity: identity[:_SHORT_IDENTITY],
    }
    environment.tests["movie"] = lambda value: isinstance(value, Movie)
    source = resources.files("engram_vision.demo").joinpath("page.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)


def _number_concepts(page: Page) -> dict[str, int]:
    """Return a number from 0 for each concept: the characters in their order, then whatever else fires."""
    names = [character.name for character in page.characters]
    names += [concept for section in page.sections for concept in section.concepts]
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _group_tokens(tokens: Iterable[Token]) -> list[tuple[str | None, list[str]]]:
    """Return the tokens' texts in runs that one concept fires at, or none does."""
    groups: list[tuple[str | None, list[str]]] = []
    for token in tokens:
        if not groups or groups[-1][0] != token.concept:
            groups.append((token.concept, []))
        groups[-1][1].append(token.text)
    return groups


def _split_paragraphs(text: str) -> list[str]:
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def _write_address(image: Image.Image) -> str:
    buffer = io.BytesIO()
    shown = image if image.mode in ("L", "RGB", "RGBA") else image.convert("RGBA")
    shown.save(buffer, format="PNG", optimize=True)
    return _write_data("image/png", buffer.getvalue())


def _write_data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _write_duration(seconds: float) -> str:
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
