"""Exact lookup of many token sequences at once: a trie in one sorted array, walked for all positions together.

Keys are (node, token) pairs packed into 64 bits and compared in full, so there are no false positives; a
hash table of first pairs only decides where to look. Nodes are numbered level by level in key order, which
makes the child of the key at rank r simply node r + 1: the array of keys is the whole trie.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_SLOTS = 8  # of the filter, at least, for each pair of first tokens
_MIX = -7046029254386353131  # odd, 2**64 divided by the golden ratio: spreads pairs over the filter


class Trie:
    """An immutable set of P token sequences.

    Cost of a walk: a few NumPy calls for each token of the longest sequence that a position still agrees
    with; a position whose first two tokens begin no sequence is nearly always dropped at once. Memory:
    about 8 bytes a node, 4 a node for the way to its sequences, 4 a sequence, 8 to 16 a pair of first tokens.
    """

    __slots__ = ("_has_ends", "_keys", "_levels", "_pairs", "_pattern_start", "_patterns")

    def __init__(self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64]) -> None:
        """Build from P sequences of at least one token.

        Args:
            ids: int32, all sequences end to end, each id at least 0.
            offsets: int64 [P+1], where each begins.
        """
        lengths = np.diff(offsets)
        node = np.zeros(len(lengths), np.int64)
        alive = np.arange(len(lengths))
        levels: list[Ints] = []
        self._has_ends: list[bool] = []  # whether a sequence ends at this depth
        n_nodes = 1
        depth = 0
        while alive.size:
            keys, rank = _rank(_pack(node[alive], ids[offsets[alive] + depth]))
            node[alive] = n_nodes + rank
            n_nodes += len(keys)
            levels.append(keys)
            depth += 1
            longer = lengths[alive] > depth
            self._has_ends.append(not longer.all())
            alive = alive[longer]
        self._keys: Ints = np.concatenate(levels) if levels else np.zeros(0, np.int64)
        self._levels = np.cumsum([0, *map(len, levels)]).tolist()
        self._pairs = self._filter_pairs()
        self._patterns = np.argsort(node, kind="stable").astype(np.int32)
        self._pattern_start = np.searchsorted(node[self._patterns], np.arange(n_nodes + 1)).astype(np.int32)

    @property
    def depth(self) -> int:
        """Tokens of the longest sequence."""
        return len(self._levels) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of memory the trie holds."""
        arrays: tuple[npt.NDArray[Any], ...] = (self._keys, self._pairs, self._patterns, self._pattern_start)
        return sum(array.nbytes for array in arrays)

    def equal_patterns(self) -> list[list[int]]:
        """Return the groups of two or more sequences that are equal, each ascending."""
        bounds = self._pattern_start
        shared = np.flatnonzero(np.diff(bounds) > 1).tolist()
        return [self._patterns[bounds[node] : bounds[node + 1]].tolist() for node in shared]

    def walk(self, tokens: Ints) -> tuple[Ints, Ints]:
        """Find every sequence at every position.

        Args:
            tokens: int64 [n]; a negative token agrees with nothing, and the last must be negative.

        Returns:
            Two int64 [M] arrays: position of the first token, and number of the sequence.
        """
        positions: list[Ints] = []
        nodes: list[Ints] = []
        where = self._may_begin(tokens)
        node: Ints = np.zeros(len(where), np.int64)
        for depth in range(self.depth if where.size else 0):
            low = self._levels[depth]
            level = self._keys[low : self._levels[depth + 1]]
            key = _pack(node, tokens[where + depth]) if depth else tokens[where]
            rank = level.searchsorted(key)
            # Past the last key, the last key is what is compared, and it differs.
            found = (level.take(rank, mode="clip") == key).nonzero()[0]
            if not found.size:
                break
            where = where[found]
            node = rank[found] + (low + 1)
            if self._has_ends[depth]:  # at most depths not, when all are full triggers
                positions.append(where)
                nodes.append(node)
        if not positions:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        node = np.concatenate(nodes)
        first = self._pattern_start[node].astype(np.int64)
        counts = self._pattern_start[node + 1] - first
        # Sequences first, first + 1, .. of each node, node after node.
        within = np.arange(counts.sum()) + (first - counts.cumsum() + counts).repeat(counts)
        return np.concatenate(positions).repeat(counts), self._patterns[within].astype(np.int64)

    def _may_begin(self, tokens: Ints) -> Ints:
        """Return the positions whose first two tokens may begin a sequence; all when single tokens may."""
        if not self._pairs.size:
            return np.arange(len(tokens))
        return self._pairs[_slot(tokens[:-1], tokens[1:], len(self._pairs))].nonzero()[0]

    def _filter_pairs(self) -> npt.NDArray[np.bool_]:
        """Return a hash table of the pairs of tokens that begin sequences.

        Nearly every word of a prompt begins some sequence of a large set, but few pairs do: one look at
        this table spares most positions the search of two large levels.
        """
        if self.depth < 2 or self._has_ends[0]:
            return np.zeros(0, np.bool_)
        keys = self._keys[self._levels[1] : self._levels[2]]
        first, second = self._keys[(keys >> 32) - 1], keys & (1 << 32) - 1
        pairs = np.zeros(1 << (_SLOTS * len(first) + 127).bit_length(), np.bool_)
        pairs[_slot(first, second, len(pairs))] = True
        return pairs


def _pack(node: Ints, token: npt.NDArray[Any]) -> Ints:
    # A negative token makes the key negative, and no stored key is.
    packed: Ints = (node << 32) | token
    return packed


def _slot(first: Ints, second: Ints, n_slots: int) -> Ints:
    # The upper bits of a product depend on all bits of its factors.
    slot: Ints = (_pack(first, second) * _MIX) >> (65 - n_slots.bit_length()) & (n_slots - 1)
    return slot


def _rank(keys: Ints) -> tuple[Ints, Ints]:
    """Return the distinct keys in order, and for each key its place among them."""
    # As np.unique does, without the masked arrays that np.unique imports on its first call.
    order = keys.argsort(kind="stable")
    ordered = keys[order]
    first = np.ones(len(keys), bool)
    first[1:] = ordered[1:] != ordered[:-1]
    rank = np.empty(len(keys), np.int64)
    rank[order] = np.cumsum(first) - 1
    return ordered[first], rank
