"""A small drawing of identity over frames: a thin line for each clip, a thick one for the mean of each variant."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_plot"]

_WIDTH, _HEIGHT = 640, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 624, 40, 280
_FINE = 2  # lines are drawn this much larger and reduced, so that they are smooth
_TEXT = 12
_INK, _FAINT, _GRID, _PAPER = "#1b1b1f", "#73737c", "#e4e4e8", "#ffffff"
# For a variant of any other name the last one. Thin lines are lighter.
_COLOURS = {"base": ("#73737c", "#d3d3d8"), "engram": ("#c2410c", "#f3c9b5"), "": ("#1d4ed8", "#bccdf5")}
_STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
_MOST_TICKS = 6

Floats = npt.NDArray[np.float32]


def draw_plot(title: str, curves: Mapping[str, Sequence[Floats]]) -> Image.Image:
    """Return a drawing of values over the frames of clips.

    Clips of unlike length are stretched to the longest one.

    Args:
        title: what the values are.
        curves: the values of each clip, [F], by variant; at least one clip.
    """
    longest = max(len(curve) for clips in curves.values() for curve in clips)
    stretched = {variant: np.stack([_stretch(curve, longest) for curve in clips]) for variant, clips in curves.items()}
    low, high, step = _find_axis(np.concatenate(list(stretched.values())))
    sheet = Image.new("RGB", (_WIDTH * _FINE, _HEIGHT * _FINE), _PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT * _FINE)

    def place(frame: float, value: float) -> tuple[float, float]:
        x = _LEFT + frame / max(1, longest - 1) * (_RIGHT - _LEFT)
        y = _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)
        return x * _FINE, y * _FINE

    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        pen.line([place(0, value), place(max(1, longest - 1), value)], _GRID, _FINE)
        pen.text(((_LEFT - 8) * _FINE, place(0, value)[1]), f"{value:.2f}", _FAINT, font, anchor="rm")
    for frame in sorted({0, (longest - 1) // 2, longest - 1}):
        pen.text((place(frame, low)[0], (_BOTTOM + 8) * _FINE), str(frame), _FAINT, font, anchor="mt")
    pen.text(((_LEFT + _RIGHT) / 2 * _FINE, (_BOTTOM + 26) * _FINE), "frame", _FAINT, font, anchor="mt")
    for variant, clips in stretched.items():
        for clip in clips:
            _draw_line(pen, [place(frame, value) for frame, value in enumerate(clip)], _colour(variant)[1], 1)
    for variant, clips in stretched.items():
        _draw_line(pen, [place(frame, value) for frame, value in enumerate(clips.mean(axis=0))], _colour(variant)[0], 3)
    pen.text((_LEFT * _FINE, 12 * _FINE), title, _INK, font, anchor="lt")
    _draw_legend(pen, font, list(curves))
    return sheet.resize((_WIDTH, _HEIGHT), Image.Resampling.LANCZOS)


def _draw_line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int) -> None:
    if len(points) == 1:
        ((x, y),) = points
        size = (width + 1) * _FINE
        pen.ellipse([x - size, y - size, x + size, y + size], colour)
    else:
        pen.line(list(points), colour, width * _FINE, joint="curve")


def _draw_legend(
    pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, variants: Sequence[str]
) -> None:
    """Write the names of the variants in their colours, from the right."""
    x = float(_RIGHT * _FINE)
    for variant in reversed(variants):
        pen.text((x, 12 * _FINE), variant, _colour(variant)[0], font, anchor="rt")
        x -= font.getlength(variant) + 16 * _FINE


def _colour(variant: str) -> tuple[str, str]:
    return _COLOURS.get(variant, _COLOURS[""])


def _stretch(curve: Floats, length: int) -> npt.NDArray[np.float64]:
    return np.interp(np.linspace(0, 1, length), np.linspace(0, 1, len(curve)), curve)


def _find_axis(values: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Return where the axis begins and ends, and the distance of its ticks."""
    low, high = float(values.min()), float(values.max())
    step = next((step for step in _STEPS if (high - low) / step <= _MOST_TICKS - 1), 1.0)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if first == last:
        last += 1
    return first * step, last * step, step
