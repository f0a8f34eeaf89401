"""Opening an adapter file of whichever kind it is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

from engram_core.adapter import Adapter
from engram_core.container import open_container
from engram_core.errors import IncompatibleAdaptersError
from engram_core.memory import MEMORY_KIND, HashedMemory

__all__ = ["open_any", "open_tables", "refuse_memories"]


def open_any(path: str | os.PathLike[str]) -> Adapter | HashedMemory:
    """Open an adapter file, whether it holds concepts or a hashed memory. Reads the header alone.

    Raises:
        AdapterReadError: the file is missing or unreadable.
        AdapterFormatError: the file is not a valid adapter; the message names the field.
    """
    container = open_container(path)
    return HashedMemory(container) if container.metadata.get("kind") == MEMORY_KIND else Adapter(container)


def open_tables(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Adapter]:
    """Open the adapters to merge, one after the other.

    Raises:
        IncompatibleAdaptersError: one of them is a hashed memory.
        AdapterReadError, AdapterFormatError: a file cannot be used.
    """
    before: list[Adapter | HashedMemory] = []
    for number, path in enumerate(paths):
        opened = open_any(path)
        if isinstance(opened, HashedMemory):
            others = [] if before else [open_any(other) for other in paths[number + 1 : number + 2]]
            refuse_memories([*before, opened, *others])
        else:
            yield opened
            before = [opened]  # the nearest one is named in the message; more would keep files open


def refuse_memories(adapters: Sequence[Adapter | HashedMemory]) -> None:
    """Refuse to merge when one of some adapters is a hashed memory.

    Raises:
        IncompatibleAdaptersError: naming files and kinds.
    """
    kinds = [MEMORY_KIND if isinstance(one, HashedMemory) else "concept-table" for one in adapters]
    if MEMORY_KIND not in kinds:
        return
    first = 0 if kinds[0] == MEMORY_KIND else kinds.index(MEMORY_KIND) - 1
    labels = [one.label for one in adapters[first : first + 2]]
    if len(set(kinds[first : first + 2])) == 2:
        raise IncompatibleAdaptersError(
            f"{labels[0]} and {labels[1]} do not merge: "
            f"kind is {kinds[first]!r} in the first and {kinds[first + 1]!r} in the second"
        )
    both = len(labels) == 2
    raise IncompatibleAdaptersError(
        f"{' and '.join(labels)} {'do' if both else 'does'} not merge: kind is {MEMORY_KIND!r}"
        f"{' in both' if both else ''}; hashed memories act side by side: name {'both' if both else 'it'}, "
        f"e.g. engram generate {' '.join(f'-a {label}' for label in labels)}"
    )
