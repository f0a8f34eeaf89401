"""The optimizer: a rate of their own for tables, weight decay for matrices, touched rows alone for sparse tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer, SparseAdam

from engram_core.memory import TABLE
from engram_llm.settings import TrainSettings

__all__ = ["DenseAndSparse", "clip_gradients", "make_optimizer", "optimizer_tensors", "restore_optimizer"]

_ADAM_BETA1 = 0.9
_TABLES_TO_DENSE = 5.0  # as arXiv:2601.07372 and engram-peft do


class DenseAndSparse(Optimizer):
    """AdamW for dense gradients and SparseAdam for sparse ones, as one optimizer with one state.

    SparseAdam moves the rows that a step has touched; the moments of others rest.
    """

    def __init__(
        self, dense: Sequence[dict[str, Any]], sparse: Sequence[dict[str, Any]], *, betas: tuple[float, float]
    ) -> None:
        """Take parameter groups, each with `lr` and `weight_decay`; sparse ones have no decay."""
        self._parts: dict[bool, Optimizer] = {
            False: AdamW(dense, betas=betas, fused=_can_fuse(dense)),
            True: SparseAdam(sparse, betas=betas),
        }
        groups = [
            {**group, "is_sparse": is_sparse} for is_sparse, part in self._parts.items() for group in part.param_groups
        ]
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Do one step."""
        loss = None if closure is None else closure()
        for is_sparse, part in self._parts.items():
            # Loading a state makes new groups and a new state, so neither part keeps its own.
            part.param_groups = [group for group in self.param_groups if group["is_sparse"] is is_sparse]
            part.state = self.state
            part.step()
        return loss


def make_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], settings: TrainSettings, *, sparse: bool
) -> Optimizer:
    """Return the optimizer of a run.

    Args:
        parameters: everything that learns, by name.
        settings: rates and weight decay.
        sparse: whether the gradients of tables are sparse.
    """
    matrices: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in parameters:
        if name.endswith(TABLE):
            tables.append(weight)
        elif weight.ndim == 2:  # of projections and of LoRA; the convolution's has three axes, norms and biases one
            matrices.append(weight)
        else:
            others.append(weight)
    rate, betas = settings.learning_rate, (_ADAM_BETA1, settings.adam_beta2)
    table_rate = rate * _TABLES_TO_DENSE if settings.table_rate is None else settings.table_rate
    dense = [
        {"params": matrices, "lr": rate, "weight_decay": settings.weight_decay},
        {"params": others, "lr": rate, "weight_decay": 0.0},
    ]
    slow = {"params": tables, "lr": table_rate, "weight_decay": 0.0}
    dense, slow_groups = [group for group in dense if group["params"]], [slow] if tables else []
    if sparse and tables:
        return DenseAndSparse(dense, slow_groups, betas=betas)
    groups = [*dense, *slow_groups]
    return AdamW(groups, betas=betas, fused=_can_fuse(groups))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale gradients, sparse ones too, down to a norm over all of them, and return their norm before.

    Args:
        parameters: whose gradients count.
        max_norm: infinity leaves them.
    """
    values: list[Tensor] = []
    for parameter in parameters:
        if parameter.grad is None:
            continue
        if parameter.grad.is_sparse:
            # A row that was touched twice is there twice, and must add up before it is measured.
            parameter.grad = parameter.grad.coalesce()
            values.append(parameter.grad.values())
        else:
            values.append(parameter.grad)
    if not values:
        return torch.zeros(())
    norm: Tensor = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in values]))
    if max_norm != float("inf"):
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for part in values:
            part.mul_(factor)
    return norm


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's moments by `number of the parameter/name`."""
    state: Mapping[int, Mapping[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{index}/{name}": torch.as_tensor(value) for index, moments in state.items() for name, value in moments.items()
    }


def restore_optimizer(optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Give an optimizer the moments that `optimizer_tensors` returned.

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
        raise ValueError("the optimizer's moments are not those of what learns")
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, _, moment = name.partition("/")
        # SparseAdam counts its steps in whole numbers.
        state.setdefault(int(index), {})[moment] = value if value.is_floating_point() else int(value)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _can_fuse(groups: Sequence[Mapping[str, Any]]) -> bool:
    return all(weight.device.type in ("cpu", "cuda") for group in groups for weight in group["params"])
