"""What a memory must remember between passes of one generation, kept in the cache beside keys and values.

An n-gram needs the tokens before it, and the convolution needs its own inputs before it, which depend on hidden
states: neither is in keys and values. So the cache's layers learn to carry them: an empty layer is replaced by one
that does the same and takes the memory's history along wherever the keys go.
Shapes: B rows, T positions read before, R tokens that a memory looks back, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from engram_core import InputError
from engram_llm.reading import PAD, Neighbours, Positions

__all__ = ["GrowingHistory", "History", "WindowHistory", "has_layer", "open_history"]


class History(Protocol):
    """What one memory has read at one decoder layer.

    Attributes:
        stamp: of what was in force when its length was last looked at.
    """

    stamp: int

    def positions(self) -> Positions:
        """Return what stands at the positions it holds."""

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, T, C]."""

    def length(self) -> Any:
        """Return how many positions were read in all."""

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:
        """Go on to all positions, of which the newest `length` are new; `inputs` is [B, T+L, C]."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""

    def repeat(self, times: int) -> None:
        """Repeat each row."""

    def crop(self, count: int) -> None:
        """Forget the newest positions."""


class GrowingHistory:
    """Keeps everything, as a growing cache does: it can be cropped to any length."""

    stamp = -1

    def __init__(self, inputs: Tensor) -> None:
        """Begin with nothing.

        Args:
            inputs: of no position, [B, 0, C].
        """
        self._positions, self._inputs = _no_tokens(inputs, 0), inputs

    def positions(self) -> Positions:
        """Return what stands at the positions it holds."""
        return self._positions

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, T, C]."""
        return self._inputs

    def length(self) -> int:
        """Return how many positions were read in all."""
        return len(self._positions)

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:  # noqa: ARG002
        """Go on to all positions."""
        self._positions, self._inputs = positions, inputs

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map(lambda values: values[rows.to(values.device)])

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        self._map(lambda values: values.repeat_interleave(times, dim=0))

    def crop(self, count: int) -> None:
        """Forget the newest positions."""
        self._map(lambda values: values[:, : max(0, values.shape[1] - count)])

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        old = self._positions
        self._positions = Positions(ids=change(old.ids), starts=change(old.starts), plain=old.plain)
        self._inputs = change(self._inputs)


class WindowHistory:
    """Keeps each row's newest R tokens at fixed addresses, as a static cache does."""

    stamp = -1

    def __init__(self, inputs: Tensor, reach: int) -> None:
        """Begin with padding, which stands left of all tokens.

        Args:
            inputs: of no position, [B, 0, C].
            reach: R.
        """
        self._reach = reach
        self._inputs = inputs.new_zeros((inputs.shape[0], reach, inputs.shape[2]))
        # What is before a document's beginning is never taken into the window, so none begins within.
        positions = _no_tokens(inputs, reach)
        self._ids, self._starts = positions.ids, positions.starts
        self._length = torch.zeros((), dtype=torch.int64, device=inputs.device)
        for tensor in (self._ids, self._inputs, self._starts, self._length):
            torch._dynamo.mark_static_address(tensor)

    def positions(self) -> Positions:
        """Return what stands at the positions it holds; padding stands left of all tokens."""
        return Positions(ids=self._ids, starts=self._starts, plain=True)

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, R, C]."""
        return self._inputs

    def length(self) -> Tensor:
        """Return how many positions were read in all."""
        return self._length

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:
        """Go on to all positions."""
        self._ids.copy_(neighbours.newest(positions.ids, self._reach, PAD))
        self._inputs.copy_(neighbours.newest(inputs, self._reach, 0))
        self._length.add_(length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for values in (self._ids, self._inputs):
            values.copy_(values[rows.to(values.device)])

    def repeat(self, times: int) -> None:
        """Refuse: the rows of a static cache are fixed."""
        raise InputError(f"a static cache cannot repeat its rows {times} times; use a dynamic cache")

    def crop(self, count: int) -> None:
        """Refuse: what left the window is gone."""
        raise InputError(f"a static cache cannot forget {count} positions; use a dynamic cache")


def _no_tokens(inputs: Tensor, length: int) -> Positions:
    ids = torch.full((inputs.shape[0], length), PAD, device=inputs.device)
    return Positions(ids=ids, starts=torch.zeros_like(ids, dtype=torch.bool), plain=True)


class _Carrying(CacheLayerMixin):  # type: ignore[misc]
    """Takes the histories along wherever keys and values go."""

    histories: dict[str, History]

    def reset(self) -> None:
        super().reset()
        self.histories.clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        for history in self.histories.values():
            history.select(beam_idx)

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        if tokens_to_remove:
            for history in self.histories.values():
                history.crop(abs(tokens_to_remove))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        for history in self.histories.values():
            history.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        for history in self.histories.values():
            history.select(indices)


class _CarryingDynamicLayer(_Carrying, DynamicLayer):  # type: ignore[misc]
    pass


class _CarryingSlidingLayer(_Carrying, DynamicSlidingWindowLayer):  # type: ignore[misc]
    pass


class _CarryingStaticLayer(_Carrying, StaticLayer):  # type: ignore[misc]
    pass


class _CarryingStaticSlidingLayer(_Carrying, StaticSlidingWindowLayer):  # type: ignore[misc]
    pass


_CARRYING: dict[type, type] = {
    DynamicLayer: _CarryingDynamicLayer,
    DynamicSlidingWindowLayer: _CarryingSlidingLayer,
    StaticLayer: _CarryingStaticLayer,
    StaticSlidingWindowLayer: _CarryingStaticSlidingLayer,
}


def _carrying_layer(cache: Any, index: int) -> Any:
    """Return a cache's layer, made to carry histories."""
    layer = _find_layer(cache, index)
    if not isinstance(layer, _Carrying):
        if layer.is_initialized and int(layer.get_seq_length()):
            raise _filled(0, int(layer.get_seq_length()))
        carrying: Any = object.__new__(_CARRYING[type(layer)])
        for name, value in vars(layer).items():
            setattr(carrying, name, value)
        carrying.histories = {}
        cache.layers[index] = layer = carrying
    return layer


def open_history(cache: Any, index: int, key: str, inputs: Tensor, reach: int, stamp: int) -> History:
    """Return what a memory has read so far at a layer of a cache.

    Args:
        cache: of keys and values.
        index: the layer.
        key: of the memory.
        inputs: of no position, [B, 0, C]: what a new history begins with.
        reach: R of the memory.
        stamp: changes whenever other memories are put in force.

    Raises:
        InputError: the cache cannot carry it, or holds positions that the memory has not read.
    """
    if torch.compiler.is_compiling():
        layer = _find_layer(cache, index)
        if isinstance(layer, StaticLayer):
            history = layer.histories.get(key) if isinstance(layer, _Carrying) else None
            # How much a static cache holds is not known while compiling; so long as nothing else was put in force
            # since it was looked at, the memory has read it all.
            if history is None or history.stamp != stamp:
                history = _open_eagerly(cache, index, key, inputs, reach, stamp)
            return history
    return _open(cache, index, key, inputs, reach, stamp)


def _open(cache: Any, index: int, key: str, inputs: Tensor, reach: int, stamp: int) -> History:
    layer = _carrying_layer(cache, index)
    history: History | None = layer.histories.get(key)
    if history is None:
        history = WindowHistory(inputs, reach) if isinstance(layer, StaticLayer) else GrowingHistory(inputs)
        layer.histories[key] = history
    read, held = int(history.length()), int(layer.get_seq_length())
    if read != held:
        raise _filled(read, held)
    history.stamp = stamp
    return history


# A history that a compiled graph made would lie in memory that later graphs write to.
_open_eagerly = torch.compiler.disable(_open)  # type: ignore[no-untyped-call]


def has_layer(cache: Any, index: int) -> bool:
    """Tell whether a cache has a layer, or will have it; raises InputError when it is no such cache."""
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise InputError(f"the memory cannot be kept in a {type(cache).__name__}; use a DynamicCache or a StaticCache")
    return len(cache.layers) > index or cache.layer_class_to_replicate is not None


def _find_layer(cache: Any, index: int) -> Any:
    if not has_layer(cache, index):
        raise InputError(f"the cache has {len(cache.layers)} layers, a memory stands before layer {index}")
    while len(cache.layers) <= index:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, _Carrying) and type(layer) not in _CARRYING:
        raise InputError(
            f"the memory cannot be kept in a {type(cache).__name__} with a {type(layer).__name__}; "
            "use a DynamicCache or a StaticCache"
        )
    return layer


def _filled(read: int, held: int) -> InputError:
    return InputError(
        f"the cache holds {held} positions, of which the memory has read {read}; begin with an empty cache after "
        "memories were loaded or unloaded"
    )
