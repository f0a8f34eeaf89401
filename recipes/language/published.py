"""What the published runs share: samples a step, the seed of their splits, and how steps follow from rows."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset  # type: ignore[import-untyped]

__all__ = ["SAMPLES_A_STEP", "count_steps", "load_rows", "sample_rows", "split_rows", "write_texts"]

SAMPLES_A_STEP = 24 * 2 * 4
"""24 on each of four GPUs, gradients of two batches added up (AutoArk/TinyEngram, train/*.sh)."""

_SEED = 42
_EVALUATED = 200


def load_rows(files: list[Path]) -> Dataset:
    """Return the rows of Parquet, JSON or JSONL files of one kind."""
    kind = "parquet" if files[0].suffix == ".parquet" else "json"
    return load_dataset(kind, data_files=[str(file) for file in files], split="train")


def sample_rows(rows: Dataset) -> Dataset:
    """Return at most 200 rows, the same that the published scripts take."""
    return rows.shuffle(seed=_SEED).select(range(_EVALUATED)) if len(rows) > _EVALUATED else rows


def split_rows(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Return rows to train on and at most 200 of one percent to evaluate on, as the published scripts divide them."""
    parts = rows.shuffle(seed=_SEED).train_test_split(test_size=0.01, seed=_SEED)
    held_out = parts["test"]
    return parts["train"], held_out.select(range(min(_EVALUATED, len(held_out))))


def write_texts(file: Path, texts: Iterable[str]) -> int:
    """Write texts as JSONL and return how many there are."""
    n_texts = 0
    with file.open("w", encoding="utf-8") as stream:
        for text in texts:
            stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            n_texts += 1
    return n_texts


def count_steps(n_texts: int, epochs: int, warm_up: float) -> dict[str, Any]:
    """Return steps in all and steps of warm-up.

    Args:
        n_texts: to train on.
        epochs: over all of them.
        warm_up: share of the steps.
    """
    steps = epochs * math.ceil(n_texts / SAMPLES_A_STEP)
    return {"steps": steps, "warm_up": math.ceil(warm_up * steps)}
