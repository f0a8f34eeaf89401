"""First values of a concept's vectors: random, or such that the trigger begins as the words of a description.

Shapes: T tokens of the trigger, P vectors, d width.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engram_core import InputError, Overlap, Registry, Rule
from engram_core.registry import Ngram, ngram_spans
from engram_vision.training.frozen import TextReader

__all__ = ["describe_vectors", "random_vectors"]

_CONTEXTS = ("{}", "a photo of {}", "a picture of {}")


def random_vectors(registry: Registry, width: int, *, std: float, seed: int) -> Tensor:
    """Return vectors drawn from N(0, std), float32 [P, d] (report, section 2.6)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(registry.n_slots, width, generator=generator) * std


def describe_vectors(
    reader: TextReader,
    registry: Registry,
    words: str,
    *,
    rule: Rule,
    overlap: Overlap,
    scale: float,
) -> Tensor:
    """Return vectors whose residual moves the trigger's states to those of some words, float32 [P, d].

    The words' states are stretched over the trigger's T tokens and compared with the trigger's own, in a few
    contexts. Entries overlap, so the vectors are the smallest ones (least squares) whose sums, or means, give the
    difference. Under the relative rule only their directions count: the states move towards the words', and how far is
    up to the scale.

    Args:
        reader: of the stream.
        registry: of the trigger.
        words: the description.
        rule: how vectors become residuals.
        overlap: how entries that cover one token combine.
        scale: first value of every scale.

    Raises:
        InputError: the description has no token or too many, or the scale is 0, so that no vector has an effect.
    """
    if scale == 0:
        raise InputError("init_scale is 0, so no vector has an effect; init needs another value")
    factor = scale if rule == "absolute" else float(np.tanh(scale))
    differences = _differences(reader, registry, words) / factor
    vectors: dict[int, Tensor] = {}
    slot_of = dict(zip(registry.entries, registry.slots, strict=True))
    for variant in registry.variants:
        target = differences[_stretch(len(differences), len(variant.ids))]
        spans, covers = _cover(variant.ids, registry.max_ngram)
        weights = covers / covers.sum(dim=1, keepdim=True) if overlap == "mean" else covers
        solution = torch.linalg.pinv(weights) @ target
        for span, vector in zip(spans, solution, strict=True):
            vectors.setdefault(slot_of[span], vector)
    return torch.stack([vectors[slot] for slot in range(registry.n_slots)])


def _cover(ids: Ngram, max_ngram: int) -> tuple[list[Ngram], Tensor]:
    """Return a variant's distinct spans, and how often each covers each token, float32 [T, spans]."""
    occurrences = ngram_spans(ids, max_ngram)
    column_of = {span: column for column, span in enumerate(dict.fromkeys(occurrences))}
    covers = torch.zeros(len(ids), len(column_of))
    start, length = 0, 0
    for span in occurrences:  # by length, then from left to right
        start = start + 1 if len(span) == length else 0
        length = len(span)
        covers[start : start + length, column_of[span]] += 1
    return list(column_of), covers


def _differences(reader: TextReader, registry: Registry, words: str) -> Tensor:
    """Return the words' states less the trigger's at the trigger's T tokens, a mean over contexts, float32 [T, d]."""
    tokenizer = reader.tokenizer
    n_words, n_read = len(tokenizer.encode(words)), tokenizer.max_tokens
    if n_words < 1:
        raise InputError(f"init {words!r} gives no token; describe the subject in words the tokenizer knows")
    if n_read is not None and n_words > n_read:
        raise InputError(f"init {words[:80]!r} has {n_words} tokens, the encoder reads {n_read}; use fewer words")
    found = []
    for context in _CONTEXTS:
        texts = [context.format(text) for text in (registry.trigger, words)]
        before = len(tokenizer.encode(context.partition("{}")[0].strip()))
        own, theirs = (len(tokenizer.encode(text)) - before for text in texts)
        if n_read is not None and before + max(own, theirs) > n_read:
            continue  # cut off; the first context has no words of its own, so there is room
        states = reader.read(texts).states.float()
        first = reader.n_opening + before
        stretched = states[1, first : first + theirs][_stretch(theirs, own)]
        found.append(stretched - states[0, first : first + own])
    return torch.stack(found).mean(dim=0)


def _stretch(count: int, length: int) -> list[int]:
    """Return which of `count` items stands at each of `length` places."""
    return [round(float(place)) for place in np.linspace(0, count - 1, length)]
