"""What a run needs to go on: one safetensors file, which appears whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engram_core import InputError
from engram_core.container import open_target, write_all

__all__ = ["Progress", "load_state", "save_state"]

_FIELD = "engram-training"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        best_step: the step with the best validation so far; 0 when nothing was validated.
        best_loss: its loss.
        run: what the run is about (settings and data that must not change), as a digest by name.
    """

    step: int
    best_step: int
    best_loss: float
    run: Mapping[str, str]


def save_state(
    path: Path,
    progress: Progress,
    model: Mapping[str, Tensor],
    best: Mapping[str, Tensor],
    visited: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a state atomically, in place of the one before.

    Args:
        path: the file.
        progress: where the run stands.
        model: vectors and scales by name.
        best: the same, of the best validation.
        visited: which vectors were used, by stream.
        optimizer: whose moments to keep.
    """
    tensors = {f"model/{name}": value for name, value in model.items()}
    tensors |= {f"best/{name}": value for name, value in best.items()}
    tensors |= {f"visited/{name}": value for name, value in visited.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    data = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()},
        {_FIELD: json.dumps(asdict(progress) | {"run": dict(progress.run)})},
    )
    with open_target(path, overwrite=True) as file:
        write_all(file, memoryview(data))


def load_state(path: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]]:
    """Return a state: where the run stands, and its tensors by group (model, best, visited, optimizer).

    Raises:
        InputError: there is none, or it is not one of ours.
    """
    if not path.is_file():
        raise InputError(f"{path}: does not exist; there is nothing to resume, leave --resume out")
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "best": {}, "visited": {}, "optimizer": {}}
    try:
        with safe_open(path, "pt") as file:
            fields: dict[str, Any] = json.loads((file.metadata() or {})[_FIELD])
            for key in file.keys():  # noqa: SIM118 - not a mapping
                group, _, name = key.partition("/")
                groups[group][name] = file.get_tensor(key)
        return Progress(**fields), groups
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: is not the state of a training run: {type(error).__name__}: {error}; begin anew with --force"
        ) from None


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an AdamW optimizer the moments that `save_state` wrote.

    Raises:
        ValueError: they are not those of its parameters.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    shapes = {
        f"{index}/{moment}": () if moment == "step" else tuple(parameter.shape)
        for index, parameter in enumerate(parameters)
        for moment in ("step", "exp_avg", "exp_avg_sq")
    }
    if {name: tuple(value.shape) for name, value in tensors.items()} != shapes:
        raise ValueError("the optimizer's moments are not those of vectors and scales")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        index, _, moment = name.partition("/")
        state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
