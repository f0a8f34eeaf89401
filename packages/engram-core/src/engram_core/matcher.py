"""Which entries fire where: exact matching of token ids against the concepts of one stream.

Shapes: B rows (prompts), L positions, M matches, O occurrences of full triggers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.adapter import Adapter
from engram_core.checks import check_ids, check_ngram_order, check_offsets, check_owners
from engram_core.errors import InputError
from engram_core.trie import Trie

Ints = npt.NDArray[np.int64]

TokenIds = Sequence[int] | Sequence[Sequence[int]] | npt.NDArray[np.integer[Any]]
"""One prompt or several (ragged lists are fine), as token ids."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matches:
    """What fires in a batch, in canonical order: by row, entry, start.

    Attributes:
        row, start, length, entry, concept: int64 [M]; entry `entry` of the stream covers positions
            start..start+length-1 of prompt `row`.
        trigger_row, trigger_start, trigger_length, trigger_concept: int64 [O], occurrences of full
            triggers of anchored concepts.
    """

    row: Ints
    start: Ints
    length: Ints
    entry: Ints
    concept: Ints
    trigger_row: Ints
    trigger_start: Ints
    trigger_length: Ints
    trigger_concept: Ints

    def __len__(self) -> int:
        """Return M."""
        return len(self.row)

    def concepts(self) -> list[int]:
        """Return the numbers of the concepts that fire, ascending."""
        concepts: list[int] = np.unique(self.concept).tolist()
        return concepts

    def of_row(self, row: int) -> Matches:
        """Return what fires in one prompt, as a batch of its own."""
        here, shown = self.row == row, self.trigger_row == row
        return Matches(
            row=np.zeros(int(here.sum()), np.int64),
            start=self.start[here],
            length=self.length[here],
            entry=self.entry[here],
            concept=self.concept[here],
            trigger_row=np.zeros(int(shown.sum()), np.int64),
            trigger_start=self.trigger_start[shown],
            trigger_length=self.trigger_length[shown],
            trigger_concept=self.trigger_concept[shown],
        )


_NONE = np.zeros(0, np.int64)
NO_MATCHES = Matches(
    row=_NONE, start=_NONE, length=_NONE, entry=_NONE, concept=_NONE,
    trigger_row=_NONE, trigger_start=_NONE, trigger_length=_NONE, trigger_concept=_NONE,
)  # fmt: skip
"""The matches of a batch in which nothing fires."""


class Matcher:
    """Finds the entries of one stream of an adapter in token ids (docs/matching.md).

    Anchored concepts: full triggers are found first; where occurrences overlap, the leftmost wins, then
    the longest; the concept's entries fire inside what remains. Concepts with `spans`: each entry fires
    wherever its ids occur. Only triggers of anchored concepts and entries of `spans` concepts are indexed.

    Thread-safe. Nothing is done for each concept: a larger index costs a few more steps of a binary search.
    """

    def __init__(self, adapter: Adapter, stream: str) -> None:
        """Index one stream of an adapter.

        Raises:
            InputError: the adapter has no such stream.
            AdapterFormatError: the stream's ids are malformed.
        """
        if stream not in adapter.streams:
            raise InputError(f"{adapter.label}: has no stream {stream!r}; it has {', '.join(adapter.streams)}")
        with adapter.container.read_whole():
            self._index(adapter, stream)

    def _index(self, adapter: Adapter, stream: str) -> None:
        table = adapter.streams[stream]
        _check_addresses(adapter, stream)
        anchored = adapter.anchored()
        self._table = table
        self._trigger_rows = np.flatnonzero(anchored[table.trigger_concept])
        self._span_rows = np.flatnonzero(~anchored[table.concept])
        self._n_triggers = len(self._trigger_rows)
        trigger_ids, trigger_offsets = _take(table.trigger_ids, table.trigger_offsets, self._trigger_rows)
        span_ids, span_offsets = _take(table.ids, table.offsets, self._span_rows)
        ids = np.concatenate([trigger_ids, span_ids])
        self._trie = Trie(ids, np.concatenate([trigger_offsets, span_offsets[1:] + trigger_offsets[-1]]))
        # Trigger variant -> the entries inside it; filled when a variant first fires. Threads may fill
        # the same key twice with equal values, which is harmless.
        self._inside: dict[int, tuple[Ints, Ints]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of memory the index holds, beyond the token ids in the file."""
        return self._trie.nbytes + self._trigger_rows.nbytes + self._span_rows.nbytes

    def match(self, ids: TokenIds) -> Matches:
        """Return what fires in one prompt or a batch of prompts.

        Args:
            ids: token ids [L] or [B, L], or lists of them of any lengths. Ids that no tokenizer gives
                (negative, or beyond 31 bits) match nothing: use -1 to mask positions.

        Raises:
            InputError: not integers, or more than two axes.
        """
        tokens, width = _flatten(ids)
        where, pattern = self._trie.walk(tokens)
        if not where.size:
            return NO_MATCHES
        row, start = np.divmod(where, width)
        is_trigger = pattern < self._n_triggers
        occurrences = self._resolve(row[is_trigger], start[is_trigger], self._trigger_rows[pattern[is_trigger]])
        spans = ~is_trigger
        parts = [(row[spans], start[spans], self._span_rows[pattern[spans] - self._n_triggers])]
        for at_row, at_start, trigger in zip(*(column.tolist() for column in occurrences), strict=True):
            entries, starts = self._entries_inside(trigger)
            parts.append((np.full(len(entries), at_row), starts + at_start, entries))
        row, start, entry = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((start, entry, row))
        row, start, entry = row[order], start[order], entry[order]
        table = self._table
        occurrence_row, occurrence_start, trigger_row = occurrences
        return Matches(
            row=row,
            start=start,
            length=table.offsets[entry + 1] - table.offsets[entry],
            entry=entry,
            concept=table.concept[entry].astype(np.int64),
            trigger_row=occurrence_row,
            trigger_start=occurrence_start,
            trigger_length=table.trigger_offsets[trigger_row + 1] - table.trigger_offsets[trigger_row],
            trigger_concept=table.trigger_concept[trigger_row].astype(np.int64),
        )

    def find_addresses(self, ids: TokenIds) -> tuple[Ints, Ints, Ints, Ints]:
        """Return every indexed address that occurs, before overlapping triggers are resolved.

        Addresses are the full triggers of anchored concepts and the entries of `spans` concepts.

        Args:
            ids: as for `match`.

        Returns:
            int64 [M] row, start, length and concept of each, by row, start and length.

        Raises:
            InputError: as `match`.
        """
        tokens, width = _flatten(ids)
        where, pattern = self._trie.walk(tokens)
        row, start = np.divmod(where, width)
        table, is_trigger = self._table, pattern < self._n_triggers
        length, concept = np.zeros_like(where), np.zeros_like(where)
        trigger = self._trigger_rows[pattern[is_trigger]]
        length[is_trigger] = table.trigger_offsets[trigger + 1] - table.trigger_offsets[trigger]
        concept[is_trigger] = table.trigger_concept[trigger]
        entry = self._span_rows[pattern[~is_trigger] - self._n_triggers]
        length[~is_trigger] = table.offsets[entry + 1] - table.offsets[entry]
        concept[~is_trigger] = table.concept[entry]
        order = np.lexsort((concept, length, start, row))
        return row[order], start[order], length[order], concept[order]

    def _resolve(self, row: Ints, start: Ints, trigger: Ints) -> tuple[Ints, Ints, Ints]:
        """Keep the leftmost-longest occurrences; equal triggers of two concepts both stay."""
        offsets = self._table.trigger_offsets
        length = offsets[trigger + 1] - offsets[trigger]
        order = np.lexsort((trigger, -length, start, row))
        kept: list[int] = []
        last = (-1, -1, -1)  # row, start, stop of the occurrence kept last
        candidates = zip(
            order.tolist(), row[order].tolist(), start[order].tolist(), length[order].tolist(), strict=True
        )
        for index, at_row, at_start, at_length in candidates:
            occurrence = (at_row, at_start, at_start + at_length)
            if at_row != last[0] or at_start >= last[2] or occurrence == last:
                kept.append(index)
                last = occurrence
        return row[kept], start[kept], trigger[kept]

    def _entries_inside(self, trigger: int) -> tuple[Ints, Ints]:
        """Return the entries of a trigger variant's concept that occur in it, and where."""
        known = self._inside.get(trigger)
        if known is not None:
            return known
        table = self._table
        (variant,) = table.triggers(slice(trigger, trigger + 1))
        rows = table.entry_rows(int(table.trigger_concept[trigger]))
        found = [
            (rows.start + index, start)
            for index, entry in enumerate(table.ngrams(rows))
            for start in range(len(variant) - len(entry) + 1)
            if variant[start : start + len(entry)] == entry
        ]
        entries, starts = np.array(found, np.int64).reshape(-1, 2).T
        self._inside[trigger] = entries, starts
        return entries, starts


def _check_addresses(adapter: Adapter, stream: str) -> None:
    """Check what the index relies on; vectors are checked when they are read."""
    table = adapter.streams[stream]
    vocab_size = adapter.manifest.streams[stream].tokenizer.vocab_size
    for column, ids, offsets, concept in (
        ("entries", table.ids, table.offsets, table.concept),
        ("triggers", table.trigger_ids, table.trigger_offsets, table.trigger_concept),
    ):
        where = f"{adapter.label}: {stream}.{column}"
        check_offsets(offsets, len(ids), f"{where}.offsets")
        check_ids(ids, vocab_size, f"{where}.ids")
        check_owners(concept, 0, len(adapter), f"{where}.concept")
        check_ngram_order(ids, offsets, concept, where)


def _take(
    ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], rows: Ints
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Return the ids and offsets of some rows."""
    if len(rows) == len(offsets) - 1:
        return ids, offsets
    first, lengths = offsets[rows], offsets[rows + 1] - offsets[rows]
    new_offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    index = np.arange(new_offsets[-1]) + np.repeat(first - new_offsets[:-1], lengths)
    return ids[index], new_offsets


def _flatten(ids: TokenIds) -> tuple[Ints, int]:
    """Return all rows end to end with a separator after each, and the width of a row with its separator."""
    if isinstance(ids, Sequence) and len(ids) and not isinstance(ids[0], (int, np.integer)):
        return _flatten_lists(ids)
    array = ids if isinstance(ids, np.ndarray) else _row(ids)
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise InputError(
            f"token ids are {array.dtype} with {array.ndim} axes; "
            "expected integers of shape [L] or [B, L], or lists of them"
        )
    if array.ndim == 1:
        array = array[None]
    n_rows, length = array.shape
    tokens = np.full((n_rows, length + 1), -1, np.int64)
    tokens[:, :length] = _mask(array)
    return tokens.reshape(-1), length + 1


def _flatten_lists(rows: Sequence[Any]) -> tuple[Ints, int]:
    arrays = [_row(row) for row in rows]
    for array in arrays:
        if array.dtype.kind not in "iu" or array.ndim != 1:
            raise InputError(
                f"token ids are {array.dtype} with {array.ndim} axes in a list; expected lists of integers"
            )
    width = 1 + max(len(array) for array in arrays)
    tokens = np.full((len(arrays), width), -1, np.int64)
    for row, array in zip(tokens, arrays, strict=True):
        row[: len(array)] = _mask(array)
    return tokens.reshape(-1), width


def _mask(ids: npt.NDArray[Any]) -> Ints:
    """Return ids as int64, with -1 for those that no tokenizer gives."""
    # 31 bits: packing must not let an id such as 2**32 + 5 look like 5.
    tokens: Ints = ids.astype(np.int64)
    tokens[(ids < 0) | (ids >= 1 << 31)] = -1
    return tokens


def _row(values: Any) -> npt.NDArray[Any]:
    """Return one row as an array; what is no row becomes an array that the caller refuses."""
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        return np.empty(0, object)
    return array if array.size else array.astype(np.int64)  # an empty list has no type of its own
