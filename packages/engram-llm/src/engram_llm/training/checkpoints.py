"""Checkpoints: folders that appear whole or not at all, in safetensors and JSON, never pickled."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from engram_core import AdapterWriteError, InputError
from engram_core.errors import one_line

__all__ = [
    "Progress",
    "State",
    "capture_random",
    "checkpoint_folder",
    "drop_checkpoints",
    "list_checkpoints",
    "load_state",
    "new_checkpoint",
    "restore_random",
    "save_state",
]

STATE = "state.safetensors"

_FIELD = "engram-training"
_NAME = re.compile(r"checkpoint-(\d+)")
_NEWEST = 2  # checkpoints that are kept beside the best one


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        best_step: the step with the best validation so far; 0 when nothing was validated.
        best_loss: its loss; infinity when nothing was validated.
        last_loss: loss of the newest validation.
        waited: validations since the best one.
        tokens: learned tokens seen so far, in all processes together.
        ended: whether there is nothing left to do.
        run: what the run is about (settings and data that must not change), as a text by name.
    """

    step: int
    best_step: int
    best_loss: float
    last_loss: float
    waited: int
    tokens: int
    ended: bool
    run: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class State:
    """What a run needs to go on, beside what it has learned.

    Attributes:
        progress: where it stands.
        moments: of the optimizer, see `optimizer_tensors`.
        scheduler: state of the learning rates.
        randoms: of each process, see `capture_random`.
    """

    progress: Progress
    moments: Mapping[str, Tensor]
    scheduler: Mapping[str, Any]
    randoms: Sequence[Mapping[str, Any]]


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run_dir / f"checkpoint-{step}"


def list_checkpoints(run_dir: Path) -> dict[int, Path]:
    """Return the checkpoints of a run by step, the newest last."""
    if not run_dir.is_dir():
        return {}
    found = {int(match[1]): path for path in run_dir.iterdir() if (match := _NAME.fullmatch(path.name))}
    return dict(sorted(found.items()))


@contextlib.contextmanager
def new_checkpoint(run_dir: Path, step: int) -> Iterator[Path]:
    """Yield a folder that becomes the step's checkpoint when the block ends well.

    Raises:
        AdapterWriteError: it cannot be written; what was there before stays.
    """
    target = checkpoint_folder(run_dir, step)
    temporary = run_dir / f".{target.name}.tmp"
    try:
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed
        temporary.mkdir()
        yield temporary
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        if isinstance(error, AdapterWriteError):
            raise
        reason = getattr(error, "strerror", None) or one_line(error)
        raise AdapterWriteError(f"{target}: cannot be written: {reason}; older checkpoints are kept") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def drop_checkpoints(run_dir: Path, *, keep: Collection[int] = (), newest: int = _NEWEST) -> None:
    """Remove all checkpoints but the newest ones and those of some steps, and what killed processes left."""
    checkpoints = list_checkpoints(run_dir)
    kept = {*keep, *list(checkpoints)[len(checkpoints) - min(newest, len(checkpoints)) :]}
    for step, path in checkpoints.items():
        if step not in kept:
            # Under another name first, so that a half removed one is never taken for a checkpoint.
            doomed = run_dir / f".{path.name}.tmp"
            shutil.rmtree(doomed, ignore_errors=True)
            path.rename(doomed)
    for path in run_dir.glob(".checkpoint-*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def save_state(folder: Path, state: State) -> None:
    """Write a state into a checkpoint's folder."""
    fields = {
        "progress": asdict(state.progress) | {"run": dict(state.progress.run)},
        "scheduler": dict(state.scheduler),
        "randoms": [dict(random_state) for random_state in state.randoms],
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.moments.items()}
    save_file(tensors, folder / STATE, {_FIELD: json.dumps(fields)})
    with (folder / STATE).open("rb+") as file:
        os.fsync(file.fileno())


def load_state(folder: Path) -> State:
    """Read a checkpoint's state.

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    path = folder / STATE
    try:
        with safe_open(path, "pt") as file:
            fields: dict[str, Any] = json.loads((file.metadata() or {})[_FIELD])
            moments = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        return State(
            progress=Progress(**fields["progress"]),
            moments=moments,
            scheduler=fields["scheduler"],
            randoms=fields["randoms"],
        )
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not the state of a training run: {type(error).__name__}: {error}; delete {folder} to go on "
            "from the checkpoint before, or begin anew with --force"
        ) from None


def capture_random() -> dict[str, Any]:
    """Return the state of this process's random numbers as plain JSON values."""
    numbers = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        numbers["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        numbers["mps"] = torch.mps.get_rng_state()
    version, values, spare = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - others draw from it
    return {
        **{place: bytes(state.numpy()).hex() for place, state in numbers.items()},
        "python": [version, list(values), spare],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
    }


def restore_random(state: Mapping[str, Any]) -> None:
    """Go back to a state that `capture_random` returned."""
    version, values, spare = state["python"]
    random.setstate((version, tuple(values), spare))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, np.uint32), *rest))  # noqa: NPY002 - others draw from it
    setters = {"torch": torch.set_rng_state}
    if torch.cuda.is_available():
        setters["cuda"] = torch.cuda.set_rng_state
    if torch.backends.mps.is_available():
        setters["mps"] = torch.mps.set_rng_state
    for place, setter in setters.items():
        if place in state:
            setter(torch.frombuffer(bytearray.fromhex(state[place]), dtype=torch.uint8))
