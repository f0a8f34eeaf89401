"""What is refused before anything is loaded: runs that would overwrite, and concepts that cannot learn together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from engram_core import InputError, TargetExistsError
from engram_core.training.checks import check_run_folder, check_tracker
from engram_vision.settings import TrainSettings

__all__ = ["METRICS", "SETTINGS", "STATE", "check_concepts", "is_begun", "run_folder"]

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
SETTINGS = "settings.toml"

# What concepts that learn together need not have in common: all else says how a pass is made, and when.
_OWN = {"data", "trigger", "output", "name", "license", "run_dir", "cache_dir", "insert_trigger", "validation_data"}
_OWN |= {"rule", "overlap", "activation", "max_ngram", "allow_single_token", "dtype", "init", "init_std", "init_scale"}
_OWN |= {"vector_rate", "scale_rate", "warm_up", "schedule", "weight_decay", "max_grad_norm", "seed", "keep"}
_OWN |= {"validation_draws", "preview_prompts", "flip", "crops"}


def check_concepts(settings: Sequence[TrainSettings], *, resume: bool = False, overwrite: bool = False) -> None:
    """Refuse early what would fail, or overwrite at the end.

    Args:
        settings: of concepts that learn together, at once or one group after another.
        resume: whether interrupted runs may go on.
        overwrite: whether files may be replaced.

    Raises:
        InputError: the settings differ in more than what is a concept's own, two write the same file, there is no place
            for an output or a run, or a tracker is not installed.
        TargetExistsError: an output or a run exists, and neither `resume` nor `overwrite` was asked for.
    """
    _check_alike(settings)
    check_tracker(settings[0].tracker)
    for each in settings:
        _check_targets(each, resume=resume, overwrite=overwrite)


def run_folder(settings: TrainSettings) -> Path:
    """Return the folder of a concept's run."""
    return settings.run_dir or settings.output.with_suffix(".run")


def is_begun(settings: TrainSettings) -> bool:
    """Tell whether the folder of a concept's run holds one, however far it came."""
    return any((run_folder(settings) / name).is_file() for name in (STATE, SETTINGS))


def _check_targets(settings: TrainSettings, *, resume: bool, overwrite: bool) -> None:
    output, folder = settings.output, run_folder(settings)
    state = folder / STATE
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}; create it first")
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the name of a file")
    check_run_folder(folder)
    if resume or overwrite:
        return
    if output.exists():
        raise TargetExistsError(f"{output}: exists; pass --force to replace it, or another --output")
    if state.exists():
        raise TargetExistsError(f"{folder}: holds an interrupted run; pass --resume to go on, or --force to begin anew")


def _check_alike(settings: Sequence[TrainSettings]) -> None:
    if not settings:
        raise InputError("nothing to train: give at least one concept")
    first = settings[0]
    for each in settings[1:]:
        if type(each) is not type(first):
            raise InputError(
                f"{each.trigger!r} is for {each.family.name}, {first.trigger!r} for {first.family.name}; "
                "concepts that learn together are for one backbone"
            )
        for name in (field.name for field in fields(first) if field.name not in _OWN):
            one, other = getattr(first, name), getattr(each, name)
            if one != other:
                raise InputError(
                    f"{name} is {one} for {first.trigger!r} and {other} for {each.trigger!r}; "
                    "concepts that learn together have it in common"
                )
    for place, what in ((lambda one: one.output, "output"), (run_folder, "run_dir")):
        taken: dict[object, str] = {}
        for each in settings:
            path = place(each).absolute()
            if path in taken:
                raise InputError(
                    f"{path}: is the {what} of both {taken[path]!r} and {each.trigger!r}; give each its own"
                )
            taken[path] = each.trigger
