"""What ships with this package: the tiny checkpoint and its judges. Importing this imports no torch."""

from __future__ import annotations

from pathlib import Path

from engram_vision.shipped import shipped_folder

__all__ = ["checkpoint_folder", "judge_folder", "motion_judge_folder"]

_ROOT = Path(__file__).parent / "tiny"


def checkpoint_folder() -> Path:
    """Return `tiny`, a pipeline in diffusers layout that makes clips of texts and of pictures.

    Raises:
        InputError: it is missing.
    """
    return shipped_folder(_ROOT / "wan22", "model_index.json")


def judge_folder() -> Path:
    """Return the classifiers that tell the subjects and scenes of frames of `tiny`'s clips.

    Raises:
        InputError: they are missing.
    """
    return shipped_folder(_ROOT / "judge", "config.json")


def motion_judge_folder() -> Path:
    """Return the classifier that tells the motions of `tiny`'s clips.

    Raises:
        InputError: it is missing.
    """
    return shipped_folder(_ROOT / "judge" / "motion", "config.json")
