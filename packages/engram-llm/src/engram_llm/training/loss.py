"""The mean loss over the tokens that are learned, in training and on texts that are only measured.

Shapes: B rows, L positions, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from engram_core import InputError, Watcher
from engram_llm.data import Collator, Samples, pack_documents, read_documents, tokenize_rows, truncate_documents
from engram_llm.data.samples import IGNORED

__all__ = ["evaluate_loss", "make_batches", "padding_token", "sum_losses", "token_loss"]


def token_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Return the loss of a batch, as transformers' Trainer asks for it.

    Only the logits that foretell a learned token become float32, which saves most of the memory where prompts are
    long.

    Args:
        outputs: of the model, with `logits` [B, L, V].
        labels: [B, L].
        num_items_in_batch: learned tokens of the whole step, by which the sum is divided; None: those of this batch.
    """
    total, count = _sum_batch(outputs.logits, labels)
    return total / (count if num_items_in_batch is None else num_items_in_batch)


def sum_losses(
    model: Any, batches: Iterable[Mapping[str, Tensor]], watcher: Watcher | None = None
) -> tuple[float, int]:
    """Return the sum of the losses over all learned tokens of some batches, and how many these are.

    Args:
        model: in the state in which it is to be measured.
        batches: as `Collator` makes them.
        watcher: hears how many batches are done.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with torch.no_grad():
        for done, batch in enumerate(batches, start=1):
            inputs = {name: values.to(device) for name, values in batch.items() if name != "labels"}
            summed, n_tokens = _sum_batch(model(**inputs, use_cache=False).logits, batch["labels"].to(device))
            total += float(summed)
            count += n_tokens
            if watcher is not None:
                watcher.advance(done)
    return total, count


def make_batches(
    samples: Samples, collator: Collator, size: int, *, process: int = 0, processes: int = 1
) -> Iterable[Mapping[str, Tensor]]:
    """Yield the batches of all samples in order; of several processes each takes every so many."""
    for first in range(process * size, len(samples), processes * size):
        yield collator([samples[index] for index in range(first, min(first + size, len(samples)))])


def evaluate_loss(
    model: Any,
    tokenizer: Any,
    data: Path | Iterable[Mapping[str, Any]],
    *,
    max_length: int = 1024,
    batch_size: int = 8,
    packing: bool = False,
    text_column: str = "text",
    watcher: Watcher | None = None,
) -> tuple[float, int]:
    """Measure a model on texts or conversations.

    Args:
        model: a decoder of transformers, with whatever is loaded into it; it is put into evaluation mode meanwhile.
        tokenizer: its tokenizer.
        data: a file, a folder, or rows with the columns that training takes.
        max_length: tokens of a sample. Longer documents are cut: what is beyond is left out, or, with packing,
            becomes samples of its own.
        batch_size: samples at once.
        packing: put several documents into a sample: faster, with the same result for models that read positions.
        text_column: column of plain texts.
        watcher: hears how far it is.

    Returns:
        The mean loss over the tokens that training would learn, in nats a token, and how many these are.

    Raises:
        InputError: the data cannot be used.
    """
    watcher = watcher or Watcher()
    if isinstance(data, Path):
        documents = read_documents(data, tokenizer, text_column=text_column, watcher=watcher)
    else:
        documents = tokenize_rows(data, tokenizer, text_column=text_column, watcher=watcher)
    samples = (pack_documents if packing else truncate_documents)(documents, max_length)
    if not len(samples):
        raise InputError(f"no token is left to measure; max_length is {max_length}, give longer texts or a larger one")
    batches = make_batches(samples, Collator(padding_token(tokenizer), packed=packing), batch_size)
    watcher.begin("measuring the loss", -(-len(samples) // batch_size))
    was_training = model.training
    model.eval()
    try:
        total, count = sum_losses(model, batches, watcher)
    finally:
        model.train(was_training)
    watcher.end()
    return total / count, count


def padding_token(tokenizer: Any) -> int:
    """Return the token that fills up rows: the tokenizer's own, else its end of text, else the first."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _sum_batch(logits: Tensor, labels: Tensor) -> tuple[Tensor, int]:
    targets = labels[:, 1:]
    learned = targets != IGNORED
    chosen = logits[:, :-1][learned].float()
    return F.cross_entropy(chosen, targets[learned], reduction="sum"), len(chosen)
