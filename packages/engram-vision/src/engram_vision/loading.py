"""Load adapters into a diffusers pipeline and take them out again, each in one line.

    load_engram(pipeline, "zorbit.safetensors")
    image = pipeline("zorbit quell on the beach").images[0]
    unload_engrams(pipeline)

The pipeline stays the object it is: no weight, no tokenizer and no method of it is changed. What is loaded
belongs to the text encoders, so pipelines that share an encoder share what is loaded.
"""

from __future__ import annotations

import copy
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

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
from engram_core.card import is_repo_id
from engram_core.hub import find_adapter
from engram_vision.families import Family, family_of
from engram_vision.hooks import TextEdit, attach, detach
from engram_vision.shipped import known_fingerprint
from engram_vision.site_hooks import SiteReader, StreamRecall, attach_sites, detach_sites
from engram_vision.sites import find_corners, find_places, name_sites

__all__ = [
    "LoadedEngram",
    "check_base",
    "check_family",
    "disable_engrams",
    "enable_engrams",
    "list_engrams",
    "load_engram",
    "pipeline_tokenizers",
    "set_strength",
    "unload_engrams",
]

_LARGEST_STRENGTH = float(np.finfo(np.float32).max)

Strength = float | Mapping[str, float]
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedEngram:
    """An adapter that is loaded.

    Attributes:
        name: what it is called in this pipeline.
        adapter: its concepts.
        strength: one factor for all of them, or concept name to factor.
        enabled: whether it is in force.
    """

    name: str
    adapter: Adapter
    strength: Strength
    enabled: bool = True

    def factors(self) -> dict[str, float]:
        """Return each concept's strength by its name."""
        if isinstance(self.strength, Mapping):
            return {name: self.strength.get(name, 1.0) for name in self.adapter.names()}
        return dict.fromkeys(self.adapter.names(), self.strength)


@dataclass(frozen=True, slots=True, eq=False)
class _Prepared:
    """What was made of adapters to attach it: indexing very many concepts takes seconds, so it is not done twice.

    Attributes:
        adapters: which.
        edits: by stream.
    """

    adapters: tuple[Adapter, ...]
    edits: Mapping[str, TextEdit]

    def reader(self, family: Family, pipeline: Any, first_site: int) -> SiteReader | None:
        """Return what a denoiser's blocks read; None where the encoder's states are edited."""
        streams = {
            stream: StreamRecall(fired=edit.fired, editor=edit.residual.editor)
            for stream, edit in self.edits.items()
            if edit.fired is not None
        }
        return SiteReader(family, find_corners(family, pipeline), streams, first_site=first_site) if streams else None


@dataclass(frozen=True, slots=True, eq=False)
class _State:
    """What is loaded into encoders that some pipeline brought together.

    Attributes:
        loaded: in the order of loading.
        places: the encoders, each with the stream it is for.
        denoisers: what reads their states, each with the number of its first site.
        prepared: what is attached; while nothing is in force, what was.
    """

    loaded: tuple[LoadedEngram, ...]
    places: tuple[tuple[weakref.ref[nn.Module], str], ...]
    denoisers: tuple[tuple[weakref.ref[nn.Module], int], ...]
    prepared: _Prepared


_states: weakref.WeakKeyDictionary[nn.Module, _State] = weakref.WeakKeyDictionary()
_changing = threading.Lock()


def load_engram(
    pipeline: Any,
    source: str | os.PathLike[str] | Adapter,
    *,
    name: str | None = None,
    strength: Strength = 1.0,
    filename: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> None:
    """Load an adapter into a pipeline, beside those that are loaded already.

    Args:
        pipeline: any diffusers pipeline with the tokenizers and text encoders of Stable Diffusion 1.x, XL or 3.x.
        source: adapter file, id of a hub repository (`owner/name`), or an opened adapter.
        name: to address it by; None means the file's name without suffix, or the repository's.
        strength: one factor for all its concepts, or concept name to factor (1.0 for others); 0 is the base model.
        filename: file in the repository; None means `engram.safetensors`.
        revision: branch, tag or commit of the repository.
        force: load it although it was trained on another model of the family.

    Warns:
        UserWarning: the pipeline lacks an optional encoder (T5) for which the adapter has a stream.

    Raises:
        InputError: the pipeline has no such encoders or other tokenizers, the name is taken, the strength is not
            a number, or the source cannot be found.
        IncompatibleAdaptersError: the adapter was made for another backbone, base model, width or site.
        ConceptNotFoundError: `strength` names a concept that the adapter lacks.
        ConflictError: it contradicts what is loaded.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    if isinstance(source, Adapter):
        adapter = source
    else:
        adapter = open_adapter(find_adapter(source, filename=filename, revision=revision))
    missing = _check_fit(pipeline, adapter, force=force)
    name = name or _name_of(source, adapter)
    new = LoadedEngram(name=name, adapter=adapter, strength=_check_strength(adapter, strength))
    with _changing:
        present = list_engrams(pipeline)
        if name in (other.name for other in present):
            raise InputError(f"an engram named {name!r} is loaded already; unload it first, or pass another name")
        _apply(pipeline, (*present, new))
    for stream in missing:
        warnings.warn(
            f"{adapter.label}: its stream {stream!r} is left out, because the pipeline has no "
            f"{family_of(pipeline).streams[stream].encoder}; the subject may look less like itself",
            stacklevel=2,
        )


def set_strength(pipeline: Any, name: str, strength: Strength) -> None:
    """Set how strongly a loaded adapter acts.

    Args:
        pipeline: with the adapter loaded.
        name: of the adapter.
        strength: one factor for all its concepts, or concept name to factor (1.0 for others); 0 is the base model.

    Raises:
        InputError: nothing of that name is loaded, or the strength is not a number.
        ConceptNotFoundError: `strength` names a concept that the adapter lacks.
    """
    _change(pipeline, (name,), lambda one: replace(one, strength=_check_strength(one.adapter, strength)))


def disable_engrams(pipeline: Any, *names: str) -> None:
    """Put adapters out of force, without names all of them; they stay loaded.

    Raises:
        InputError: nothing of that name is loaded.
    """
    _change(pipeline, names, lambda one: replace(one, enabled=False))


def enable_engrams(pipeline: Any, *names: str) -> None:
    """Put adapters back into force, without names all of them.

    Raises:
        InputError: nothing of that name is loaded.
        ConflictError: it contradicts another one that is in force.
    """
    _change(pipeline, names, lambda one: replace(one, enabled=True))


def unload_engrams(pipeline: Any, *names: str) -> None:
    """Take adapters out of a pipeline; without names all of them. With none left the pipeline is as it was.

    Raises:
        InputError: nothing of that name is loaded.
    """
    _change(pipeline, names, lambda _: None)


def list_engrams(pipeline: Any) -> tuple[LoadedEngram, ...]:
    """Return what is loaded into a pipeline, in the order of loading."""
    states = (_states.get(encoder) for encoder in family_of(pipeline).encoders(pipeline).values())
    # Encoders of several pipelines, each with adapters of its own, may have come together in this one.
    return tuple(dict.fromkeys(one for state in states if state is not None for one in state.loaded))


def pipeline_tokenizers(pipeline: Any) -> dict[str, StreamTokenizer]:
    """Return a pipeline's tokenizers by stream, without those of optional encoders that it lacks.

    Raises:
        InputError: the pipeline has none of the tokenizers and encoders that are known here.
    """
    family = family_of(pipeline)
    found = {}
    for stream, encoder in family.encoders(pipeline).items():
        part = family.streams[stream]
        # A copy, because each use sets how a tokenizer of transformers pads and cuts: another thread may be drawing.
        tokenizer = copy.deepcopy(getattr(pipeline, part.tokenizer))
        found[stream] = wrap_tokenizer(tokenizer, max_length=part.read_length(tokenizer, encoder))
    return found


def _check_fit(pipeline: Any, adapter: Adapter, *, force: bool) -> list[str]:
    """Check that an adapter was made for such a pipeline; return its streams that the pipeline has no encoder for."""
    family, label = family_of(pipeline), adapter.label
    check_family(adapter, family)
    encoders, missing = family.encoders(pipeline), []
    for stream, spec in adapter.manifest.streams.items():
        if stream not in family.streams:
            raise IncompatibleAdaptersError(
                f"{label}: has a stream {stream!r}, {family.name} has {', '.join(family.streams)}; "
                "it cannot be used here"
            )
        if stream not in encoders:
            missing.append(stream)
            continue
        site = family.streams[stream].site
        if spec.site != site:
            raise IncompatibleAdaptersError(
                f"{label}: stream {stream!r} edits the {spec.site}, the pipeline reads the {site}; train it again"
            )
        _check_sites(pipeline, adapter, stream)
        width = encoders[stream].config.hidden_size
        if width != spec.width:
            raise IncompatibleAdaptersError(
                f"{label}: stream {stream!r} has width {spec.width}, the pipeline's {family.streams[stream].encoder} "
                f"{width}; it was trained for {adapter.manifest.base_model}"
            )
    if not force:
        check_base(adapter, str(getattr(pipeline, "name_or_path", None) or ""))
    check_tokenizers(adapter, pipeline_tokenizers(pipeline), list(encoders))
    return missing


def _check_sites(pipeline: Any, adapter: Adapter, stream: str) -> None:
    """Refuse a stream whose sites are not the blocks of the pipeline's denoiser."""
    sites = adapter.manifest.streams[stream].sites
    if sites is None:
        return
    present = name_sites(family_of(pipeline), pipeline)
    if sites != present:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: stream {stream!r} has {len(sites)} sites from {sites[0]} to {sites[-1]}, the pipeline's "
            f"denoiser {len(present)} from {present[0]} to {present[-1]}; it was trained for "
            f"{adapter.manifest.base_model}"
        )


def check_family(adapter: Adapter, family: Family) -> None:
    """Raise IncompatibleAdaptersError unless an adapter was made for a family."""
    if adapter.manifest.backbone != family.name:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was made for {adapter.manifest.backbone}, this is {family.name} ({family.title}); "
            "use it with a model of its own family"
        )


def check_base(adapter: Adapter, place: str) -> None:
    """Refuse another model of the family than the adapter was trained on, where both say which they are.

    Args:
        adapter: its manifest tells.
        place: where the model came from: a hub id or a folder; empty when unknown.

    Raises:
        IncompatibleAdaptersError: it is another one.
    """
    manifest, fingerprint = adapter.manifest, known_fingerprint(place)
    if fingerprint and manifest.base_fingerprint and fingerprint != manifest.base_fingerprint:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was trained on {manifest.base_model} with fingerprint {manifest.base_fingerprint[:12]}, "
            f"this one has {fingerprint[:12]}; train it again, or insist with force=True (--force-base)"
        )
    both_known = is_repo_id(place) and is_repo_id(manifest.base_model) and not Path(place).exists()
    if both_known and place != manifest.base_model:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was trained on {manifest.base_model}, this is {place}; "
            "train it again, or insist with force=True (--force-base)"
        )


def _name_of(source: str | os.PathLike[str] | Adapter, adapter: Adapter) -> str:
    if isinstance(source, Adapter):
        return Path(source.path).stem if source.path is not None else adapter.names()[0]
    is_repository = not Path(source).exists()
    return Path(source).name if is_repository else Path(source).stem


def _check_strength(adapter: Adapter, strength: Strength) -> float | dict[str, float]:
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


def _change(pipeline: Any, names: tuple[str, ...], change: Callable[[LoadedEngram], LoadedEngram | None]) -> None:
    """Change, or remove where the change gives None, the adapters of these names; without names all."""
    with _changing:
        present = list_engrams(pipeline)
        for name in names:
            if name not in (one.name for one in present):
                known = ", ".join(repr(one.name) for one in present) or "nothing"
                raise InputError(f"no engram named {name!r} is loaded; loaded: {known}")
        changed = (change(one) if not names or one.name in names else one for one in present)
        _apply(pipeline, tuple(one for one in changed if one is not None))


def _apply(pipeline: Any, loaded: tuple[LoadedEngram, ...]) -> None:
    """Attach exactly these adapters; computes everything before it changes anything."""
    family = family_of(pipeline)
    places = {encoder: stream for stream, encoder in family.encoders(pipeline).items()}
    denoisers = _number_sites(family, pipeline)
    # Encoders that another pipeline shares with this one bring that pipeline's other encoders along.
    for state in {id(state): state for encoder in places if (state := _states.get(encoder))}.values():
        places |= {encoder: stream for reference, stream in state.places if (encoder := reference())}
        denoisers |= {denoiser: first for reference, first in state.denoisers if (denoiser := reference())}
    prepared = _prepare(loaded, [_states[encoder].prepared for encoder in places if encoder in _states])
    edits = prepared.edits if any(one.enabled for one in loaded) else {}
    state = _State(loaded, _weakly(places), _weakly(denoisers), prepared)
    for encoder, stream in places.items():
        if stream in edits:
            attach(encoder, edits[stream])
        else:
            detach(encoder)
        if loaded:
            _states[encoder] = state
        else:
            _states.pop(encoder, None)
    for denoiser, first in denoisers.items():
        reader = prepared.reader(family, pipeline, first) if edits else None
        if reader is None:
            detach_sites(denoiser)
        else:
            attach_sites(family, denoiser, reader)


def _number_sites(family: Family, pipeline: Any) -> dict[nn.Module, int]:
    """Return a pipeline's denoisers, each with the number of its first site."""
    numbers, first = {}, 0
    for denoiser in family.denoisers(pipeline).values():
        numbers[denoiser] = first
        first += len(find_places(family, denoiser))
    return numbers


def _weakly(values: Mapping[nn.Module, _Value]) -> tuple[tuple[weakref.ref[nn.Module], _Value], ...]:
    return tuple((weakref.ref(module), value) for module, value in values.items())


def _prepare(loaded: tuple[LoadedEngram, ...], before: list[_Prepared]) -> _Prepared:
    """Return what to attach for these adapters; an index that exists already is used again."""
    active = [one for one in loaded if one.enabled]
    if not active:
        kept = {one.adapter for one in loaded}
        return next((prepared for prepared in before if kept.issuperset(prepared.adapters)), _Prepared((), {}))
    adapters, strength = tuple(one.adapter for one in active), _strengths(active)
    for prepared in before:
        if prepared.adapters == adapters:
            return replace(
                prepared, edits={stream: edit.with_strength(strength) for stream, edit in prepared.edits.items()}
            )
    # One adapter stays memory-mapped; several become one, because triggers that overlap must be settled together.
    adapter = adapters[0] if len(adapters) == 1 else merge_adapters(adapters)
    return _Prepared(adapters, {stream: TextEdit.of(adapter, stream, strength) for stream in adapter.streams})


def _strengths(loaded: list[LoadedEngram]) -> Strength:
    if len(loaded) == 1:
        return loaded[0].strength
    factors: dict[str, float] = {}
    for one in loaded:
        for name, factor in one.factors().items():
            if factors.setdefault(name, factor) != factor:
                raise InputError(f"concept {name!r} is loaded twice with different strengths; unload one of them")
    return factors
