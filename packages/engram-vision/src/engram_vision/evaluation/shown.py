"""The pictures and clips that are measured: those on disk, with what they say of themselves.

Shapes: F frames, uint8 [F, H, W, 3]; a picture has one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_core import InputError
from engram_vision.images import SUFFIXES, load_picture, show_path

__all__ = [
    "UNKNOWN",
    "Shown",
    "describe_file",
    "find_pictures",
    "name_variant",
    "open_files",
    "open_picture",
]

UNKNOWN = "files"
"""The variant of what does not say how it was made."""

_OVERVIEWS = ("grid.png", "sheet.png", "identity.png")  # of other commands; no pictures of the model
_METADATA = "metadata.jsonl"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shown:
    """A picture or clip.

    Attributes:
        variant: `base`, `engram`, `lora` or `UNKNOWN`.
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


Find = Callable[[Path, Sequence[Path]], Sequence[Path]]
Open = Callable[[Path, "str | None"], Shown]


def name_variant(facts: Mapping[str, str]) -> str:
    """Return the variant that a file's facts tell of."""
    engrams = facts.get("engrams")
    if engrams is None:
        return UNKNOWN
    if facts.get("lora"):
        return "lora"
    return "base" if engrams.strip() == "[]" else "engram"


def open_files(places: Sequence[Path], find: Find, open_file: Open) -> list[Shown]:
    """Return what is on disk; each file is decoded once, so that a broken one is noticed now.

    The prompt is the one in the file, as `engram generate` writes it, else the `text` of its line in `metadata.jsonl`.

    Args:
        places: files, or folders, whose hidden files, subfolders and overview pictures are passed over.
        find: chooses among a folder's files, in the order of their names; raises InputError where none will do.
        open_file: returns a file with its caption.

    Raises:
        InputError: a place does not exist or holds nothing to measure, or a file cannot be read.
    """
    files = list(dict.fromkeys(file for place in places for file in _list_files(place, find)))
    captions = {folder: _read_captions(folder) for folder in {file.parent for file in files}}
    return [open_file(file, captions[file.parent].get(file.name)) for file in files]


def find_pictures(place: Path, files: Sequence[Path]) -> list[Path]:
    """Return the pictures among a folder's files; see `open_files`."""
    found = [file for file in files if file.suffix.lower() in SUFFIXES]
    if not found:
        raise InputError(f"{show_path(place)}: holds no pictures ({', '.join(SUFFIXES)}); give a folder that does")
    return found


def open_picture(file: Path, caption: str | None) -> Shown:
    """Return a picture with what its file says of it, else with its caption."""
    load_picture(file)
    return describe_file(file, _read_chunks(file), caption, lambda: np.asarray(load_picture(file))[None])


def describe_file(file: Path, facts: Mapping[str, str], caption: str | None, read: Callable[[], Pixels]) -> Shown:
    """Return a file with what `engram generate` wrote into it.

    Args:
        file: the file.
        facts: what it says of itself.
        caption: what stands in for a prompt that it does not tell.
        read: returns the frames.
    """
    seed = facts.get("seed", "")
    return Shown(
        variant=name_variant(facts),
        prompt=facts.get("prompt") or caption,
        seed=int(seed) if seed.isdecimal() else None,
        file=file,
        read=read,
    )


def _list_files(place: Path, find: Find) -> Sequence[Path]:
    if place.is_file():
        return [place]
    if not place.is_dir():
        raise InputError(f"{show_path(place)}: does not exist; give files, or a folder of them")
    files = sorted(file for file in place.iterdir() if file.is_file() and not file.name.startswith("."))
    return find(place, [file for file in files if file.name not in _OVERVIEWS])


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
