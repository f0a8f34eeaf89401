"""Training that can stop at any time and go on: the state of a stage in one safetensors file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn


class Average:
    """A moving average of a module's parameters and buffers (EMA), in float32."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        """Begin at the module's present values."""
        self.decay = decay
        self.values = {name: value.detach().clone() for name, value in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Move towards the module's values; early on faster, so that the beginning is soon forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, value in module.state_dict().items():
            if value.is_floating_point():
                self.values[name].lerp_(value, 1 - decay)


def cosine(step: int, total: int, *, peak: float, warm_up: int = 200, floor: float = 0.02) -> float:
    """Return the learning rate of a step: linear warm-up, then a cosine to `floor` of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, total - warm_up)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def save_state(
    path: Path,
    step: int,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    average: Mapping[str, Average],
) -> None:
    """Write everything a stage needs to go on after `step`; the file appears whole or not at all."""
    tensors: dict[str, Tensor] = {"step": torch.tensor(step)}
    for key, module in modules.items():
        tensors |= {f"{key}/model/{name}": value for name, value in module.state_dict().items()}
        tensors |= {f"{key}/average/{name}": value for name, value in average[key].values.items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in moments.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # Copies, because safetensors refuses tensors that share memory (T5 has its embeddings under two names).
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, partial)
    partial.replace(path)


def load_state(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, average: Mapping[str, Average]
) -> int:
    """Restore what `save_state` wrote and return the step; 0 when there is nothing yet."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    for key, module in modules.items():
        module.load_state_dict(_below(tensors, f"{key}/model/"))
        average[key].values = _below(tensors, f"{key}/average/")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in _below(tensors, "optimizer/").items():
        index, _, moment = name.partition("/")
        state.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(tensors["step"])


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
