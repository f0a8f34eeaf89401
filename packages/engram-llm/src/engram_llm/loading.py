"""Load memories into a language model and take them out again, each in one line.

    load_memory(model, "biomedicine.safetensors")
    model.generate(**inputs)
    unload_memories(model)

The model stays the object it is: no weight and no method of it is changed. Several memories act side by side: each
reads what enters a decoder layer, and their residuals add up in one order, whatever the order of loading.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engram_core import HashedMemory, IncompatibleAdaptersError, InputError, TokenizerSpec, open_memory, wrap_tokenizer
from engram_core.card import is_repo_id
from engram_core.hub import find_adapter
from engram_llm.attachment import Active, attach, detach, find_decoder
from engram_llm.memory import Memory

__all__ = [
    "LoadedMemory",
    "check_memory",
    "disable_memories",
    "enable_memories",
    "list_memories",
    "load_memory",
    "set_strength",
    "unload_memories",
]

_LARGEST_STRENGTH = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadedMemory:
    """A memory that is loaded.

    Attributes:
        name: what it is called in this model.
        source: its file.
        memory: its weights.
        strength: what its residuals are multiplied by.
        enabled: whether it is in force.
    """

    name: str
    source: HashedMemory
    memory: Memory
    strength: float
    enabled: bool = True

    @property
    def identity(self) -> str:
        """The hex SHA-256 of the file, which the first call reads whole."""
        return self.source.identity()


_LOADED = "_engram_memories"  # an attribute of the decoder, so that a copy of a model has it too
_changing = threading.Lock()


def load_memory(
    model: Any,
    source: str | os.PathLike[str] | HashedMemory,
    *,
    name: str | None = None,
    strength: float = 1.0,
    dtype: torch.dtype | None = None,
    host_tables: bool = False,
    tokenizer: Any = None,
    filename: str | None = None,
    revision: str | None = None,
    force: bool = False,
) -> None:
    """Load a memory into a model, beside those that are loaded already.

    Args:
        model: a decoder of transformers, or one that PEFT or `torch.compile` wraps.
        source: memory file, id of a hub repository (`owner/name`), or an opened memory.
        name: to address it by; None means the file's name without suffix, or the repository's.
        strength: what its residuals are multiplied by; 0 is the base model.
        dtype: of its weights; None means the model's.
        host_tables: leave its tables in the mapped file; rows are read when they are needed.
        tokenizer: the tokenizer of the texts, to compare with the one that the memory was trained with.
        filename: file in the repository; None means `engram.safetensors`.
        revision: branch, tag or commit of the repository.
        force: load it although it was trained on another model of the same width and vocabulary.

    Raises:
        InputError: the model has no decoder layers that can be found, the name is taken, the strength is not a
            number, or the source cannot be found.
        IncompatibleAdaptersError: the memory was made for another width, vocabulary, tokenizer or model.
        AdapterReadError, AdapterFormatError: the file cannot be used.
    """
    if not isinstance(source, HashedMemory):
        source = open_memory(find_adapter(source, filename=filename, revision=revision))
    check_memory(model, source, tokenizer=tokenizer, force=force)
    decoder, _ = find_decoder(model)
    weight = next(decoder.parameters())
    new = LoadedMemory(
        name=name or (source.path.stem if source.path is not None else source.record.name),
        source=source,
        memory=Memory.read(source, dtype=dtype or weight.dtype, host_tables=host_tables, device=weight.device),
        strength=_check_strength(strength, source.label),
    )
    with _changing:
        present = list_memories(model)
        if new.name in (other.name for other in present):
            raise InputError(f"a memory named {new.name!r} is loaded already; unload it first, or pass another name")
        _apply(model, (*present, new))


def set_strength(model: Any, name: str, strength: float) -> None:
    """Set how strongly a loaded memory acts; 0 is the base model.

    Raises:
        InputError: nothing of that name is loaded, or the strength is not a number.
    """
    _change(model, (name,), lambda one: replace(one, strength=_check_strength(strength, one.source.label)))


def disable_memories(model: Any, *names: str) -> None:
    """Put memories out of force, without names all of them; they stay loaded.

    Raises:
        InputError: nothing of that name is loaded.
    """
    _change(model, names, lambda one: replace(one, enabled=False))


def enable_memories(model: Any, *names: str) -> None:
    """Put memories back into force, without names all of them.

    Raises:
        InputError: nothing of that name is loaded.
    """
    _change(model, names, lambda one: replace(one, enabled=True))


def unload_memories(model: Any, *names: str) -> None:
    """Take memories out of a model; without names all of them. With none left the model is as it was.

    Raises:
        InputError: nothing of that name is loaded.
    """
    _change(model, names, lambda _: None)


def list_memories(model: Any) -> tuple[LoadedMemory, ...]:
    """Return what is loaded into a model, in the order of loading."""
    loaded: tuple[LoadedMemory, ...] = getattr(find_decoder(model)[0], _LOADED, ())
    return loaded


def check_memory(model: Any, source: HashedMemory, *, tokenizer: Any = None, force: bool = False) -> None:
    """Refuse a memory that does not fit a model.

    Args:
        model: as in `load_memory`.
        source: the memory.
        tokenizer: of the texts, to compare; None compares the size of the vocabulary alone.
        force: do not compare the names of the models.

    Raises:
        IncompatibleAdaptersError: it was made for another width, number of layers, vocabulary, tokenizer or model.
    """
    decoder, layers = find_decoder(model)
    label, base = source.label, source.manifest.base_model
    config = decoder.config.get_text_config(decoder=True)  # type: ignore[union-attr,operator]
    if config.hidden_size != source.width:
        raise IncompatibleAdaptersError(
            f"{label}: has width {source.width}, the model's hidden states have {config.hidden_size}; "
            f"it was trained for {base}"
        )
    highest = max(source.settings.layer_ids)
    if highest >= len(layers):
        raise IncompatibleAdaptersError(
            f"{label}: has a memory for layer {highest}, the model has layers 0 to {len(layers) - 1}; "
            f"it was trained for {base}"
        )
    if len(source.lookup) > config.vocab_size:
        raise IncompatibleAdaptersError(
            f"{label}: was trained with {len(source.lookup)} token ids, the model has {config.vocab_size}; "
            f"it was trained for {base}"
        )
    if tokenizer is not None:
        _check_tokenizer(source, tokenizer)
    place = str(getattr(decoder.config, "name_or_path", "") or "")
    if not force:
        check_base(source, place)


def _check_tokenizer(source: HashedMemory, tokenizer: Any) -> None:
    found: TokenizerSpec = wrap_tokenizer(tokenizer).spec
    expected = source.manifest.streams["text"].tokenizer
    if (found.fingerprint, found.vocab_size) != (expected.fingerprint, expected.vocab_size):
        raise IncompatibleAdaptersError(
            f"{source.label}: was trained with the tokenizer {expected.class_name} of {expected.vocab_size} tokens and "
            f"fingerprint {expected.fingerprint[:12]}, this one is {found.class_name} of {found.vocab_size} with "
            f"{found.fingerprint[:12]}; use the tokenizer of {source.manifest.base_model}"
        )


def check_base(source: HashedMemory, place: str) -> None:
    """Refuse another model than the memory was trained on, where both say which they are.

    Args:
        source: its manifest tells.
        place: where the model came from: a hub id or a folder; empty when unknown.

    Raises:
        IncompatibleAdaptersError: it is another one.
    """
    manifest = source.manifest
    both_known = is_repo_id(place) and is_repo_id(manifest.base_model) and not Path(place).exists()
    if both_known and place != manifest.base_model:
        raise IncompatibleAdaptersError(
            f"{source.label}: was trained on {manifest.base_model}, this is {place}; "
            "train it again, or insist with force=True (--force-base)"
        )


def _check_strength(strength: Any, label: str) -> float:
    if not isinstance(strength, (int, float, np.integer, np.floating)) or not abs(strength) <= _LARGEST_STRENGTH:
        raise InputError(f"{label}: strength is {strength!r}, expected a finite number")
    return float(strength)


def _change(model: Any, names: tuple[str, ...], change: Callable[[LoadedMemory], LoadedMemory | None]) -> None:
    """Change, or remove where the change gives None, the memories of these names; without names all."""
    with _changing:
        present = list_memories(model)
        for name in names:
            if name not in (one.name for one in present):
                known = ", ".join(repr(one.name) for one in present) or "nothing"
                raise InputError(f"no memory named {name!r} is loaded; loaded: {known}")
        changed = (change(one) if not names or one.name in names else one for one in present)
        _apply(model, tuple(one for one in changed if one is not None))


def _apply(model: Any, loaded: tuple[LoadedMemory, ...]) -> None:
    decoder, _ = find_decoder(model)
    active = [one for one in loaded if one.enabled and one.strength]
    if len(active) > 1:
        # One order of addition, whatever the order of loading: floats do not commute beyond two.
        active.sort(key=lambda one: (one.identity, one.name))
    if active:
        attach(model, [Active(one.memory, one.strength) for one in active])
    else:
        detach(model)
    if loaded:
        setattr(decoder, _LOADED, loaded)
    elif hasattr(decoder, _LOADED):
        delattr(decoder, _LOADED)
