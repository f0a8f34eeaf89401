"""The semantics of a concept table once more, in the plainest possible code: no NumPy tricks, float64."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import Adapter, Concept

Ngram = tuple[int, ...]
Fired = tuple[int, str, Ngram, int]  # row, concept, entry, start


def naive_matches(adapter: Adapter, stream: str, rows: Sequence[Sequence[int]]) -> list[Fired]:
    """What must fire: sorted (row, concept, entry, start)."""
    memories = [concept for concept in adapter.concepts() if stream in concept.streams]
    fired: list[Fired] = []
    for number, row in enumerate(rows):
        for concept in memories:
            if concept.record.activation == "spans":
                fired += [
                    (number, concept.name, entry, start)
                    for entry in concept.streams[stream].entries
                    for start in _occurrences(entry, row)
                ]
        for name, start, stop in naive_occurrences(memories, stream, row):
            inside = row[start:stop]
            concept = next(c for c in memories if c.name == name)
            fired += [
                (number, name, entry, start + at)
                for entry in concept.streams[stream].entries
                for at in _occurrences(entry, inside)
            ]
    return sorted(fired)


def naive_occurrences(memories: Sequence[Concept], stream: str, row: Sequence[int]) -> list[tuple[str, int, int]]:
    """Full triggers of anchored concepts, read from left to right, always taking the longest that begins here."""
    anchored = [concept for concept in memories if concept.record.activation == "anchored"]
    found: list[tuple[str, int, int]] = []
    position = 0
    while position < len(row):
        here = [
            (len(trigger), concept.name)
            for concept in anchored
            for trigger in concept.streams[stream].triggers
            if tuple(row[position : position + len(trigger)]) == trigger
        ]
        longest = max((length for length, _ in here), default=0)
        found += [(name, position, position + longest) for length, name in here if length == longest]
        position += max(longest, 1)
    return found


def naive_states(
    adapter: Adapter,
    stream: str,
    rows: Sequence[Sequence[int]],
    hidden: npt.NDArray[Any],
    strength: float | Mapping[str, float] = 1.0,
    lengths: Sequence[int] | None = None,
) -> npt.NDArray[np.float64]:
    """The edited states, in float64."""
    edited = hidden.astype(np.float64)
    by_name = {concept.name: concept for concept in adapter.concepts()}
    covering: dict[tuple[int, int, str], list[npt.NDArray[np.float64]]] = {}
    for row, name, entry, start in naive_matches(adapter, stream, rows):
        concept = by_name[name]
        memory = concept.streams[stream]
        vector = memory.vectors[memory.entries.index(entry)].astype(np.float64)
        scale = memory.scales.astype(np.float64)
        rule = concept.record.rule
        if rule == "absolute":
            term = vector * scale
        elif rule == "absolute-tanh":
            term = vector * np.tanh(scale)
        else:
            count = hidden.shape[1] if lengths is None else lengths[row]
            rho = np.mean([np.linalg.norm(state.astype(np.float64)) for state in hidden[row, :count]])
            norm = np.linalg.norm(vector)
            term = (vector / norm if norm else vector) * np.tanh(scale) * rho
        for position in range(start, start + len(entry)):
            covering.setdefault((row, position, name), []).append(term)
    for (row, position, name), terms in covering.items():
        total = sum(terms)
        if by_name[name].record.overlap == "mean":
            total = total / len(terms)
        factor = strength if isinstance(strength, (int, float)) else strength.get(name, 1.0)
        edited[row, position] += factor * total
    return edited


def _occurrences(entry: Ngram, row: Sequence[int]) -> list[int]:
    return [start for start in range(len(row) - len(entry) + 1) if tuple(row[start : start + len(entry)]) == entry]
