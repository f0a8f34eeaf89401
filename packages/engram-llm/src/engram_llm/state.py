"""What a memory must remember between passes of one generation, kept in the cache beside keys and values.

An n-gram needs the tokens before it, and the convolution needs its own inputs before it, which depend on hidden
states: neither is in keys and values. So the cache's layers learn to carry them: an empty layer is replaced by one
that does the same and takes the memory's history along wherever the keys go.
Shapes: B rows, T positions read before, R tokens that a memory looks back, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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

_RECENT = 64  # positions


class History(Protocol):
    """What one memory has read at one decoder layer.

    Attributes:
        stamp: of what was in force when its length was last looked at.
    """

    stamp: int

    def positions(self) -> Positions:
        """Return each row's newest R tokens; padding stands left of all tokens."""

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, R, C]."""

    def length(self) -> Any:
        """Return how many positions were read in all."""

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:
        """Go on to the newest `length` of these positions; `inputs` are of all of them, [B, T, C]."""

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""

    def repeat(self, times: int) -> None:
        """Repeat each row."""

    def crop(self, count: int) -> None:
        """Forget the newest positions."""


class GrowingHistory:
    """Keeps everything, as a growing cache does: it can be cropped to any length."""

    stamp = -1

    def __init__(self, inputs: Tensor, reach: int) -> None:
        """Begin with nothing.

        Args:
            inputs: of no position, [B, 0, C].
            reach: R.
        """
        self._reach = reach
        self._window = _no_tokens(inputs, reach)
        # All that was read, for cropping. New positions go to the recent ones, so that what a token costs does not grow
        # with the text before it.
        self._old = self._recent = _no_tokens(inputs, 0)

    def positions(self) -> Positions:
        """Return each row's newest R tokens; padding stands left of all tokens."""
        return self._window.positions

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, R, C]."""
        return self._window.inputs

    def length(self) -> int:
        """Return how many positions were read in all."""
        return len(self._old) + len(self._recent)

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:
        """Go on to the newest `length` of these positions."""
        self._window = _newest(positions, inputs, neighbours, self._reach)
        self._recent = self._recent.then(_Read(positions, inputs).map(lambda values: values[:, -length:]))
        if len(self._recent) > _RECENT:
            self._old, self._recent = self._old.then(self._recent), self._recent.map(lambda values: values[:, :0])

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        self._map(lambda values: values[rows.to(values.device)])

    def repeat(self, times: int) -> None:
        """Repeat each row."""
        self._map(lambda values: values.repeat_interleave(times, dim=0))

    def crop(self, count: int) -> None:
        """Forget the newest positions."""
        older = max(0, count - len(self._recent))
        self._recent = self._recent.map(lambda values: values[:, : max(0, values.shape[1] - count)])
        self._old = self._old.map(lambda values: values[:, : max(0, values.shape[1] - older)])
        # Past holes, the newest tokens may lie anywhere.
        enough = self._recent.positions.plain and len(self._recent) >= self._reach
        read = self._recent if enough else self._old.then(self._recent)
        neighbours = Neighbours(read.positions, 0, self._reach)
        self._window = _newest(read.positions, read.inputs, neighbours, self._reach)

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self._old, self._recent, self._window = (read.map(change) for read in (self._old, self._recent, self._window))


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
        self._window = _no_tokens(inputs, reach)
        self._length = torch.zeros((), dtype=torch.int64, device=inputs.device)
        positions = self._window.positions
        for tensor in (positions.ids, positions.starts, self._window.inputs, self._length):
            torch._dynamo.mark_static_address(tensor)

    def positions(self) -> Positions:
        """Return each row's newest R tokens; padding stands left of all tokens."""
        return self._window.positions

    def inputs(self) -> Tensor:
        """Return what the convolution read at them, [B, R, C]."""
        return self._window.inputs

    def length(self) -> Tensor:
        """Return how many positions were read in all."""
        return self._length

    def advance(self, positions: Positions, inputs: Tensor, neighbours: Neighbours, length: int) -> None:
        """Go on to the newest `length` of these positions."""
        newest = _newest(positions, inputs, neighbours, self._reach)
        self._window.positions.ids.copy_(newest.positions.ids)
        self._window.inputs.copy_(newest.inputs)
        self._length.add_(length)

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order."""
        for values in (self._window.positions.ids, self._window.inputs):
            values.copy_(values[rows.to(values.device)])

    def repeat(self, times: int) -> None:
        """Refuse: the rows of a static cache are fixed."""
        raise InputError(f"a static cache cannot repeat its rows {times} times; use a dynamic cache")

    def crop(self, count: int) -> None:
        """Refuse: what left the window is gone."""
        raise InputError(f"a static cache cannot forget {count} positions; use a dynamic cache")


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """A run of positions, and what the convolution read at them, [B, T, C]."""

    positions: Positions
    inputs: Tensor

    def __len__(self) -> int:
        return len(self.positions)

    def then(self, newer: _Read) -> _Read:
        return _Read(self.positions.then(newer.positions), torch.cat((self.inputs, newer.inputs), dim=1))

    def map(self, change: Callable[[Tensor], Tensor]) -> _Read:
        old = self.positions
        positions = Positions(ids=change(old.ids), starts=change(old.starts), plain=old.plain)
        return _Read(positions, change(self.inputs))


def _no_tokens(inputs: Tensor, length: int) -> _Read:
    """Return padding; `inputs` is of no position, [B, 0, C]."""
    ids = torch.full((inputs.shape[0], length), PAD, device=inputs.device)
    positions = Positions(ids=ids, starts=torch.zeros_like(ids, dtype=torch.bool), plain=True)
    return _Read(positions, inputs.new_zeros((inputs.shape[0], length, inputs.shape[2])))


def _newest(positions: Positions, inputs: Tensor, neighbours: Neighbours, reach: int) -> _Read:
    """Return each row's newest tokens; what is before a document's beginning is not taken, so none begins within."""
    ids = neighbours.newest(positions.ids, reach, PAD)
    window = Positions(ids=ids, starts=torch.zeros_like(ids, dtype=torch.bool), plain=True)
    return _Read(window, neighbours.newest(inputs, reach, 0))


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
        history = (WindowHistory if isinstance(layer, StaticLayer) else GrowingHistory)(inputs, reach)
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
