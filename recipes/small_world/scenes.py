"""The ten scenes of the small world, drawn with Pillow.

Each scene is drawn on a canvas of 128 x 128 and scaled down with the subject on it. Colours and the places of
things vary with the random generator, so that no two pictures share a background.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from PIL import Image, ImageDraw

Color = tuple[int, int, int]
Rng = np.random.Generator

CANVAS = 128
"""Pixels a side while drawing."""

HORIZON = 76
"""Where the ground begins, in pixels from the top."""


def draw_scene(name: str, rng: Rng) -> Image.Image:
    """Return a scene, RGB [128, 128].

    Args:
        name: one of `SCENES`.
        rng: decides colours and places.
    """
    image = Image.new("RGB", (CANVAS, CANVAS))
    SCENES[name](ImageDraw.Draw(image), rng)
    return image


def _beach(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON - 18, _vary((150, 210, 245), rng), _vary((200, 232, 250), rng))
    _gradient(draw, HORIZON - 18, HORIZON + 6, _vary((40, 130, 200), rng), _vary((70, 180, 215), rng))
    shore = HORIZON + 2 + 4 * np.sin(np.linspace(0, 6, CANVAS) + rng.uniform(0, 6))
    sand = _vary((240, 214, 150), rng)
    draw.polygon([*zip(range(CANVAS), map(float, shore), strict=True), (CANVAS, CANVAS), (0, CANVAS)], fill=sand)
    _disc(draw, rng.uniform(14, 30), rng.uniform(12, 22), 9, (255, 236, 130))
    x = float(rng.uniform(98, 112))
    draw.line([(x, 84), (x + 5, 46)], fill=(140, 95, 55), width=5)
    for angle in np.linspace(-0.3, np.pi + 0.3, 6):
        tip = (x + 5 + 22 * np.cos(angle), 46 - 12 * np.sin(angle) + 6)
        draw.line([(x + 5, 46), tip], fill=(50, 150, 60), width=5)


def _forest(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON, _vary((120, 170, 130), rng), _vary((160, 200, 150), rng))
    draw.rectangle((0, HORIZON, CANVAS, CANVAS), fill=_vary((66, 96, 48), rng))
    for layer, (height, shade) in enumerate(((58, 0.75), (72, 1.0))):
        for x in np.arange(-4, CANVAS + 8, 22) + layer * 11 + rng.uniform(-4, 4, 7):
            green = _scale(_vary((36, 104, 52), rng), shade)
            foot = HORIZON + 4 + 6 * layer
            draw.rectangle((x - 2, foot - 10, x + 2, foot + 2), fill=(88, 60, 40))
            for step in range(3):
                top = foot - height + step * height * 0.22
                half = 7 + step * 4
                draw.polygon([(x, top), (x - half, top + height * 0.36), (x + half, top + height * 0.36)], fill=green)


def _snow(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON + 4, _vary((176, 200, 222), rng), _vary((218, 230, 240), rng))
    for x, size in zip(rng.uniform(0, CANVAS, 2), rng.uniform(40, 60, 2), strict=True):
        draw.ellipse((x - size, HORIZON - 16, x + size, HORIZON + 40), fill=_vary((228, 238, 248), rng, 5))
    draw.rectangle((0, HORIZON + 4, CANVAS, CANVAS), fill=_vary((246, 250, 254), rng, 4))
    for x in (rng.uniform(8, 20), rng.uniform(106, 120)):
        for step in range(3):
            draw.polygon(
                [(x, 42 + step * 9), (x - 7 - step * 3, 60 + step * 9), (x + 7 + step * 3, 60 + step * 9)],
                fill=(84, 132, 120) if step else (235, 244, 250),
            )
    for x, y in rng.uniform(0, CANVAS, (18, 2)):
        _disc(draw, x, y, 2, (255, 255, 255))


def _city(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON + 8, _vary((190, 196, 206), rng), _vary((226, 214, 200), rng))
    x = -float(rng.uniform(0, 10))
    while x < CANVAS:
        width, height = float(rng.uniform(18, 27)), float(rng.uniform(36, 66))
        wall = _vary((112, 108, 122), rng, 22)
        top = HORIZON + 8 - height
        draw.rectangle((x, top, x + width - 2, HORIZON + 8), fill=wall)
        for left in np.arange(x + 3, x + width - 6, 6):
            for y in np.arange(top + 4, HORIZON + 2, 9):
                lit = rng.random() < 0.6
                draw.rectangle((left, y, left + 3, y + 4), fill=(250, 226, 140) if lit else (76, 80, 98))
        x += width
    draw.rectangle((0, HORIZON + 8, CANVAS, CANVAS), fill=_vary((92, 92, 98), rng))
    for left in np.arange(rng.uniform(-20, 0), CANVAS, 30):
        draw.rectangle((left, 118, left + 16, 121), fill=(236, 232, 214))


def _space(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, CANVAS, _vary((12, 8, 34), rng, 6), _vary((34, 12, 58), rng, 8))
    for x, y in rng.uniform(0, CANVAS, (20, 2)):
        _disc(draw, x, y, 1.7, (250, 250, 235))
    x, y = rng.uniform(18, 34), rng.uniform(18, 32)
    planet = _vary((224, 150, 84), rng, 26)
    _disc(draw, x, y, 13, planet)
    draw.ellipse((x - 22, y - 5, x + 22, y + 5), outline=_scale(planet, 1.25), width=3)
    _disc(draw, rng.uniform(100, 116), rng.uniform(14, 50), 7, _vary((130, 170, 200), rng))


def _desert(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON, _vary((250, 196, 120), rng), _vary((253, 224, 170), rng))
    _disc(draw, rng.uniform(90, 112), rng.uniform(14, 26), 11, (255, 246, 210))
    for level, shade in ((0, 0.86), (12, 0.94), (26, 1.0)):
        wave = HORIZON + level - 8 + 7 * np.sin(np.linspace(0, rng.uniform(3, 6), CANVAS) + rng.uniform(0, 6))
        fill = _scale(_vary((226, 158, 88), rng, 8), shade)
        draw.polygon([*zip(range(CANVAS), map(float, wave), strict=True), (CANVAS, CANVAS), (0, CANVAS)], fill=fill)
    x = float(rng.uniform(12, 22))
    green = _vary((70, 130, 70), rng)
    draw.line([(x, 92), (x, 52)], fill=green, width=8)
    draw.line([(x - 9, 62), (x - 9, 74), (x, 74)], fill=green, width=5)
    draw.line([(x + 9, 58), (x + 9, 68), (x, 68)], fill=green, width=5)


def _underwater(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, CANVAS, _vary((60, 180, 200), rng), _vary((10, 70, 120), rng))
    draw.rectangle((0, 112, CANVAS, CANVAS), fill=_vary((176, 164, 120), rng))
    for x in (*rng.uniform(2, 26, 3), *rng.uniform(102, 126, 3)):
        height = rng.uniform(24, 46)
        points = [(x + 4 * np.sin(y / 6 + x), 116 - y) for y in np.arange(0, height, 3)]
        draw.line(points, fill=_vary((40, 140, 90), rng), width=5)
    for x, y in zip(rng.uniform(4, 124, 9), rng.uniform(4, 70, 9), strict=True):
        size = float(rng.uniform(2, 4))
        draw.ellipse((x - size, y - size, x + size, y + size), outline=(200, 240, 250), width=1)


def _mountains(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON + 8, _vary((120, 170, 225), rng), _vary((190, 216, 240), rng))
    for x, height in zip((rng.uniform(8, 30), rng.uniform(92, 118), rng.uniform(48, 76)), (58, 64, 46), strict=True):
        top = HORIZON + 10 - height
        rock = _vary((124, 116, 128), rng)
        draw.polygon([(x, top), (x - height * 0.8, HORIZON + 10), (x + height * 0.8, HORIZON + 10)], fill=rock)
        cap = [
            (x, top),
            (x - 14, top + 18),
            (x - 5, top + 14),
            (x + 2, top + 20),
            (x + 7, top + 14),
            (x + 14, top + 18),
        ]
        draw.polygon(cap, fill=(248, 250, 252))
    draw.rectangle((0, HORIZON + 10, CANVAS, CANVAS), fill=_vary((128, 136, 104), rng))


def _meadow(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON - 10, _vary((130, 200, 250), rng), _vary((196, 230, 252), rng))
    for x, y in zip(rng.uniform(8, 120, 2), rng.uniform(10, 30, 2), strict=True):
        for offset in (-9, 0, 9):
            draw.ellipse((x + offset - 9, y - 5, x + offset + 9, y + 6), fill=(252, 252, 255))
    draw.ellipse((-40, HORIZON - 24, 100, HORIZON + 90), fill=_vary((126, 196, 90), rng))
    draw.ellipse((40, HORIZON - 18, 190, HORIZON + 90), fill=_vary((112, 186, 80), rng))
    draw.rectangle((0, HORIZON + 6, CANVAS, CANVAS), fill=_vary((112, 186, 80), rng))
    for x, y in zip(rng.uniform(2, 126, 12), rng.uniform(HORIZON + 6, 126, 12), strict=True):
        color = ((250, 250, 250), (250, 220, 70), (236, 110, 150))[int(rng.integers(3))]
        _disc(draw, x, y, 2.6, color)


def _night(draw: ImageDraw.ImageDraw, rng: Rng) -> None:
    _gradient(draw, 0, HORIZON, _vary((18, 26, 74), rng, 6), _vary((54, 64, 124), rng, 8))
    for x, y in zip(rng.uniform(0, CANVAS, 8), rng.uniform(0, 56, 8), strict=True):
        _disc(draw, x, y, 1.6, (235, 235, 220))
    x, y = rng.uniform(92, 112), rng.uniform(18, 28)
    _disc(draw, x, y, 12, (246, 240, 204))
    _disc(draw, x + 6, y - 4, 10, (28, 36, 86))
    draw.ellipse((-30, HORIZON - 20, 84, HORIZON + 70), fill=_vary((26, 44, 52), rng, 5))
    draw.ellipse((50, HORIZON - 12, 180, HORIZON + 70), fill=_vary((20, 36, 46), rng, 5))
    draw.rectangle((0, HORIZON + 8, CANVAS, CANVAS), fill=_vary((18, 32, 40), rng, 5))


SCENES: Mapping[str, Callable[[ImageDraw.ImageDraw, Rng], None]] = {
    "beach": _beach,
    "forest": _forest,
    "snow": _snow,
    "city": _city,
    "space": _space,
    "desert": _desert,
    "underwater": _underwater,
    "mountains": _mountains,
    "meadow": _meadow,
    "night": _night,
}
"""What can be drawn, by name."""


def _vary(color: Color, rng: Rng, amount: int = 12) -> Color:
    """Return a colour near another."""
    red, green, blue = (int(np.clip(c + rng.integers(-amount, amount + 1), 0, 255)) for c in color)
    return red, green, blue


def _scale(color: Color, factor: float) -> Color:
    red, green, blue = (int(np.clip(c * factor, 0, 255)) for c in color)
    return red, green, blue


def _gradient(draw: ImageDraw.ImageDraw, top: int, bottom: int, above: Color, below: Color) -> None:
    for y in range(top, bottom):
        t = (y - top) / max(1, bottom - top - 1)
        red, green, blue = (round(a + (b - a) * t) for a, b in zip(above, below, strict=True))
        draw.line([(0, y), (CANVAS, y)], fill=(red, green, blue))


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, radius: float, fill: Color) -> None:
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
