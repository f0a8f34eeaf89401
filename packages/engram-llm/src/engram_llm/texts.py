"""Plain texts to measure on, from the kinds of files that training reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from engram_core import InputError
from engram_core.errors import quote
from engram_llm.data.rows import read_rows

__all__ = ["read_texts"]


def read_texts(place: Path, column: str, limit: int | None = None) -> list[str]:
    """Return the texts of a file, or of all files of a folder in the order of their names.

    Args:
        place: see `engram_llm.data.read_rows`; a .txt file is one text.
        column: field or column that holds the text.
        limit: texts at most.

    Raises:
        InputError: a file cannot be read, a row is damaged or lacks the column, or there is no text.
    """
    texts = list(islice(_read(place, column), limit))
    if not texts:
        raise InputError(f"{place}: holds no text")
    return texts


def _read(place: Path, column: str) -> Iterator[str]:
    for row in read_rows(place, text_column=column):
        if row.fault is not None:
            raise InputError(f"{row.place}: {row.fault}")
        if column not in row.values:
            raise InputError(
                f"{row.place}: lacks the column {column!r}; it has {', '.join(map(quote, row.values)) or 'none'}; "
                "say which holds the text with --set text_column=NAME"
            )
        text = row.values[column]
        if not isinstance(text, str):
            raise InputError(f"{row.place}: {column} is {quote(text)}, expected a text")
        yield text
