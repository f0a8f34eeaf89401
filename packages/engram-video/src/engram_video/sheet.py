"""Contact sheets: a row for each clip, frames from its first to its last, a label at the left."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from engram_core import InputError
from engram_video.frames import sample_indices

__all__ = ["draw_sheet"]

_GAP, _SEAM = 8, 2  # between rows, and between the frames of one clip
_TEXT, _LINE = 14, 18
_LABEL_WIDTH = 220
_SMALLEST, _LARGEST = 96, 240  # pixels of a frame's longer side
_INK, _FAINT, _PAPER = "#1b1b1f", "#73737c", "#ffffff"

Pixels = npt.NDArray[np.uint8]


def draw_sheet(rows: Sequence[tuple[str, Pixels]], *, columns: int = 8) -> Image.Image:
    """Return a picture of labelled clips, one below another.

    Frames that are evenly sampled stand side by side, with their numbers above where all clips have the same. Small
    ones are enlarged by whole factors, so that pixels stay square, and large ones are reduced. To compare two clips,
    say one with an engram and one without, give them as two rows.

    Args:
        rows: a label and frames, uint8 [F, H, W, 3], for each clip; clips may differ in all but the 3.
        columns: frames shown of each clip, or all where it has fewer.

    Raises:
        InputError: there is no clip, or less than one frame is to be shown.
    """
    if not rows or columns < 1:
        raise InputError(f"a contact sheet of {len(rows)} clips and {columns} frames of each has nothing to show")
    shown = [sample_indices(len(clip), min(columns, len(clip))) for _, clip in rows]
    strips = [[_scale(clip[index]) for index in indices] for (_, clip), indices in zip(rows, shown, strict=True)]
    is_numbered = all(indices == shown[0] for indices in shown) and len({strip[0].width for strip in strips}) == 1
    top = _GAP + (_LINE if is_numbered else 0)
    width = _LABEL_WIDTH + max(len(strip) * (strip[0].width + _SEAM) - _SEAM for strip in strips) + _GAP
    sheet = Image.new("RGB", (width, top + sum(strip[0].height + _GAP for strip in strips)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_TEXT)
    if is_numbered:
        for column, index in enumerate(shown[0]):
            pen.text((_LABEL_WIDTH + column * (strips[0][0].width + _SEAM), _GAP // 2), str(index), _FAINT, font)
    y = top
    for (label, _), strip in zip(rows, strips, strict=True):
        pen.multiline_text((_GAP, y), "\n".join(_wrap(label, font, strip[0].height)), _INK, font, spacing=4)
        for column, image in enumerate(strip):
            sheet.paste(image, (_LABEL_WIDTH + column * (image.width + _SEAM), y))
        y += strip[0].height + _GAP
    return sheet


def _scale(frame: Pixels) -> Image.Image:
    """Return a frame at the size in which it is shown."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    longer = max(image.size)
    if longer < _SMALLEST:
        factor = -(-_SMALLEST // longer)
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    if longer <= _LARGEST:
        return image
    width, height = (max(1, round(side * _LARGEST / longer)) for side in image.size)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def _wrap(label: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, height: int) -> list[str]:
    """Return the lines of a label that fit beside a frame, the last one with an ellipsis where text is left out."""
    average = max(1.0, font.getlength(label.replace("\n", " ")) / max(1, len(label)))
    n_columns = max(8, int((_LABEL_WIDTH - 3 * _GAP) / average))
    lines = [line for paragraph in label.splitlines() for line in textwrap.wrap(paragraph, n_columns)]
    n_lines = max(1, height // _LINE)
    if len(lines) > n_lines:
        lines = [*lines[: n_lines - 1], lines[n_lines - 1][: n_columns - 1] + "…"]
    return lines
