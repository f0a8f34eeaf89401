"""The clips and pictures that are measured: those on disk, with what they say of themselves.

Shapes: F frames, uint8 [F, H, W, 3]; a picture is a clip of one frame.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_core import InputError
from engram_video.clips import SUFFIXES as CLIP_SUFFIXES
from engram_video.clips import probe_clip, read_clip, read_facts
from engram_vision.images import SUFFIXES as PICTURE_SUFFIXES
from engram_vision.images import load_picture, show_path

__all__ = ["UNKNOWN", "Shown", "name_variant", "open_files"]

UNKNOWN = "clips"
"""The variant of what does not say how it was made."""

_OVERVIEWS = ("grid.png", "sheet.png", "identity.png")  # of other commands; no pictures of the model
_METADATA = "metadata.jsonl"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """A clip or picture.

    Attributes:
        variant: `base`, `engram` or `UNKNOWN`.
        prompt: what was asked for; None when unknown.
        seed: of the noise; None when unknown.
        file: where it is; None for what was not kept.
        read: returns the frames.
    """

    variant: str
    prompt: str | None
    seed: int | None
    file: Path | None
    read: Callable[[], Pixels]


def name_variant(engrams: str | None) -> str:
    """Return the variant that a file's fact `engrams` tells of."""
    if engrams is None:
        return UNKNOWN
    return "base" if engrams.strip() == "[]" else "engram"


def open_files(places: Sequence[Path]) -> list[Shown]:
    """Return clips and pictures on disk; each is decoded once, so that a broken one is noticed now.

    The prompt is the one in the file, as `engram generate` writes it, else the `text` of its line in `metadata.jsonl`.

    Args:
        places: files, or folders: of these the clips, or where there are none the pictures, in the order of their
            names; hidden files, subfolders and overview pictures are passed over.

    Raises:
        InputError: a place does not exist or holds nothing to measure, or a file cannot be read.
    """
    files = list(dict.fromkeys(file for place in places for file in _list_files(place)))
    captions = {folder: _read_captions(folder) for folder in {file.parent for file in files}}
    return [_open_file(file, captions[file.parent].get(file.name)) for file in files]


def _list_files(place: Path) -> list[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{show_path(place)}: does not exist; give clips, pictures, or a folder of them")
    files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    clips = [file for file in files if file.suffix.lower() in CLIP_SUFFIXES and file.suffix.lower() != ".gif"]
    pictures = [file for file in files if file.suffix.lower() in PICTURE_SUFFIXES and file.name not in _OVERVIEWS]
    if not clips and not pictures:
        raise InputError(
            f"{show_path(place)}: holds neither clips ({', '.join(CLIP_SUFFIXES)}) nor pictures "
            f"({', '.join(PICTURE_SUFFIXES)}); give a folder that does"
        )
    return clips or pictures


def _open_file(file: Path, caption: str | None) -> Shown:
    suffix = file.suffix.lower()
    is_picture = suffix in PICTURE_SUFFIXES and (suffix != ".gif" or _is_still(file))
    if is_picture:
        load_picture(file)
    else:
        probe_clip(file)
    facts = _read_chunks(file) if is_picture else read_facts(file)
    seed = facts.get("seed", "")
    return Shown(
        variant=name_variant(facts.get("engrams")),
        prompt=facts.get("prompt") or caption,
        seed=int(seed) if seed.isdecimal() else None,
        file=file,
        read=lambda: np.asarray(load_picture(file))[None] if is_picture else read_clip(file).frames,
    )


def _is_still(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            return getattr(image, "n_frames", 1) == 1
    except OSError:
        return True  # what is wrong with it is told when it is read


def _read_chunks(file: Path) -> dict[str, str]:
    """Return the texts in a picture that was fully decoded before."""
    with Image.open(file) as image:
        image.load()
        return {str(name): str(text) for name, text in image.info.items() if isinstance(text, str)}


def _read_captions(folder: Path) -> dict[str, str]:
    """Return captions by file name; lines of another kind say nothing about files here."""
    file = folder / _METADATA
    if not file.is_file():
        return {}
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{show_path(file)}: cannot be read: {error}; mend or remove it") from None
    return {
        row["file_name"]: row["text"]
        for row in rows
        if isinstance(row, dict) and isinstance(row.get("file_name"), str) and isinstance(row.get("text"), str)
    }
