"""The subjects of the small world: colour emoji, and monsters put together from attributes.

A sprite is an RGBA picture of 192 x 192 with a transparent ground, standing on its lower edge.
The emoji come from Noto Color Emoji (SIL Open Font License 1.1); only this recipe needs the font.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Color = tuple[int, int, int]

SPRITE = 192
"""Pixels a side of a sprite."""

FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""Where Debian's fonts-noto-color-emoji puts it."""

FONT_SIZE = 109
"""The one size at which the font holds bitmaps."""

EMOJI: Mapping[str, str] = {
    "cat": "\U0001f431",
    "dog": "\U0001f436",
    "fox": "\U0001f98a",
    "bear": "\U0001f43b",
    "panda": "\U0001f43c",
    "frog": "\U0001f438",
    "lion": "\U0001f981",
    "pig": "\U0001f437",
    "monkey": "\U0001f435",
    "rabbit": "\U0001f430",
    "owl": "\U0001f989",
    "penguin": "\U0001f427",
    "turtle": "\U0001f422",
    "octopus": "\U0001f419",
    "crab": "\U0001f980",
    "butterfly": "\U0001f98b",
    "snail": "\U0001f40c",
    "car": "\U0001f697",
    "rocket": "\U0001f680",
    "apple": "\U0001f34e",
    "mushroom": "\U0001f344",
    "robot": "\U0001f916",
    "ghost": "\U0001f47b",
    "pumpkin": "\U0001f383",
}
"""Subject word to the character that is drawn."""

COLORS: Mapping[str, Color] = {
    "red": (220, 50, 48),
    "orange": (244, 140, 40),
    "yellow": (250, 214, 60),
    "green": (70, 176, 74),
    "blue": (56, 104, 220),
    "purple": (140, 66, 190),
    "pink": (246, 136, 190),
    "white": (240, 240, 244),
}
SHAPES = ("round", "tall", "square", "pointed", "wide")
PATTERNS = ("plain", "spotted", "striped")
HEADGEAR = ("none", "horns", "hat", "crown", "antenna")
EYES = ("one", "two")

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "pattern": PATTERNS,
    "headgear": HEADGEAR,
    "eyes": EYES,
}
"""What tells monsters apart, and the values of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Monster:
    """A monster by its attributes; see `ATTRIBUTES` for the values."""

    color: str
    shape: str
    pattern: str
    headgear: str
    eyes: str


def draw_emoji(word: str) -> Image.Image:
    """Return the sprite of an emoji subject."""
    return _emoji(EMOJI[word]).copy()


@cache
def _emoji(character: str) -> Image.Image:
    if not FONT.exists():
        raise FileNotFoundError(f"{FONT}: is missing; install Debian's fonts-noto-color-emoji, which this recipe draws")
    font = ImageFont.truetype(str(FONT), FONT_SIZE)
    sheet = Image.new("RGBA", (256, 256), (0, 0, 0, 0))
    ImageDraw.Draw(sheet).text((40, 40), character, font=font, embedded_color=True)
    glyph = sheet.crop(sheet.getbbox())
    factor = (SPRITE - 8) / max(glyph.size)
    glyph = glyph.resize((round(glyph.width * factor), round(glyph.height * factor)), Image.Resampling.LANCZOS)
    sprite = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    sprite.paste(glyph, ((SPRITE - glyph.width) // 2, SPRITE - glyph.height - 2))
    return sprite


# Body boxes (left, top, right, bottom) in sprite pixels; what lies above is room for the headgear.
_BODIES: Mapping[str, tuple[int, int, int, int]] = {
    "round": (26, 50, 166, 182),
    "tall": (48, 46, 144, 182),
    "square": (32, 56, 160, 182),
    "pointed": (20, 46, 172, 182),
    "wide": (6, 80, 186, 182),
}
_OUTLINE = (40, 36, 44, 255)
_LINE = 7


def draw_monster(monster: Monster) -> Image.Image:
    """Return the sprite of a monster."""
    left, top, right, bottom = box = _BODIES[monster.shape]
    middle = (left + right) // 2
    fill = (*COLORS[monster.color], 255)
    sprite = Image.new("RGBA", (SPRITE, SPRITE), (0, 0, 0, 0))
    draw = ImageDraw.Draw(sprite)
    _draw_headgear(draw, monster.headgear, middle, top + (10 if monster.shape in ("round", "wide") else 4))
    for foot in (left + (right - left) // 4, right - (right - left) // 4):
        draw.ellipse((foot - 18, bottom - 16, foot + 18, bottom + 8), fill=fill, outline=_OUTLINE, width=_LINE)

    body = Image.new("L", sprite.size, 0)
    _draw_body(ImageDraw.Draw(body), monster.shape, box)
    skin = Image.new("RGBA", sprite.size, fill)
    _draw_pattern(ImageDraw.Draw(skin), monster, box)
    inner = Image.new("L", sprite.size, 0)
    _draw_body(ImageDraw.Draw(inner), monster.shape, (left + _LINE, top + _LINE, right - _LINE, bottom - _LINE))
    sprite.paste(Image.new("RGBA", sprite.size, _OUTLINE), (0, 0), body)
    sprite.paste(skin, (0, 0), inner)

    height = bottom - top
    gaze = top + round(height * (0.52 if monster.shape == "pointed" else 0.36))
    if monster.eyes == "one":
        _draw_eye(draw, middle, gaze, 25)
    else:
        for x in (middle - 21, middle + 21):
            _draw_eye(draw, x, gaze, 17)
    mouth = top + round(height * 0.76)
    draw.arc((middle - 20, mouth - 14, middle + 20, mouth + 10), 20, 160, fill=_OUTLINE, width=_LINE)
    return sprite


def _draw_body(draw: ImageDraw.ImageDraw, shape: str, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    if shape == "pointed":
        middle, slope = (left + right) / 2, 14
        draw.polygon([(middle - slope / 2, top), (middle + slope / 2, top), (right, bottom), (left, bottom)], fill=255)
    elif shape == "square":
        draw.rounded_rectangle(box, radius=12, fill=255)
    elif shape == "tall":
        draw.rounded_rectangle(box, radius=40, fill=255)
    else:
        draw.ellipse(box, fill=255)


def _draw_pattern(draw: ImageDraw.ImageDraw, monster: Monster, box: tuple[int, int, int, int]) -> None:
    left, top, right, bottom = box
    red, green, blue = COLORS[monster.color]
    # Light skins get dark marks and dark skins light ones, so that a pattern shows on every colour.
    light = 0.3 * red + 0.59 * green + 0.11 * blue > 150
    mark = (90, 60, 40, 255) if light else (252, 246, 214, 255)
    if monster.pattern == "striped":
        for y in range(top + 10, bottom, 34):
            draw.rectangle((left, y, right, y + 14), fill=mark)
    elif monster.pattern == "spotted":
        for row, y in enumerate(range(top + 16, bottom + 10, 34)):
            for x in range(left + (6 if row % 2 else 24), right + 10, 38):
                draw.ellipse((x - 10, y - 10, x + 10, y + 10), fill=mark)


def _draw_headgear(draw: ImageDraw.ImageDraw, kind: str, x: int, y: int) -> None:
    """Draw on a head whose top is at (x, y)."""
    if kind == "horns":
        for side in (-1, 1):
            points = [(x + side * 14, y + 14), (x + side * 46, y + 16), (x + side * 52, y - 36)]
            draw.polygon(points, fill=(232, 222, 190, 255), outline=_OUTLINE, width=_LINE)
    elif kind == "hat":
        draw.rectangle((x - 30, y - 44, x + 30, y + 6), fill=(52, 48, 60, 255))
        draw.rectangle((x - 30, y - 16, x + 30, y - 4), fill=(214, 60, 60, 255))
        draw.rectangle((x - 50, y - 4, x + 50, y + 8), fill=(52, 48, 60, 255))
    elif kind == "crown":
        points = [(-40, 10), (-40, -38), (-20, -12), (0, -42), (20, -12), (40, -38), (40, 10)]
        gold = [(x + dx, y + dy) for dx, dy in points]
        draw.polygon(gold, fill=(252, 200, 40, 255), outline=(150, 100, 10, 255), width=_LINE)
    elif kind == "antenna":
        draw.line([(x, y + 10), (x, y - 22)], fill=_OUTLINE, width=9)
        draw.ellipse((x - 15, y - 44, x + 15, y - 14), fill=(60, 220, 220, 255), outline=_OUTLINE, width=_LINE)


def _draw_eye(draw: ImageDraw.ImageDraw, x: int, y: int, radius: int) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(255, 255, 255, 255), outline=_OUTLINE, width=5)
    pupil = radius * 0.42
    draw.ellipse((x - pupil, y - pupil, x + pupil, y + pupil), fill=(24, 20, 30, 255))


def random_monster(rng: np.random.Generator) -> Monster:
    """Return a monster with each attribute drawn evenly."""
    values = {name: choices[int(rng.integers(len(choices)))] for name, choices in ATTRIBUTES.items()}
    return Monster(**values)
