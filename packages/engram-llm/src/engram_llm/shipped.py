"""What ships with this package: the tiny checkpoint, and texts to adapt and to measure it with."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from engram_core import InputError

__all__ = [
    "GLOSSES",
    "TINY",
    "glosses_file",
    "known_fingerprint",
    "model_place",
    "tiny_fingerprint",
    "tiny_folder",
]

TINY = "tiny"
"""The name of the checkpoint that ships."""

GLOSSES = {
    "domain-train": "entries about animals, bodies, plants and substances, which the checkpoint never saw",
    "domain-eval": "entries of the same kind, for evaluation alone",
    "general-train-sample": "some of the entries that the checkpoint was trained on",
    "general-eval": "entries of that kind that it never saw, for evaluation alone",
}
"""The sets of texts that ship, and what each is."""

_ROOT = Path(__file__).parent / "tiny"


def tiny_folder() -> Path:
    """Return the checkpoint, a model in transformers layout.

    Raises:
        InputError: it is missing.
    """
    return _existing(_ROOT / "qwen3" / "config.json").parent


def model_place(model: str) -> str:
    """Return where to load a model from: the shipped checkpoint's folder for `tiny`, and other names as they are.

    Raises:
        InputError: it is `tiny`, and missing.
    """
    return str(tiny_folder()) if model == TINY else model


@cache
def tiny_fingerprint() -> str:
    """Return the hex SHA-256 over the checkpoint's weights."""
    folder, digest = tiny_folder(), hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def known_fingerprint(place: str) -> str | None:
    """Return the fingerprint of the model in a folder where it is the one that ships; None for others."""
    path = Path(place)
    return tiny_fingerprint() if path == _ROOT / "qwen3" and path.is_dir() else None


def glosses_file(name: str) -> Path:
    """Return a set of texts: gzip-compressed JSON lines with one field, `text`.

    Args:
        name: one of `GLOSSES`.

    Raises:
        InputError: there is no such set, or its file is missing.
    """
    if name not in GLOSSES:
        raise InputError(f"no texts {name!r} ship; there are {', '.join(GLOSSES)}")
    return _existing(_ROOT / "glosses" / f"{name}.jsonl.gz")


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise InputError(f"{file} is missing; install engram-llm again, or run its recipe")
    return file
