"""What ships with this package: the tiny checkpoint, its judge, and the demo's reference pictures."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from engram_core import InputError

__all__ = ["TINY", "characters_folder", "judge_folder", "tiny_fingerprint", "tiny_folder"]

TINY = "tiny"
"""The name of the checkpoint that ships with this package."""

_ROOT = Path(__file__).parent / "tiny"


def tiny_folder() -> Path:
    """Return the checkpoint, a `StableDiffusionPipeline` in diffusers layout."""
    return _existing(_ROOT / "sd15", "model_index.json")


def judge_folder() -> Path:
    """Return the classifier that tells the small world's subjects and scenes."""
    return _existing(_ROOT / "judge", "config.json")


def characters_folder() -> Path:
    """Return the demo's characters: a folder of captioned pictures for each."""
    return _existing(_ROOT / "characters", "characters.json")


@cache
def tiny_fingerprint() -> str:
    """Return the hex SHA-256 over the checkpoint's weights."""
    digest = hashlib.sha256()
    for path in sorted(tiny_folder().rglob("*.safetensors")):
        digest.update(path.relative_to(tiny_folder()).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _existing(folder: Path, file: str) -> Path:
    if not (folder / file).is_file():
        raise InputError(f"{folder}: {file} is missing; install engram-vision again, or run its recipe")
    return folder
