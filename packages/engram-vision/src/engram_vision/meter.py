"""Counting the bytes that live at the same time while a model without values runs on PyTorch's meta device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["FusedAttention", "Meter", "measured", "n_bytes", "tensors_of"]


@contextlib.contextmanager
def measured(module: nn.Module) -> Iterator[Meter]:
    """Count the bytes of what is made in the block, as long as each lives, with attention as a GPU does it."""
    meter: Any = Meter(module)
    with meter, FusedAttention():
        yield meter


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors as long as they live, those of a module apart.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self._now = 0
        self._weights = [tensor.untyped_storage() for tensor in tensors_of(module)]
        self._known = set(map(id, self._weights))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: Any) -> None:
        # A storage's Python object lives as long as its memory, which views share.
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._now += size
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size


class FusedAttention(TorchFunctionMode):
    """Puts the memory use of fused attention kernels in place of what the meta device does, which keeps scores."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            given = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Attention.apply(given["query"], given["key"], given["value"])
        return func(*args, **(kwargs or {}))


class _Attention(torch.autograd.Function):
    """What FlashAttention-2 (arXiv:2307.08691) keeps: inputs, output, and a float32 for each query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = ctx.saved_tensors[:3]
        sums = torch.empty_like(grad, dtype=torch.float32)  # of the queries' gradient, from many blocks
        return sums.to(query.dtype), torch.empty_like(key), torch.empty_like(value)


def tensors_of(module: nn.Module) -> Sequence[Tensor]:
    """Return a module's weights and buffers."""
    return [*module.parameters(), *module.buffers()]


def n_bytes(tensors: Iterable[Tensor]) -> int:
    """Return how many bytes tensors take, each counted for itself."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
