"""The adapters that a command line names, with the strengths that follow their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engram_core import IncompatibleAdaptersError, Manifest, open_adapter


def read_manifests(named: Sequence[str], backbone: str | None) -> dict[str, Manifest]:
    """Return the manifests of adapters by file, in the order given.

    Args:
        named: `FILE` or `FILE@STRENGTH`, as users write them.
        backbone: the one they must be for; None means any, but the same for all.

    Raises:
        IncompatibleAdaptersError: one is for another backbone.
        AdapterReadError, AdapterFormatError: a file cannot be used.
    """
    found: dict[str, Manifest] = {}
    for text in named:
        file = cut_strength(text)
        manifest = open_adapter(file).manifest
        if backbone is not None and manifest.backbone != backbone:
            others = f"{next(iter(found))} is for {backbone!r}" if found else f"{backbone!r} was asked for"
            raise IncompatibleAdaptersError(
                f"{file}: is for backbone {manifest.backbone!r}, but {others}; generate with each on its own"
            )
        backbone = manifest.backbone
        found[file] = manifest
    return found


def cut_strength(text: str) -> str:
    """Return the file of `FILE` or `FILE@STRENGTH`; what exists under the whole text is a file of that name.

    A strength that is no number is cut off a file that exists, and left to the backbone to refuse.
    """
    file, mark, strength = text.rpartition("@")
    is_cut = mark and not Path(text).exists() and (Path(file).is_file() or _is_number(strength))
    return file if is_cut else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
