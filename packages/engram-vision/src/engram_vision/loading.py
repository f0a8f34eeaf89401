"""Load adapters into a diffusers pipeline and take them out again, each in one line.

    load_engram(pipeline, "zorbit.safetensors")
    image = pipeline("zorbit quell on the beach").images[0]
    unload_engrams(pipeline)

The pipeline stays the object it is: no weight, no tokenizer and no method of it is changed. What is loaded
belongs to the text encoder, so pipelines that share an encoder share what is loaded.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_SITE_OF_BACKBONE = "sd15"


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
_wrapped: weakref.WeakKeyDictionary[Any, StreamTokenizer] = weakref.WeakKeyDictionary()


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
        InputError: the pipeline has no such encoder, the name is taken, or the strength is not a number.
        IncompatibleAdaptersError: the adapter was made for another backbone, tokenizer or width.
        ConflictError: it contradicts what is loaded.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    adapter = source if isinstance(source, Adapter) else open_adapter(source)
    encoders = _fitting_encoders(pipeline, adapter)
    present = list_engrams(pipeline)
    name = name or (Path(adapter.path).stem if adapter.path is not None else adapter.names()[0])
    if name in (loaded.name for loaded in present):
        raise InputError(f"an engram named {name!r} is loaded already; unload it first, or pass another name")
    loaded = LoadedEngram(name=name, adapter=adapter, strength=strength)
    _apply(encoders, (*present, loaded))


def unload_engrams(pipeline: Any, *names: str) -> None:
    """Take adapters out of a pipeline; without names all of them. With none left the pipeline is as it was.

    Raises:
        InputError: nothing of that name is loaded.
    """
    present = list_engrams(pipeline)
    for name in names:
        if name not in (loaded.name for loaded in present):
            known = ", ".join(repr(loaded.name) for loaded in present) or "nothing"
            raise InputError(f"no engram named {name!r} is loaded; loaded: {known}")
    left = tuple(loaded for loaded in present if names and loaded.name not in names)
    _apply(_encoders(pipeline), left)


def list_engrams(pipeline: Any) -> tuple[LoadedEngram, ...]:
    """Return what is loaded into a pipeline, in the order of loading."""
    return next((_loaded[encoder] for encoder in _encoders(pipeline).values() if encoder in _loaded), ())


def pipeline_tokenizers(pipeline: Any) -> dict[str, StreamTokenizer]:
    """Return a pipeline's tokenizers by stream.

    Raises:
        InputError: the pipeline has none of the tokenizers and encoders that are known here.
    """
    found = {}
    for stream, (tokenizer_name, encoder_name) in _COMPONENTS[_SITE_OF_BACKBONE].items():
        tokenizer, encoder = getattr(pipeline, tokenizer_name, None), getattr(pipeline, encoder_name, None)
        if tokenizer is None or encoder is None:
            raise InputError(
                f"{type(pipeline).__name__} has no {tokenizer_name} and {encoder_name}; "
                "expected a Stable Diffusion 1.x pipeline with its text encoder"
            )
        if tokenizer not in _wrapped:
            _wrapped[tokenizer] = wrap_tokenizer(tokenizer, max_length=encoder.config.max_position_embeddings)
        found[stream] = _wrapped[tokenizer]
    return found


def _encoders(pipeline: Any) -> dict[str, nn.Module]:
    pipeline_tokenizers(pipeline)  # raises when it is no pipeline for us
    return {stream: getattr(pipeline, encoder) for stream, (_, encoder) in _COMPONENTS[_SITE_OF_BACKBONE].items()}


def _fitting_encoders(pipeline: Any, adapter: Adapter) -> dict[str, nn.Module]:
    """Return the pipeline's encoders after checking that the adapter was made for such ones."""
    backbone = adapter.manifest.backbone
    if backbone not in _COMPONENTS:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was made for {backbone}, {type(pipeline).__name__} is {_SITE_OF_BACKBONE}; "
            "load it into a pipeline of its own model family"
        )
    encoders, tokenizers = _encoders(pipeline), pipeline_tokenizers(pipeline)
    for stream, spec in adapter.manifest.streams.items():
        width = getattr(encoders.get(stream), "config", None)
        if width is None:
            raise IncompatibleAdaptersError(f"{adapter.label}: has a stream {stream!r} that {backbone} does not have")
        if width.hidden_size != spec.width:
            raise IncompatibleAdaptersError(
                f"{adapter.label}: stream {stream!r} has width {spec.width}, the pipeline's text encoder "
                f"{width.hidden_size}; it was trained for {adapter.manifest.base_model}"
            )
    check_tokenizers(adapter, tokenizers)
    return encoders


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
