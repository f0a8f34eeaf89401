"""What ships with this package: the tiny checkpoints, their judge, and the demo's reference pictures."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from engram_core import InputError
from engram_vision.families import known_families

__all__ = [
    "TINY",
    "characters_folder",
    "judge_folder",
    "known_fingerprint",
    "model_place",
    "shipped_folder",
    "tiny_fingerprint",
    "tiny_folder",
]

TINY = "tiny"
"""The name of the checkpoint that ships for a backbone."""

_ROOT = Path(__file__).parent / "tiny"


def tiny_folder(backbone: str) -> Path:
    """Return a backbone's checkpoint, a pipeline in diffusers layout.

    Raises:
        InputError: none ships for it.
    """
    family = known_families().get(backbone)
    folder = _root_of(family.package if family else "engram_vision") / backbone
    if not folder.is_dir():
        roots = {_root_of(each.package) for each in known_families().values()}
        there = sorted(path.parent.name for root in roots for path in root.glob("*/model_index.json"))
        raise InputError(f"no {TINY!r} model ships for {backbone}, only for {', '.join(there)}; pass --model")
    return shipped_folder(folder, "model_index.json")


@cache
def _root_of(package: str) -> Path:
    """Return the folder of what ships with a package, which need not be imported for that."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise InputError(f"{package} is not installed in full; install it again")
    return Path(spec.origin).parent / "tiny"


def model_place(backbone: str, model: str) -> str:
    """Return where to load a model from: the shipped checkpoint's folder for `tiny`, and other names as they are.

    Raises:
        InputError: it is `tiny`, and none ships for the backbone.
    """
    return str(tiny_folder(backbone)) if model == TINY else model


def judge_folder() -> Path:
    """Return the classifier that tells the small world's subjects and scenes."""
    return shipped_folder(_ROOT / "judge", "config.json")


def characters_folder() -> Path:
    """Return the demo's characters: a folder of captioned pictures for each."""
    return shipped_folder(_ROOT / "characters", "characters.json")


@cache
def tiny_fingerprint(backbone: str) -> str:
    """Return the hex SHA-256 over the weights of a backbone's checkpoint."""
    folder, digest = tiny_folder(backbone), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def known_fingerprint(place: str) -> str | None:
    """Return the fingerprint of the model in a folder where it is one that ships; None for others."""
    path = Path(place)
    ships = any(path == _root_of(family.package) / family.name for family in known_families().values())
    return tiny_fingerprint(path.name) if ships and path.is_dir() else None


def shipped_folder(folder: Path, file: str) -> Path:
    """Return a folder that ships, as it is known by one of its files.

    Raises:
        InputError: it is missing.
    """
    if not (folder / file).is_file():
        raise InputError(f"{folder}: {file} is missing; install its package again, or run its recipe")
    return folder
