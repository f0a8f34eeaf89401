"""How well a model predicts texts, in nats a token and a byte.

Documents are kept apart: nothing of one is context of another. A document that is longer than the window is read in
windows that overlap; each token is scored once, in the first window that holds it, where it has the most context but
at its beginning. What a tokenizer puts in front of a text counts as context; without that the first token is not
scored, because nothing predicts it.
Shapes: B windows, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from engram_core import InputError

__all__ = ["Document", "Window", "encode_document", "measure_nats", "plan_windows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A tokenised text.

    Attributes:
        ids: token ids.
        n_bytes: bytes of UTF-8 of the text that is scored: all but the first token's.
    """

    ids: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Part of a document that the model reads at once.

    Attributes:
        ids: its tokens.
        scored: how many of the last of them are scored.
    """

    ids: tuple[int, ...]
    scored: int


def encode_document(text: str, tokenizer: Any) -> Document:
    """Tokenise a text, with what the tokenizer puts around it."""
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
        offsets = encoded["offset_mapping"]
        start = offsets[0][1] if offsets else 0
    else:
        encoded = tokenizer(text, verbose=False)
        start = len(tokenizer.decode(encoded["input_ids"][:1], skip_special_tokens=True))
    return Document(ids=tuple(encoded["input_ids"]), n_bytes=len(text[start:].encode("utf-8", "replace")))


def plan_windows(ids: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Yield the windows of a document.

    Args:
        ids: its tokens.
        length: tokens of a window at most.
        stride: tokens by which windows advance, less than `length`.
    """
    done = 1  # nothing predicts the first token
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        if end > done:
            yield Window(ids=tuple(ids[begin:end]), scored=end - done)
            done = end


def measure_nats(
    model: Any, windows: Sequence[Window], batch_size: int, advance: Callable[[int], None] | None = None
) -> float:
    """Return minus the log-likelihood of all scored tokens.

    Args:
        model: a decoder language model.
        windows: of any documents.
        batch_size: windows at once; it changes nothing but rounding.
        advance: called with the number of windows done.

    Raises:
        InputError: the model gives no number.
    """
    nats = [0.0] * len(windows)
    order = sorted(range(len(windows)), key=lambda number: -len(windows[number].ids))  # alike in length: less padding
    for first in range(0, len(order), batch_size):
        chosen = order[first : first + batch_size]
        for number, value in zip(chosen, _score([windows[number] for number in chosen], model), strict=True):
            nats[number] = value
        if advance is not None:
            advance(first + len(chosen))
    total = math.fsum(nats)
    if not math.isfinite(total):
        raise InputError(f"the model's log-likelihood is {total}; try precision fp32")
    return total


def _score(windows: Sequence[Window], model: Any) -> list[float]:
    length = max(len(window.ids) for window in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, window in enumerate(windows):  # padded on the right, where nothing before can see it
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        mask[row, : len(window.ids)] = 1
    with torch.inference_mode():
        logits = model(ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
        found = []
        for row, window in enumerate(windows):  # one row at a time: a batch's logits in float32 may not fit
            stop = len(window.ids)
            part = logits[row, stop - 1 - window.scored : stop - 1].float()
            targets = ids[row, stop - window.scored : stop].to(part.device)
            found.append(float(F.cross_entropy(part, targets, reduction="sum").double()))
    return found
