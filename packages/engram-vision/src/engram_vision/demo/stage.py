"""What the demos' galleries share: an adapter around a drawing, prompts for two characters, and rows of the page."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from engram_core import Adapter, PromptAudit
from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.page import Picture, Row
from engram_vision.demo.tokens import read_tokens
from engram_vision.drawing import Drawing
from engram_vision.loading import load_engram, unload_engrams

__all__ = ["SIDES", "Pair", "ask_for_pairs", "compare_states", "is_same", "loaded", "make_row"]

SIDES = ("left", "right")
"""Where the judge looks for the first and for the second of two."""

_LOADED = "demo"


class _Bytes(Protocol):
    def tobytes(self) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two characters in one prompt.

    Attributes:
        order: from left to right.
        drawing: by their names.
        described: the same with their looks in words.
    """

    order: Sequence[DemoCharacter]
    drawing: Drawing
    described: Drawing


@contextmanager
def loaded(pipeline: Any, adapter: Adapter | None) -> Iterator[None]:
    """Keep an adapter in a pipeline for a while; None is the base model."""
    if adapter is None:
        yield
        return
    load_engram(pipeline, adapter, name=_LOADED)
    try:
        yield
    finally:
        unload_engrams(pipeline, _LOADED)


def ask_for_pairs(characters: Sequence[DemoCharacter], phrases: Sequence[str], seed: int) -> list[Pair]:
    """Return prompts for both characters in each place, in either order.

    Args:
        characters: two.
        phrases: the places, in words.
        seed: of the first place; the others follow.
    """

    def draw(one: str, other: str, number: int) -> Drawing:
        return Drawing(prompt=f"{one} and {other} {phrases[number]}", seed=seed + number)

    return [
        Pair(
            order=(one, other),
            drawing=draw(one.name, other.name, number),
            described=draw(one.description, other.description, number),
        )
        for number in range(len(phrases))
        for one, other in (characters, characters[::-1])
    ]


@torch.no_grad()
def compare_states(pipeline: Any, adapter: Adapter, encode: Callable[[], Sequence[torch.Tensor]]) -> list[bool]:
    """Return for each prompt whether its text states are those of the base model, byte for byte.

    Pictures of 8 bits could hide a difference.

    Args:
        pipeline: which draws.
        adapter: to load for the comparison.
        encode: returns what the denoiser would read of the prompts, tensors with a row for each.
    """
    base = encode()
    with loaded(pipeline, adapter):
        edited = encode()
    return [
        all(one[row].numpy().tobytes() == other[row].numpy().tobytes() for one, other in zip(base, edited, strict=True))
        for row in range(len(base[0]))
    ]


def is_same(one: _Bytes, other: _Bytes) -> bool:
    """Return whether two pictures or clips of one size are the same byte for byte."""
    return one.tobytes() == other.tobytes()


def make_row(audit: PromptAudit, drawing: Drawing, pictures: Sequence[Picture], note: str | None = None) -> Row:
    """Return a row of the page.

    Args:
        audit: tells what fires in the prompt.
        drawing: what was asked for.
        pictures: what was drawn, by column.
        note: what the reader has to know.
    """
    tokens = read_tokens(audit, drawing.prompt)
    prompt = drawing.prompt or "(no words)"
    return Row(prompt=prompt, tokens=tokens, seed=drawing.seed, pictures=tuple(pictures), note=note)
