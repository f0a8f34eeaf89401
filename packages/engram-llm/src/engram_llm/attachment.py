"""The hooks that add memories to an unmodified decoder: attached to its parts, removed without a trace.

One pre-hook on the decoder reads the token ids, and one on each decoder layer takes from the keyword arguments what
the first has put there; layers with a memory add its residual to their input. Keyword arguments reach the layers in
every way of running a model, threads and recomputation in backward passes included, where a variable would not.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engram_core import InputError
from engram_llm.masks import Layout, read_layout
from engram_llm.memory import Memory
from engram_llm.module import MemoryLayer
from engram_llm.reading import PAD, Neighbours, Positions
from engram_llm.state import History, has_layer, open_history

__all__ = ["Active", "attach", "attached", "detach", "find_decoder", "prepare_cache"]

_KEYWORD = "engram_pass"


@dataclass(frozen=True, slots=True, eq=False)
class Active:
    """A memory in force.

    Attributes:
        memory: its weights.
        strength: what its residual is multiplied by.
    """

    memory: Memory
    strength: float


@dataclass(slots=True, eq=False)
class _Attachment:
    """What is attached to a decoder; `actives` is replaced as a whole, and a pass keeps those it began with."""

    actives: tuple[Active, ...]
    stamp: int


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """One memory's share of a pass.

    Attributes:
        active: the memory.
        stamp: of what is in force.
        cached: whether the decoder got a cache.
        whole: the positions that the memory's histories hold, and the new ones.
        neighbours: of the new ones among the whole.
        rows: what each layer's table wants: rows, or a promise of their values.
    """

    active: Active
    stamp: int
    cached: bool
    whole: Positions
    neighbours: Neighbours
    rows: Mapping[int, Any]


_Pass = tuple[_Part, ...]

_CACHE_NAMES = ("past_key_values", "layer_past")  # decoder layers call it either
_stamps = itertools.count()


def find_decoder(model: Any) -> tuple[nn.Module, nn.ModuleList]:
    """Return the part of a model that maps token ids to hidden states, and its layers.

    Raises:
        InputError: there is no such part.
    """
    model = getattr(model, "_orig_mod", model)  # what `torch.compile` wraps around it
    if hasattr(model, "get_base_model"):  # PEFT
        model = model.get_base_model()
    config = getattr(model, "config", None)
    if config is not None and hasattr(model, "get_decoder") and not getattr(config, "is_encoder_decoder", False):
        decoder = model.get_decoder() or model
        n_layers = config.get_text_config(decoder=True).num_hidden_layers
        for layers in decoder.children():
            if isinstance(layers, nn.ModuleList) and len(layers) == n_layers:
                return decoder, layers
    raise InputError(f"{type(model).__name__}: its decoder layers cannot be found; expected a decoder of transformers")


def attach(model: Any, actives: Sequence[Active]) -> None:
    """Put exactly these memories in force, in this order of addition.

    Raises:
        InputError: the model has no decoder layers that can be found, or does not hand them keyword arguments.
    """
    decoder, layers = find_decoder(model)
    if not actives:
        detach(model)
        return
    attachment = _find_attachment(decoder)
    if attachment is not None:
        attachment.actives, attachment.stamp = tuple(actives), next(_stamps)
        return
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in _parameters(decoder).values()):
        raise InputError(f"{type(decoder).__name__} takes no further keyword arguments, which memories need")
    _forget_graphs()
    hook = _DecoderHook(_Attachment(tuple(actives), next(_stamps)), tuple(_parameters(decoder)))
    decoder.register_forward_pre_hook(hook, with_kwargs=True)
    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(_LayerHook(number, tuple(_parameters(layer))), with_kwargs=True)


def attached(model: Any) -> tuple[Active, ...]:
    """Return what is in force."""
    attachment = _find_attachment(find_decoder(model)[0])
    return () if attachment is None else attachment.actives


def detach(model: Any) -> None:
    """Restore a model exactly; does nothing when nothing is attached."""
    decoder, layers = find_decoder(model)
    if _find_attachment(decoder) is not None:
        _forget_graphs()
    for module in (decoder, *layers):
        hooks = module._forward_pre_hooks
        for number in [number for number, hook in hooks.items() if isinstance(hook, (_DecoderHook, _LayerHook))]:
            del hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def prepare_cache(model: Any, cache: Any, batch_size: int) -> None:
    """Make an empty cache carry what memories remember; needed only where a compiled graph of one piece fills it.

    Raises:
        InputError: the cache is of a kind that cannot, or is filled already.
    """
    attachment = _find_attachment(find_decoder(model)[0])
    for active in () if attachment is None else attachment.actives:
        for layer in active.memory.settings.layer_ids:
            _open(cache, layer, active.memory, batch_size, attachment.stamp)  # type: ignore[union-attr]


def _find_attachment(decoder: nn.Module) -> _Attachment | None:
    # The hooks themselves say what is attached, so a copy of a model knows it too.
    hooks = decoder._forward_pre_hooks.values()
    return next((hook.attachment for hook in hooks if isinstance(hook, _DecoderHook)), None)


def _forget_graphs() -> None:
    """Have compiled models compiled again: their graphs do not notice that hooks come and go."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what a module takes, in the order in which it takes it."""
    return inspect.signature(module.forward).parameters


class _DecoderHook:
    """Reads the token ids of a pass and finds the rows of every memory and layer."""

    def __init__(self, attachment: _Attachment, names: tuple[str, ...]) -> None:
        self.attachment, self._names = attachment, names

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        ids = given.get("input_ids")
        if ids is None:
            raise InputError(
                "the model got inputs_embeds without input_ids: n-grams cannot be known; pass input_ids, or unload "
                "the memories"
            )
        if given.get("cache") is not None:
            raise InputError(
                f"the memory cannot be kept in a {type(given['cache']).__name__}, as continuous batching uses; "
                "use generate"
            )
        actives, stamp = self.attachment.actives, self.attachment.stamp
        cache = given.get("past_key_values")
        vocabulary = min(len(active.memory.lookup) for active in actives)
        layout = read_layout(ids, given.get("attention_mask"), given.get("position_ids"), cache, vocabulary)
        parts = tuple(_plan(active, stamp, ids, layout, cache) for active in actives)
        return args, {**kwargs, _KEYWORD: parts}


class _LayerHook:
    """Adds the memories' residuals to what enters a decoder layer."""

    def __init__(self, number: int, names: tuple[str, ...]) -> None:
        self._number, self._names = number, names

    def __call__(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kwargs = dict(kwargs)
        parts: _Pass | None = kwargs.pop(_KEYWORD, None)
        if parts is None:
            raise InputError(
                f"{type(layer).__name__} got no keyword arguments of the model's; memories need a model of "
                "transformers that hands them to its layers"
            )
        mine = [part for part in parts if self._number in part.rows]
        if not mine:
            return args, kwargs
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        hidden = args[0] if args else kwargs["hidden_states"]
        cache = next((given[name] for name in _CACHE_NAMES if given.get(name) is not None), None)
        total = _recall(mine[0], self._number, hidden, cache)
        for part in mine[1:]:
            total = total + _recall(part, self._number, hidden, cache)
        if args:
            return (hidden + total, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden + total}


def _open(cache: Any, number: int, memory: Memory, batch_size: int, stamp: int) -> History:
    """Return what a memory has read so far at a decoder layer."""
    module: MemoryLayer = memory.layers[str(number)]  # type: ignore[assignment]
    channels = memory.settings.hc_mult * memory.width
    return open_history(
        cache, number, memory.key, module.value_proj.weight.new_empty((batch_size, 0, channels)), memory.reach, stamp
    )


def _plan(active: Active, stamp: int, ids: Tensor, layout: Layout, cache: Any) -> _Part:
    """Find the rows of a memory for all its layers, before the first of them runs."""
    memory = active.memory
    ids = ids.to(memory.lookup.device)
    plain = layout.valid is None and layout.starts is None
    compressed = memory.compress(ids)
    if layout.valid is not None:
        compressed = torch.where(layout.valid.to(ids.device), compressed, PAD)
    starts = torch.zeros_like(ids, dtype=torch.bool) if layout.starts is None else layout.starts.to(ids.device)
    whole = Positions(ids=compressed, starts=starts, plain=plain)
    # The lowest layer says what all have read. Where even that is not run, as when the first layers of a model propose
    # tokens to the whole, there is nothing to remember.
    lowest = min(memory.settings.layer_ids)
    if cache is not None and has_layer(cache, lowest):
        whole = _open(cache, lowest, memory, ids.shape[0], stamp).positions().then(whole)
    neighbours = Neighbours(whole, ids.shape[1], memory.reach)
    rows = memory.rows(whole, neighbours, ids.shape[1])
    rows = {layer: memory.retrieve(layer, found) for layer, found in rows.items()}
    return _Part(active, stamp, cache is not None, whole, neighbours, rows)


def _recall(part: _Part, number: int, hidden: Tensor, cache: Any) -> Tensor:
    """Return a memory's residual for one layer, and let the cache remember."""
    memory, length = part.active.memory, hidden.shape[1]
    module: MemoryLayer = memory.layers[str(number)]  # type: ignore[assignment]
    weight = module.value_proj.weight
    values = module.values(hidden.to(weight.device, weight.dtype), module.multi_head_embedding(part.rows[number]))
    new = inputs = module.short_conv.normalize(values)
    history = None
    if cache is not None:
        history = _open(cache, number, memory, hidden.shape[0], part.stamp)
        if part.cached:  # if not, the decoder has just made it
            inputs = torch.cat((history.inputs(), new), dim=1)
    elif part.cached:
        raise InputError(f"decoder layer {number} got no cache although the decoder did; memories need it")
    steps = range(1, memory.settings.kernel_size)
    taps = [new, *(part.neighbours.before(inputs, step * memory.settings.dilation, 0) for step in steps)]
    residual = module.residual(values, taps)
    if history is not None:
        history.advance(part.whole, inputs, part.neighbours, length)
    if part.active.strength != 1:
        residual = residual * part.active.strength
    return residual.to(hidden.device, hidden.dtype)
