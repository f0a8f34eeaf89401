"""What every backend refuses before it loads anything."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from engram_core.errors import InputError

__all__ = ["check_run_folder", "check_tracker"]

_PACKAGES = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}


def check_tracker(tracker: Literal["none", "tensorboard", "wandb"]) -> None:
    """Refuse a tracker that is not installed, which accelerate would leave out in silence.

    Args:
        tracker: as the settings name it.

    Raises:
        InputError: none of the packages that it needs is there.
    """
    packages = _PACKAGES[tracker]
    if packages and not any(map(find_spec, packages)):
        raise InputError(f"tracker {tracker} needs the package {packages[0]}; install it, or leave --tracker out")


def check_run_folder(folder: Path) -> None:
    """Refuse a run folder that is a file.

    Args:
        folder: for states, metrics and previews; need not exist.

    Raises:
        InputError: a file has its name.
    """
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, and the run needs a folder of that name; pass another --run-dir")
