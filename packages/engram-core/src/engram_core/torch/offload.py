"""Frozen blocks that take turns on a device: training in front of a model that does not fit on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_core.errors import InputError

__all__ = ["BlockOffload"]


@final
class BlockOffload:
    """Runs the blocks of a frozen model on a device that holds one of them at a time, with right gradients.

        with BlockOffload(transformer.transformer_blocks, device, model=transformer):
            loss = ...  # passes through the transformer, then backward

    The weights stay in host memory. A block that is about to run first takes the place of the one that ran before.
    Offloading hooks that take a block's weights away after its forward pass leave its backward pass without them. Here
    each block is a gradient checkpoint: autograd keeps its inputs alone, the backward pass runs it again, which brings
    its weights back, and they stay until another block needs the place, that is until its own gradients are done.

    No gradient can come out wrong in silence. The checkpoint is part of the block's forward, so it cannot be forgotten;
    each visit makes a new copy on the device, and copies are never written to, so what autograd still refers to keeps
    its values. The model's own gradient checkpointing is not needed; where it is on as well, a step runs each block
    once more.

    While attached, the model must not be moved, and its weights must not be changed. Weights that several blocks share
    are fine. Buffers may be written by a forward pass, so they stay on the device. The next block is not fetched while
    one computes.
    """

    def __init__(
        self, blocks: Sequence[nn.Module], device: torch.device | str, *, model: nn.Module | None = None
    ) -> None:
        """Check the blocks; nothing changes before `attach`.

        Args:
            blocks: what takes turns, in host memory and frozen; inputs must come on the device.
            device: where they run.
            model: what the blocks belong to; its other weights and buffers are on the device while attached. None
                leaves them to the caller.

        Raises:
            InputError: there is no block, one holds another, or a weight is trainable, quantized, not in host memory,
                or used outside of the blocks too.
        """
        self.device = torch.device(device)
        self._blocks = list(blocks)
        self._weights = [dict(block.named_parameters()) for block in self._blocks]
        self._others = _other_weights(self._blocks, model)
        self._check()
        self._buffers = list(_distinct_buffers([*self._blocks, *([] if model is None else [model])]))
        self._homes: dict[Tensor, Tensor] = {}
        self._forwards: list[Callable[..., Any]] = []
        self._resident: int | None = None

    @property
    def resident(self) -> int | None:
        """The number of the block whose weights are on the device; None where there is none."""
        return self._resident

    def attach(self) -> None:
        """Begin: the blocks' weights wait in host memory, everything else of the model goes to the device.

        For a CUDA device the weights move to pinned host memory, where that can be had, and remain there.

        Raises:
            InputError: attached already, or something else has replaced a block's forward, e.g. another offloading.
        """
        for index, block in enumerate(self._blocks):
            if "forward" in vars(block):
                raise InputError(
                    f"block {index} ({type(block).__name__}) has a forward that something else put there, such as "
                    "another offloading; remove that first"
                )
        try:
            for weights in self._weights:
                for weight in weights.values():
                    if weight not in self._homes:
                        weight.data = self._homes[weight] = _pinned(weight.data, self.device)
            for tensor in (*self._others.values(), *self._buffers):
                self._homes[tensor] = tensor.data
                tensor.data = _copy(tensor.data, self.device)
            for index, block in enumerate(self._blocks):
                self._forwards.append(self._wrap(index, block))
                block.forward = self._forwards[index]
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """End: the model is as it was, each weight in host memory. Call it after the backward pass.

        Raises:
            InputError: something else has replaced a block's forward since; nothing was done.
        """
        pairs = list(zip(self._blocks, self._forwards, strict=False))  # fewer where attaching broke off
        for index, (block, forward) in enumerate(pairs):
            if vars(block).get("forward") not in (forward, None):
                raise InputError(
                    f"block {index} ({type(block).__name__}) has a forward that something else put there since; "
                    "remove that first"
                )
        for block, _ in pairs:
            vars(block).pop("forward", None)
        self._forwards = []
        self.evict()
        with torch.no_grad():
            for buffer in self._buffers:
                if buffer in self._homes:
                    self._homes[buffer].copy_(buffer)
        for tensor, home in self._homes.items():
            tensor.data = home
        self._homes = {}

    def evict(self) -> None:
        """Free the place on the device, e.g. for other work; the next block that runs takes it again."""
        if self._resident is not None:
            self._unload(self._resident)
            self._resident = None

    def __enter__(self) -> BlockOffload:
        self.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.detach()

    def _check(self) -> None:
        if not self._blocks:
            raise InputError("there is no block to offload; expected at least one")
        for index, block in enumerate(self._blocks):
            within = set(block.modules())
            for other, candidate in enumerate(self._blocks):
                if other != index and candidate in within:
                    raise InputError(f"block {index} holds block {other}; expected blocks that are apart")
        named = [
            (f"{name} of block {index}", weight)
            for index, weights in enumerate(self._weights)
            for name, weight in weights.items()
        ]
        for name, weight in (*named, *self._others.items()):
            if weight.requires_grad:
                raise InputError(f"{name} is trainable; expected a frozen model, call requires_grad_(False) on it")
            if type(weight.data) is not Tensor:
                raise InputError(f"{name} is a {type(weight.data).__name__}; expected plain weights, not quantized")
            if weight.device.type not in ("cpu", "meta"):
                raise InputError(f"{name} is on {weight.device}; expected weights in host memory, call .to('cpu')")
        moved = {weight: name for name, weight in named}
        for name, weight in self._others.items():
            if weight in moved:
                raise InputError(f"{name} is also {moved[weight]}; weights shared with the rest cannot come and go")

    def _wrap(self, index: int, block: nn.Module) -> Callable[..., Any]:
        forward = block.forward

        def visit(*args: Any, **kwargs: Any) -> Any:
            self._enter(index)
            return forward(*args, **kwargs)

        @functools.wraps(forward)
        def offloaded(*args: Any, **kwargs: Any) -> Any:
            if torch.is_grad_enabled():
                return checkpoint(visit, *args, use_reentrant=False, **kwargs)
            return visit(*args, **kwargs)

        return offloaded

    def _enter(self, index: int) -> None:
        """Give a block the place."""
        if not self._forwards:
            raise InputError(f"block {index} was detached before the backward pass that needs it; detach after it")
        if self._resident == index:
            return
        self.evict()
        try:
            self._load(index)
        except BaseException:  # the device is full, say
            self._unload(index)
            raise
        self._resident = index

    def _load(self, index: int) -> None:
        for weight in self._weights[index].values():
            weight.data = _copy(self._homes[weight], self.device)

    def _unload(self, index: int) -> None:
        for weight in self._weights[index].values():
            weight.data = self._homes[weight]


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on the device, on its present stream; later work there waits for it."""
    with torch.inference_mode(False), torch.no_grad():  # autograd refuses what is made in inference mode
        return tensor.to(device, non_blocking=True)


def _pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a host tensor in memory that a CUDA device reads fastest; as it is for other devices, or without room."""
    if device.type != "cuda" or tensor.is_pinned():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:
        return tensor


def _other_weights(blocks: Sequence[nn.Module], model: nn.Module | None) -> dict[str, nn.Parameter]:
    """Return the weights of a model's modules that belong to no block, by name."""
    if model is None:
        return {}
    within = {module for block in blocks for module in block.modules()}
    return {
        f"{place}.{name}" if place else name: weight
        for place, module in model.named_modules()
        if module not in within
        for name, weight in module.named_parameters(recurse=False)
    }


def _distinct_buffers(modules: Sequence[nn.Module]) -> Iterator[Tensor]:
    seen = set()
    for module in modules:
        for buffer in module.buffers():
            if buffer not in seen:
                seen.add(buffer)
                yield buffer
