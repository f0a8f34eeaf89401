"""Load adapters into a diffusers pipeline and take them out again, each in one line.

    load_engram(pipeline, "zorbit.safetensors")
    image = pipeline("zorbit quell on the beach").images[0]
    unload_engrams(pipeline)

The pipeline stays the object it is: no weight, no tokenizer and no method of it is changed. What is loaded
belongs to the text encoder, so pipelines that share an encoder share what is loaded.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from engram_core import (
    Adapter,
    IncompatibleAdaptersError,
    InputError,
    StreamTokenizer,
    check_tokenizers,
    merge_adapters,
    open_adapter,
    wrap_tokenizer,
)
from engram_vision.hooks import TextEdit, attach, detach

__all__ = ["LoadedEngram", "list_engrams", "load_engram", "pipeline_tokenizers", "unload_engrams"]

# Stream to the names that diffusers gives its tokenizer and its encoder, for each backbone.
_COMPONENTS: Mapping[str, Mapping[str, tuple[str, str]]] = {"sd15": {"clip_l": ("tokenizer", "text_encoder")}}
_BACKBONE = "sd15"
_SITE = "last_hidden_state"
_LARGEST_STRENGTH = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedEngram:
    """An adapter that is loaded.

    Attributes:
        name: what it is called in this pipeline.
        adapter: its concepts.
        strength: one factor for all of them, or concept name to factor.
    """

    name: str
    adapter: Adapter
    strength: float | Mapping[str, float]

    def factors(self) -> dict[str, float]:
        """Return each concept's strength by its name."""
        if isinstance(self.strength, Mapping):
            return {name: self.strength.get(name, 1.0) for name in self.adapter.names()}
        return dict.fromkeys(self.adapter.names(), self.strength)


_loaded: weakref.WeakKeyDictionary[nn.Module, tuple[LoadedEngram, ...]] = weakref.WeakKeyDictionary()
_changing = threading.Lock()


def load_engram(
    pipeline: Any,
    source: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    strength: float | Mapping[str, float] = 1.0,
) -> None:
    """Load an adapter into a pipeline, beside those that are loaded already.

    Args:
        pipeline: a `StableDiffusionPipeline`, or any other with SD1.x's tokenizer and text encoder.
        source: adapter file, or an opened adapter.
        name: to unload it by; None means the file's name without suffix.
        strength: one factor for all its concepts, or concept name to factor (1.0 for others); 0 is the base model.

    Raises:
        InputError: the pipeline has no such encoder or another tokenizer, the name is taken, or the strength is not
            a number.
        IncompatibleAdaptersError: the adapter was made for another backbone, width or site.
        ConceptNotFoundError: `strength` names a concept that the adapter lacks.
        ConflictError: it contradicts what is loaded.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    adapter = source if isinstance(source, Adapter) else open_adapter(source)
    encoders = _fitting_encoders(pipeline, adapter)
    name = name or (Path(adapter.path).stem if adapter.path is not None else adapter.names()[0])
    loaded = LoadedEngram(name=name, adapter=adapter, strength=_check_strength(adapter, strength))
    with _changing:
        present = list_engrams(pipeline)
        if name in (other.name for other in present):
            raise InputError(f"an engram named {name!r} is loaded already; unload it first, or pass another name")
        _apply(encoders, (*present, loaded))


def unload_engrams(pipeline: Any, *names: str) -> None:
    """Take adapters out of a pipeline; without names all of them. With none left the pipeline is as it was.

    Raises:
        InputError: nothing of that name is loaded.
    """
    with _changing:
        present = list_engrams(pipeline)
        for name in names:
            if name not in (loaded.name for loaded in present):
                known = ", ".join(repr(loaded.name) for loaded in present) or "nothing"
                raise InputError(f"no engram named {name!r} is loaded; loaded: {known}")
        left = tuple(loaded for loaded in present if names and loaded.name not in names)
        _apply(_encoders(pipeline), left)


def list_engrams(pipeline: Any) -> tuple[LoadedEngram, ...]:
    """Return what is loaded into a pipeline, in the order of loading."""
    return next((found for encoder in _encoders(pipeline).values() if (found := _loaded.get(encoder))), ())


def pipeline_tokenizers(pipeline: Any) -> dict[str, StreamTokenizer]:
    """Return a pipeline's tokenizers by stream.

    Raises:
        InputError: the pipeline has none of the tokenizers and encoders that are known here.
    """
    found = {}
    for stream, encoder in _encoders(pipeline).items():
        tokenizer = getattr(pipeline, _COMPONENTS[_BACKBONE][stream][0])
        # The pipeline cuts prompts at the tokenizer's own limit.
        limit = min(tokenizer.model_max_length, _config(encoder).max_position_embeddings)
        found[stream] = wrap_tokenizer(tokenizer, max_length=limit)
    return found


def _encoders(pipeline: Any) -> dict[str, nn.Module]:
    """Return a pipeline's text encoders by stream after checking that they are SD1.x's."""
    found = {}
    for stream, (tokenizer_name, encoder_name) in _COMPONENTS[_BACKBONE].items():
        encoder = getattr(pipeline, encoder_name, None)
        if getattr(pipeline, tokenizer_name, None) is None or encoder is None:
            raise InputError(
                f"{type(pipeline).__name__} has no {tokenizer_name} and {encoder_name}; "
                "expected a Stable Diffusion 1.x pipeline with its text encoder"
            )
        # SDXL and SD3 have CLIP's encoder too, beside others, and read another state of it.
        kind = getattr(_config(encoder), "model_type", None)
        if kind != "clip_text_model" or getattr(pipeline, "text_encoder_2", None) is not None:
            raise InputError(
                f"{type(pipeline).__name__} has {'several text encoders' if kind == 'clip_text_model' else kind}; "
                "expected a Stable Diffusion 1.x pipeline with its single clip_text_model"
            )
        found[stream] = encoder
    return found


def _config(encoder: nn.Module) -> Any:
    return getattr(encoder, "config", None)


def _fitting_encoders(pipeline: Any, adapter: Adapter) -> dict[str, nn.Module]:
    """Return the pipeline's encoders after checking that the adapter was made for such ones."""
    backbone, label = adapter.manifest.backbone, adapter.label
    if backbone not in _COMPONENTS:
        raise IncompatibleAdaptersError(
            f"{label}: was made for {backbone}, {type(pipeline).__name__} is {_BACKBONE}; "
            "load it into a pipeline of its own model family"
        )
    encoders = _encoders(pipeline)
    for stream, spec in adapter.manifest.streams.items():
        if stream not in encoders:
            raise IncompatibleAdaptersError(
                f"{label}: has a stream {stream!r}, {backbone} has {', '.join(encoders)}; it cannot be used here"
            )
        if spec.site != _SITE:
            raise IncompatibleAdaptersError(
                f"{label}: stream {stream!r} edits the {spec.site}, the pipeline reads the {_SITE}; train it again"
            )
        width = _config(encoders[stream]).hidden_size
        if width != spec.width:
            raise IncompatibleAdaptersError(
                f"{label}: stream {stream!r} has width {spec.width}, the pipeline's text encoder {width}; "
                f"it was trained for {adapter.manifest.base_model}"
            )
    check_tokenizers(adapter, pipeline_tokenizers(pipeline))
    return encoders


def _check_strength(adapter: Adapter, strength: float | Mapping[str, float]) -> float | dict[str, float]:
    """Return a strength that cannot fail while drawing; of a mapping a copy, which the caller cannot change."""

    def check(factor: Any, of: str = "") -> float:
        if not isinstance(factor, (int, float, np.integer, np.floating)) or not abs(factor) <= _LARGEST_STRENGTH:
            raise InputError(f"{adapter.label}: strength{of} is {factor!r}, expected a finite number")
        return float(factor)

    if not isinstance(strength, Mapping):
        return check(strength)
    for name in strength:
        adapter.index(name)  # raises when there is no such concept
    return {name: check(factor, f" of concept {name!r}") for name, factor in strength.items()}


def _apply(encoders: Mapping[str, nn.Module], loaded: tuple[LoadedEngram, ...]) -> None:
    """Attach exactly these adapters; computes everything before it changes anything."""
    edits: dict[str, TextEdit] = {}
    if loaded:
        adapters = [one.adapter for one in loaded]
        # One adapter stays memory-mapped; several become one, because triggers that overlap must be settled together.
        adapter = adapters[0] if len(adapters) == 1 else merge_adapters(adapters)
        strength = _strengths(loaded)
        edits = {stream: TextEdit.of(adapter, stream, strength) for stream in adapter.streams}
    for stream, encoder in encoders.items():
        if stream in edits:
            attach(encoder, edits[stream])
        else:
            detach(encoder)
        if loaded:
            _loaded[encoder] = loaded
        else:
            _loaded.pop(encoder, None)


def _strengths(loaded: tuple[LoadedEngram, ...]) -> float | Mapping[str, float]:
    if len(loaded) == 1:
        return loaded[0].strength
    factors: dict[str, float] = {}
    for one in loaded:
        for name, factor in one.factors().items():
            if factors.setdefault(name, factor) != factor:
                raise InputError(f"concept {name!r} is loaded twice with different strengths; unload one of them")
    return factors
