"""The adapters that a command line names, with the strengths that follow their names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engram_core import IncompatibleAdaptersError, Manifest, open_any
from engram_core.settings import split_strength


def find_file(named: str) -> Path:
    """Return the file of an adapter that is named by a path or by a hub repository, `owner/name`.

    Nothing of the hub is imported for a file that exists.

    Raises:
        InputError: it is no path here, and cannot be had from the hub.
    """
    path = Path(named)
    if path.is_file():
        return path
    from engram_core.hub import find_adapter

    return find_adapter(named)


def read_manifests(named: Sequence[str], backbone: str | None) -> dict[str, Manifest]:
    """Return the manifests of adapters by file, in the order given.

    Args:
        named: `FILE` or `FILE@STRENGTH`, as users write them; FILE may be a hub repository.
        backbone: the one they must be for; None means any, but the same for all.

    Raises:
        IncompatibleAdaptersError: one is for another backbone.
        InputError: a hub repository cannot be had.
        AdapterReadError, AdapterFormatError: a file cannot be used.
    """
    found: dict[str, Manifest] = {}
    for text in named:
        file, _ = split_strength(text)
        manifest = open_any(find_file(file)).manifest
        if backbone is not None and manifest.backbone != backbone:
            others = f"{next(iter(found))} is for {backbone!r}" if found else f"{backbone!r} was asked for"
            raise IncompatibleAdaptersError(
                f"{file}: is for backbone {manifest.backbone!r}, but {others}; use each on its own"
            )
        backbone = manifest.backbone
        found[file] = manifest
    return found
