"""Pictures as training sees them: fully checked, upright, RGB, square. Importing this imports no torch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from engram_core import InputError
from engram_core.errors import one_line, show_text

__all__ = ["SUFFIXES", "Crop", "Note", "fit_square", "ignore_note", "is_animated", "load_picture", "show_path"]

Note = Callable[[str], None]
"""Takes one line that the user should know but did not ask for, e.g. `Watcher.note` of `engram_core`."""

Crop = Literal["centre"] | tuple[float, float]
"""Where a square is cut: the centre, or (x, y) from (0, 0), left and top, to (1, 1), right and bottom."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
"""Names that pictures end in, in any case; the content alone decides how one is decoded."""

# Only these decoders are tried: Pillow has others, and one of them (EPS) starts a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")


def ignore_note(message: str) -> None:
    """Take a note and do nothing."""


def show_path(path: Path) -> str:
    """Return a path for a message: on one line, whatever the file is called."""
    return show_text(str(path))


def load_picture(path: Path, *, resolution: int | None = None, note: Note = ignore_note) -> Image.Image:
    """Decode a picture in full and return it as RGB.

    It is turned upright as its EXIF data says. Transparent parts show white. 16-bit values are scaled to 8 bits. Colour
    profiles (ICC) are ignored, as diffusers' training scripts do.

    While it runs it sets Python's warning filters, so call it from one thread at a time.

    Args:
        path: the file.
        resolution: pixels a side that training will cut from it; None when that is not known yet.
        note: told when the picture is smaller than `resolution`, and so will be enlarged.

    Raises:
        InputError: the file cannot be read, is no picture of a supported format, is damaged or truncated, holds several
            frames or pages, or has more pixels than Pillow decodes (`PIL.Image.MAX_IMAGE_PIXELS`).
    """
    where = show_path(path)
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow, about metadata that training does not use
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = _decode(stream, where)
    except InputError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{where}: is too large to decode safely: {_reason(error)}; scale it down") from None
    except UnidentifiedImageError:
        raise InputError(
            f"{where}: its {path.stat().st_size} bytes are no {', '.join(_FORMATS)} picture, or are damaged; "
            "replace it, or convert it to PNG"
        ) from None
    except Exception as error:  # noqa: BLE001 - junk makes decoders raise almost anything
        raise InputError(f"{where}: cannot be read as a picture: {_reason(error)}; replace it") from None
    if resolution is not None and min(image.size) < resolution:
        width, height = image.size
        note(f"{where}: is {width}x{height}, smaller than the resolution {resolution}x{resolution}; it is enlarged")
    return image


def is_animated(path: Path) -> bool:
    """Return whether a GIF has several frames; what is wrong with a broken one is told when it is read."""
    try:
        with Image.open(path, formats=("GIF",)) as image:
            return getattr(image, "n_frames", 1) > 1
    except Exception:  # noqa: BLE001 - junk makes decoders raise almost anything
        return False


def fit_square(image: Image.Image, size: int, crop: Crop = "centre") -> Image.Image:
    """Return a square of a picture, `size` pixels a side.

    The picture is resized with the Lanczos filter until its shorter side is `size`, and the square is cut from the
    result: the resize and crop of diffusers' training scripts. A picture that is smaller is enlarged.

    Args:
        image: an RGB picture.
        size: pixels a side.
        crop: where to cut along the longer side (the shorter one leaves no choice).

    Raises:
        InputError: a size below 1, or a crop outside 0..1.
    """
    if size < 1:
        raise InputError(f"size is {size}, expected at least 1 pixel a side")
    x, y = (0.5, 0.5) if crop == "centre" else crop
    if not (0 <= x <= 1 and 0 <= y <= 1):
        raise InputError(f"crop is ({x}, {y}), expected fractions from 0 to 1")
    short = min(image.size)
    # The sizes and offsets are those of torchvision's Resize and CenterCrop.
    resized = [size if side == short else int(size * side / short) for side in image.size]
    starts = [round(fraction * (side - size)) for fraction, side in zip((x, y), resized, strict=True)]
    scales = [side / new for side, new in zip(image.size, resized, strict=True)]
    left, top = (start * scale for start, scale in zip(starts, scales, strict=True))
    right, bottom = ((start + size) * scale for start, scale in zip(starts, scales, strict=True))
    # Only the square is computed: the whole of a long, thin picture could be larger than memory.
    return image.resize((size, size), Image.Resampling.LANCZOS, box=(left, top, right, bottom))


def _decode(stream: BinaryIO, where: str) -> Image.Image:
    with Image.open(stream, formats=_FORMATS) as image:
        image.verify()  # checks the sums that decoding skips, and leaves the image unusable
    stream.seek(0)
    with Image.open(stream, formats=_FORMATS) as image:
        # Cameras add previews to a JPEG, which Pillow then calls MPO; its first picture is the one that is meant.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            raise InputError(f"{where}: holds {frames} frames or pages; save the one to learn from as a picture")
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image), where)


def _to_rgb(image: Image.Image, where: str) -> Image.Image:
    if image.mode in _SIXTEEN_BIT:
        # Pillow would cut off what exceeds 255.
        values = np.asarray(image).astype(np.uint32)
        grey = (values * 255 + 32767) // 65535
        grey[values == image.info.get("transparency", -1)] = 255
        return Image.fromarray(grey.astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise InputError(
            f"{where}: has 32-bit values (mode {image.mode}), whose black and white are unknown; "
            "save it with 8 or 16 bits"
        )
    if image.has_transparency_data:
        clear = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", clear.size, "white"), clear)
    return image.convert("RGB")


def _reason(error: BaseException) -> str:
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return show_text(one_line(text) or type(error).__name__)  # decoders may quote from the file
