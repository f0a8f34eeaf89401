"""Pictures side by side with labels: one row a prompt, one column a variant."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

__all__ = ["draw_grid"]

_GAP = 8
_TEXT = 14
_LABEL_WIDTH = 220
_SMALLEST = 128  # tiny pictures are enlarged, by whole factors so that pixels stay square
_INK, _PAPER = "#1b1b1f", "#ffffff"


def draw_grid(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
    """Return a picture of labelled pictures.

    Args:
        columns: what each column shows.
        rows: a label and one picture for each column; all pictures have one size.
    """
    width, height = rows[0][1][0].size
    factor = -(-_SMALLEST // min(width, height)) if min(width, height) < _SMALLEST else 1
    width, height = width * factor, height * factor
    font = ImageFont.load_default(_TEXT)
    top = 2 * _GAP + _TEXT
    sheet = Image.new(
        "RGB",
        (_LABEL_WIDTH + len(columns) * (width + _GAP), top + len(rows) * (height + _GAP)),
        _PAPER,
    )
    pen = ImageDraw.Draw(sheet)
    for number, title in enumerate(columns):
        pen.text((_LABEL_WIDTH + number * (width + _GAP), _GAP), title, _INK, font)
    for row, (label, images) in enumerate(rows):
        y = top + row * (height + _GAP)
        lines = _wrap(label, font, _LABEL_WIDTH - 2 * _GAP)[: max(1, height // (_TEXT + 4))]
        pen.multiline_text((_GAP, y), "\n".join(lines), _INK, font, spacing=4)
        for number, image in enumerate(images):
            enlarged = image.convert("RGB").resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (_LABEL_WIDTH + number * (width + _GAP), y))
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> list[str]:
    average = max(1.0, font.getlength(text) / max(1, len(text)))
    return textwrap.wrap(text, max(8, int(width / average))) or [""]
