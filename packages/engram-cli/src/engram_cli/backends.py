"""The installed backbone that a command needs, or an error that says which one could and how to get it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from engram_core import (
    Backbone,
    BackboneLoadError,
    BackboneNotFoundError,
    ClipMakingBackbone,
    DemonstratingBackbone,
    EngramError,
    EvaluatingBackbone,
    GeneratingBackbone,
    TrainingBackbone,
    list_backbones,
    load_backbone,
)

_ABILITIES: Mapping[str, tuple[Any, str]] = {
    "train": (TrainingBackbone, "train"),
    "generate": (GeneratingBackbone, "generate"),
    "eval": (EvaluatingBackbone, "evaluate an adapter"),
    "demo": (DemonstratingBackbone, "run a demonstration"),
    "clips": (ClipMakingBackbone, "make clips of pictures"),
}

_PACKAGES = {
    "sd15": "engram-vision",
    "sdxl": "engram-vision",
    "sd35": "engram-vision",
    "wan22": "engram-video",
    "qwen3": "engram-llm",
}


def find_backbone(name: str, command: str) -> Any:
    """Return a backbone that offers what a command needs.

    Args:
        name: of the backbone.
        command: `train`, `generate`, `eval`, `demo` or `clips`.

    Raises:
        BackboneNotFoundError: it is not installed; says what to install where that is known.
        BackboneLoadError: it cannot be imported.
        EngramError: it lacks the ability; names those that have it.
    """
    try:
        backbone = load_backbone(name)
    except BackboneNotFoundError as error:
        if name not in _PACKAGES:
            raise
        raise BackboneNotFoundError(f"{error}; {how_to_install(_PACKAGES[name])}") from None
    protocol, purpose = _ABILITIES[command]
    if isinstance(backbone, protocol):
        return backbone
    able = ", ".join(list_able(command))
    raise EngramError(
        f"engram {command}: backbone {name!r} ({backbone.title}) cannot {purpose} in this version; "
        + (f"of the installed ones {able} can" if able else "no installed one can")
    )


def list_able(command: str) -> dict[str, Backbone]:
    """Return the installed backbones that offer what a command needs, by name; broken ones are passed over."""
    able = {}
    for name, installed in list_backbones().items():
        try:
            backbone = installed.load()
        except BackboneLoadError:
            continue
        if isinstance(backbone, _ABILITIES[command][0]):
            able[name] = backbone
    return able


def none_able(command: str) -> EngramError:
    """Return the error to raise when no installed backbone offers what a command needs."""
    absent = "sd15" not in list_backbones()
    remedy = how_to_install("engram-vision") if absent else "engram doctor shows what is installed and works"
    return EngramError(f"engram {command}: no installed backbone can {_ABILITIES[command][1]}; {remedy}")


def how_to_install(package: str) -> str:
    """Return the remedy for a package of this project that is absent."""
    return (
        f"install {package} from this repository, not from the public index, "
        "where packages named engram-* belong to others"
    )
