"""All documents of a data set as tokens, and which of them validate.

Shapes: D documents, T tokens of all of them together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import InputError, Watcher
from engram_llm.data.forms import Content, Form, content_key, find_form, known_forms
from engram_llm.data.rows import Row, read_rows
from engram_llm.data.tokens import Encoder, Tokens

__all__ = ["Documents", "read_documents", "split_documents", "tokenize_rows"]

_BATCH = 512  # rows that are tokenised at once
_NAMED = 3  # faulty rows that a message names


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Documents:
    """Tokens of documents, end to end: five bytes a token, whatever the rows were.

    Attributes:
        ids: token ids, int32 [T].
        learns: whether a token is learned, bool [T].
        offsets: where each document begins and the last one ends, int64 [D+1].
        keys: digest of the row that each came from, uint64 [D].
    """

    ids: npt.NDArray[np.int32]
    learns: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    keys: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        """Return D."""
        return len(self.keys)

    def select(self, which: npt.NDArray[np.bool_]) -> Documents:
        """Return those documents for which `which`, bool [D], is true."""
        lengths = np.diff(self.offsets)
        tokens = np.repeat(which, lengths)
        offsets = np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths[which])))
        return Documents(ids=self.ids[tokens], learns=self.learns[tokens], offsets=offsets, keys=self.keys[which])

    def lowest(self, most: int) -> Documents:
        """Return the documents of the `most` rows with the lowest digests: a choice that does not depend on order."""
        return self.select(np.isin(self.keys, np.unique(self.keys)[:most]))

    def count_shared(self, others: Documents) -> int:
        """Return how many documents come from rows that are among those of others too."""
        return int(np.isin(self.keys, others.keys).sum())

    def digest(self) -> str:
        """Return a digest of everything that is learned, and of the order."""
        digest = hashlib.sha256()
        for values in (self.ids, self.learns, self.offsets):
            digest.update(np.ascontiguousarray(values).data)
        return digest.hexdigest()[:16]


def read_documents(
    path: Path, tokenizer: Any, *, text_column: str = "text", watcher: Watcher | None = None
) -> Documents:
    """Read and tokenise a data set.

    Args:
        path: file or folder, see `read_rows`.
        tokenizer: of the model, in transformers' class.
        text_column: column of plain texts.
        watcher: hears how far it is, and what the user should know.

    Raises:
        InputError: it cannot be read, or some of its rows cannot be used: all are counted, the first ones named.
    """
    watcher = watcher or Watcher()
    rows = read_rows(path, text_column=text_column, note=watcher.note)
    return tokenize_rows(rows, tokenizer, label=str(path), text_column=text_column, watcher=watcher)


def tokenize_rows(
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: Any,
    *,
    label: str = "the data",
    text_column: str = "text",
    watcher: Watcher | None = None,
) -> Documents:
    """Tokenise rows.

    Args:
        rows: of a file, or plain objects.
        tokenizer: of the model, in transformers' class.
        label: what to call the data set in messages.
        text_column: column of plain texts.
        watcher: hears how far it is, and what the user should know.

    Raises:
        InputError: as `read_documents` says.
    """
    watcher = watcher or Watcher()
    encoder, reader = Encoder(tokenizer), _Reader(label, text_column)
    watcher.begin("reading texts")
    tokens: list[Tokens] = []
    keys: list[bytes] = []
    placed = iter(
        row if isinstance(row, Row) else Row(place=f"row {number}", values=row)
        for number, row in enumerate(rows, start=1)
    )
    while batch := list(islice(placed, _BATCH)):
        contents = [(row.place, content) for row in batch if (content := reader.read(row)) is not None]
        for (place, content), found in zip(contents, encoder.encode([part for _, part in contents]), strict=True):
            if isinstance(found, str):
                reader.refuse(place, found)
            else:
                tokens += found
                keys += [content_key(content)] * len(found)
        watcher.advance(reader.n_rows)
    watcher.end()
    reader.finish()
    if not encoder.has_end:
        watcher.note("the tokenizer has no token that ends a text, so where texts end is not learned")
    if encoder.has_split:
        watcher.note(
            "the chat template shows earlier answers otherwise than the newest one, so conversations with several "
            "answers become several samples, one for each answer"
        )
    return Documents(
        ids=np.concatenate([ids for ids, _ in tokens]),
        learns=np.concatenate([learns for _, learns in tokens]),
        offsets=np.cumsum([0, *(len(ids) for ids, _ in tokens)], dtype=np.int64),
        keys=np.frombuffer(b"".join(keys), ">u8").astype(np.uint64),
    )


def split_documents(documents: Documents, fraction: float, most: int) -> tuple[Documents, Documents]:
    """Return the documents to train on and those to validate on.

    Which validate depends on what they say alone: not on their order, nor, but for the limit, on the others. Equal
    ones go together, so that nothing validates that is trained on.

    Args:
        documents: all.
        fraction: part that validates, at least one document where there are two that differ; 0 takes none.
        most: that validate; those with the lowest digests do.
    """
    distinct = np.unique(documents.keys)
    n_chosen = 0
    if fraction and len(distinct) > 1:
        n_below = int(np.searchsorted(distinct, np.uint64(min(int(fraction * 2.0**64), 2**64 - 1))))
        n_chosen = min(max(1, n_below), most, len(distinct) - 1)
    validates = np.isin(documents.keys, distinct[:n_chosen])
    return documents.select(~validates), documents.select(validates)


class _Reader:
    """Reads the rows of one data set in the form that its columns have, and collects what is wrong with them."""

    def __init__(self, label: str, text_column: str) -> None:
        self._label, self._text_column = label, text_column
        self._form: Form | None = None
        self._columns: list[str] = []  # of the rows before the form was known
        self._named: list[str] = []
        self.n_rows = self._n_faults = 0

    def read(self, row: Row) -> Content | None:
        """Return what a row says; None where it cannot be used."""
        self.n_rows += 1
        fault = self._find_fault(row)
        if fault is None and self._form is not None:
            try:
                return self._form.read(row.values)
            except ValueError as error:
                fault = str(error)
        self.refuse(row.place, str(fault))
        return None

    def _find_fault(self, row: Row) -> str | None:
        if row.fault is not None:
            return row.fault
        if self._form is None:
            self._form = find_form(row.values, self._text_column)
        if self._form is None:
            self._columns += [name for name in row.values if name not in self._columns]
            return f"has the columns {_list(row.values)}"
        missing = [name for name in self._form.needs if name not in row.values]
        return f"lacks {_list(missing)}; it has {_list(row.values)}" if missing else None

    def refuse(self, place: str, fault: str) -> None:
        """Keep what is wrong with a row."""
        self._n_faults += 1
        if len(self._named) < _NAMED:
            self._named.append(f"{place} {fault}")

    def finish(self) -> None:
        """Raise InputError if no row was read, or some cannot be used."""
        if not self.n_rows:
            raise InputError(f"{self._label}: holds no rows")
        if self._form is None and self._columns:
            forms = "; or ".join(" and ".join(form.needs) for form in known_forms(self._text_column))
            raise InputError(
                f"{self._label}: the rows have the columns {_list(self._columns)}; expected {forms}; "
                "--text-column names another column of plain texts"
            )
        if self._n_faults:
            more = self._n_faults - len(self._named)
            faults = "; ".join(self._named) + (f"; and {more} more" if more else "")
            count = f"{self._n_faults} of {self.n_rows} rows cannot be used"
            raise InputError(f"{self._label}: {count}: {faults}; correct or remove them")


def _list(names: Iterable[str]) -> str:
    return ", ".join(str(name) for name in names) or "nothing"
