"""Texts of the biomedical adaptation from Biomed-Enriched: `python -m recipes.language.biomedical FILE...`.

The published experiment reads one file of it, commercial-00000-of-00026.parquet, and divides it by score: what is
English, biomedical and scores above 4 is learned; 200 texts that score below 4 are predicted.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets import Dataset  # type: ignore[import-untyped]

from recipes.language.published import count_steps, load_rows, sample_rows, write_texts

SCORE = 4.0
EPOCHS, WARM_UP = 1, 0.005


def divide(rows: Dataset) -> tuple[Dataset, Dataset]:
    """Return the rows to learn and those to evaluate on.

    Args:
        rows: with `text`, `language`, `domain` and `educational_score`.
    """
    chosen = rows.filter(
        lambda language, domain: language == "en" and domain == "biomedical", input_columns=["language", "domain"]
    )
    learned = chosen.filter(lambda score: score is not None and score > SCORE, input_columns="educational_score")
    others = chosen.filter(lambda score: score is not None and score < SCORE, input_columns="educational_score")
    return learned, sample_rows(others)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write train.jsonl and eval.jsonl, and say how to go on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="Parquet files of Biomed-Enriched")
    parser.add_argument("--out", type=Path, default=Path("biomedical"), help="folder to write to")
    options = parser.parse_args(arguments)
    learned, others = divide(load_rows(options.files))
    options.out.mkdir(parents=True, exist_ok=True)
    n_texts = write_texts(options.out / "train.jsonl", learned["text"])
    n_others = write_texts(options.out / "eval.jsonl", others["text"])
    steps = count_steps(n_texts, EPOCHS, WARM_UP)
    print(f"wrote {options.out}: {n_texts} texts to learn, {n_others} to evaluate on; go on with")  # noqa: T201
    print(  # noqa: T201
        f"engram train --config recipes/language/biomedical.toml --steps {steps['steps']} --warm-up {steps['warm_up']}"
    )


if __name__ == "__main__":
    main()
