"""First values of a concept's vectors: random, or such that the trigger begins as the words of a description.

Shapes: T tokens of the trigger, P vectors, d width.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_core import InputError, Registry, Rule, StreamTokenizer
from engram_core.registry import ngram_spans
from engram_vision.training.frozen import encode_texts

__all__ = ["describe_vectors", "random_vectors"]

_CONTEXTS = ("{}", "a photo of {}", "a picture of {}")


def random_vectors(registry: Registry, width: int, *, std: float, seed: int) -> Tensor:
    """Return vectors drawn from N(0, std), float32 [P, d] (report, section 2.6)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(registry.n_slots, width, generator=generator) * std


def describe_vectors(
    pipeline: Any, registry: Registry, tokenizer: StreamTokenizer, words: str, *, rule: Rule, scale: float
) -> Tensor:
    """Return vectors whose residual turns the trigger's states into those of some words, float32 [P, d].

    The words' states are stretched over the trigger's T tokens and compared with the trigger's own, in a few
    contexts. Entries overlap, so the vectors are the smallest ones (least squares) whose sums give the
    difference. Under the relative rule only their directions count.

    Args:
        pipeline: with its text encoder.
        registry: of the trigger.
        tokenizer: of the stream.
        words: the description.
        rule: how vectors become residuals.
        scale: first value of every scale.

    Raises:
        InputError: the description has no token, or the scale is 0, so that no vector has an effect.
    """
    if scale == 0:
        raise InputError("init_scale is 0, so no vector has an effect; init needs another value")
    factor = scale if rule == "absolute" else float(np.tanh(scale))
    differences = torch.stack([_difference(pipeline, registry, tokenizer, words, text) for text in _CONTEXTS]).mean(0)
    vectors: dict[int, Tensor] = {}
    slot_of = dict(zip(registry.entries, registry.slots, strict=True))
    for variant in registry.variants:
        length = len(variant.ids)
        target = differences[np.linspace(0, len(differences) - 1, length).round().astype(int)]
        spans = ngram_spans(variant.ids, registry.max_ngram)
        covers = torch.zeros(length, len(spans))
        place = 0
        for column, span in enumerate(spans):
            start = place if column and len(spans[column - 1]) == len(span) else 0
            covers[start : start + len(span), column] = 1
            place = start + 1
        solution = torch.linalg.pinv(covers) @ (target / factor)
        for span, vector in zip(spans, solution, strict=True):
            vectors.setdefault(slot_of[span], vector)
    return torch.stack([vectors[slot] for slot in range(registry.n_slots)])


def _difference(pipeline: Any, registry: Registry, tokenizer: StreamTokenizer, words: str, context: str) -> Tensor:
    """Return the words' states less the trigger's at the trigger's T tokens, float32 [T, d]."""
    before = len(tokenizer.encode(context.partition("{}")[0].strip()))
    lengths = [len(tokenizer.encode(context.format(text))) - before for text in (registry.trigger, words)]
    if lengths[1] < 1:
        raise InputError(f"init {words!r} gives no token; describe the subject in words the tokenizer knows")
    states = encode_texts(pipeline, [context.format(registry.trigger), context.format(words)]).states.float()
    first = 1 + before  # after the token that begins the text
    own, theirs = (states[row, first : first + length] for row, length in enumerate(lengths))
    if not len(theirs):
        raise InputError(f"init {words!r} is cut off by the encoder's limit; use fewer words")
    stretched = theirs[np.linspace(0, len(theirs) - 1, len(own)).round().astype(int)]
    return stretched - own
