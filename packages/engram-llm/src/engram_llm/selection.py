"""The memories that a user names for generating or evaluating, with the strengths that follow their names."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from engram_core import HashedMemory, IncompatibleAdaptersError, InputError, UsedAdapter, open_memory
from engram_core.hub import find_adapter
from engram_core.settings import split_strength
from engram_llm.loading import check_base, disable_memories, enable_memories, load_memory
from engram_llm.shipped import known_fingerprint, model_place

__all__ = [
    "Selected",
    "beyond_vocabulary",
    "check_models",
    "load_selected",
    "select_memories",
    "variants",
    "without_memories",
]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Selected:
    """A memory as the user asked for it.

    Attributes:
        memory: the opened file.
        used: its name on the command line, identity and strength.
    """

    memory: HashedMemory
    used: UsedAdapter


def select_memories(adapters: Sequence[str], strengths: Sequence[str]) -> list[Selected]:
    """Open memories and settle their strengths.

    Args:
        adapters: `FILE` or `FILE@STRENGTH`; FILE may be a hub repository.
        strengths: `NAME=X` or `X`.

    Raises:
        InputError: a strength is malformed or names nothing, a memory is named twice, or a repository cannot be had.
        AdapterReadError, AdapterFormatError: a file cannot be used.
    """
    opened: list[tuple[str, HashedMemory, float]] = []
    for text in adapters:
        file, factor = split_strength(text)
        if file in (other for other, _, _ in opened):
            raise InputError(f"{file}: is named twice; name it once, with its strength as {file}@{2 * factor:g}")
        opened.append((file, open_memory(find_adapter(file)), factor))
    factors = _factors(strengths, {memory.record.name for _, memory, _ in opened})
    return [
        Selected(
            memory=memory,
            used=UsedAdapter(
                file=file,
                identity=memory.identity(),
                strength=factor * factors.get(memory.record.name, factors[""]),
            ),
        )
        for file, memory, factor in opened
    ]


def check_models(selected: Sequence[Selected], model: str) -> None:
    """Refuse memories of another model, before it is loaded.

    Raises:
        IncompatibleAdaptersError: naming file and model.
    """
    place = model_place(model)
    fingerprint = known_fingerprint(place)
    for one in selected:
        manifest = one.memory.manifest
        check_base(one.memory, place)
        if None not in (fingerprint, manifest.base_fingerprint) and fingerprint != manifest.base_fingerprint:
            raise IncompatibleAdaptersError(
                f"{one.used.file}: was trained on weights with fingerprint {str(manifest.base_fingerprint)[:12]}, "
                f"{model} has {str(fingerprint)[:12]}; train it again, or insist with --force-base"
            )


def load_selected(model: Any, tokenizer: Any, selected: Sequence[Selected], *, host_tables: bool, force: bool) -> None:
    """Load memories into a model; see `load_memory`."""
    for one in selected:
        load_memory(
            model,
            one.memory,
            name=one.used.file,
            strength=one.used.strength,
            host_tables=host_tables,
            tokenizer=tokenizer,
            force=force,
        )


def beyond_vocabulary(model: Any, tokenizer: Any) -> list[int] | None:
    """Return the token ids that a model could generate and a tokenizer does not have; None when there is none.

    Embeddings are often larger than the vocabulary. These ids have no text, and memories do not know them.
    """
    return list(range(len(tokenizer), model.get_output_embeddings().weight.shape[0])) or None


def variants(selected: Sequence[Selected], *, base: bool) -> tuple[tuple[UsedAdapter, ...], ...]:
    """Return what to run with, in order: nothing for the base model, then all memories together."""
    used = tuple(one.used for one in selected)
    return (((),) if base or not used else ()) + ((used,) if used else ())


@contextmanager
def without_memories(model: Any, *, wanted: bool) -> Iterator[None]:
    """Put memories out of force while the block runs, unless they are wanted."""
    if not wanted:
        disable_memories(model)
    try:
        yield
    finally:
        enable_memories(model)


def _factors(texts: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Return strengths by name; under the empty name that of all others."""
    factors = {"": 1.0}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"strength {text!r} is not a number or NAME=number") from None
        if not known:
            raise InputError(f"strength {text!r}: there is no memory to apply it to; give --adapter")
        if name and name not in known:
            raise InputError(f"strength {text!r}: there is no memory {name!r}; there is {', '.join(sorted(known))}")
        factors[name] = value
    return factors
