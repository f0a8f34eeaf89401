"""The tiny language model: a Qwen3 of 5.8 million parameters, and its training.

Shapes: B rows, L length of a row, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from recipes.glosses.lessons import Lessons
from recipes.glosses.packing import IGNORED, separate
from recipes.glosses.texts import END
from recipes.glosses.tokenizer import MAX_LENGTH
from recipes.training import Report, fit

ROWS, LENGTH = 8, 256
"""Of a batch: rows, and tokens of a row."""

PEAK_RATE = 2e-3
WEIGHT_DECAY = 0.1  # against learning glosses by heart: every one is seen several times


def build_base(tokenizer: Any) -> Qwen3ForCausalLM:
    """Return the model, untrained."""
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=MAX_LENGTH,
            rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # As Qwen3 does it: both the end of a text and the end of a turn stop the writing.
    stops = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(END)]
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id)
    return model


def train_base(
    lessons: Lessons,
    tokenizer: Any,
    folder: Path,
    *,
    steps: int,
    seed: int,
    report: Report,
    preview: Callable[[Qwen3ForCausalLM, int], None] | None = None,
    preview_every: int = 1_000,
    compiled: bool = True,
) -> Qwen3ForCausalLM:
    """Train the model and return it with averaged weights; goes on where an earlier call stopped.

    Args:
        lessons: what it learns from.
        tokenizer: of the lessons.
        folder: for the state.
        steps: in all.
        seed: of the first weights.
        report: called with a line now and then.
        preview: called with the model as it would be returned, and the number of the step, now and then.
        preview_every: steps between previews.
        compiled: whether PyTorch compiles the step, which needs a C++ compiler and halves the time.
    """
    torch.manual_seed(seed)
    model = build_base(tokenizer)
    score: Callable[..., Tensor] = torch.compile(_score, dynamic=False) if compiled else _score

    def loss_of(step: int) -> Tensor:
        batch = separate(lessons.batch(step), lessons.stop)
        with torch.autocast("cpu", torch.bfloat16):
            return score(model, batch.ids, batch.positions, batch.mask, batch.labels)

    def show(weights: Any, step: int) -> None:
        if preview is not None:
            preview(_load(tokenizer, weights["model"]), step)

    weights = fit(
        "base",
        {"model": model},
        loss_of,
        folder=folder,
        steps=steps,
        peak_rate=PEAK_RATE,
        weight_decay=WEIGHT_DECAY,
        report=report,
        preview=show,
        preview_every=preview_every,
    )
    return _load(tokenizer, weights["model"])


def _score(model: Qwen3ForCausalLM, ids: Tensor, positions: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Return the mean loss a token, in nats."""
    output = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    logits: Tensor = output.logits  # [B, L, V]
    return cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


def _load(tokenizer: Any, weights: Any) -> Qwen3ForCausalLM:
    model = build_base(tokenizer)
    model.load_state_dict(weights)
    return model.eval()
