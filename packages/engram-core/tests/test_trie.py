"""Exact lookup of many sequences at once."""

import numpy as np
from core_builders import law
from hypothesis import given
from hypothesis import strategies as st

from engram_core.trie import Trie

SEQUENCES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5).map(tuple), max_size=12)


def build(sequences):
    flat = [i for ids in sequences for i in ids]
    return Trie(np.array(flat, np.int32), np.cumsum([0, *map(len, sequences)]))


@law
@given(SEQUENCES, st.lists(st.integers(-1, 4), max_size=20))
def test_a_walk_finds_every_sequence_at_every_position(sequences, tokens):
    where, pattern = build(sequences).walk(np.array([*tokens, -1], np.int64))
    expected = [
        (start, number)
        for start in range(len(tokens))
        for number, ids in enumerate(sequences)
        if tuple(tokens[start : start + len(ids)]) == ids
    ]
    assert sorted(zip(where.tolist(), pattern.tolist(), strict=True)) == sorted(expected)
    assert where.dtype == pattern.dtype == np.int64


@law
@given(SEQUENCES)
def test_equal_sequences_are_grouped(sequences):
    groups = {}
    for number, ids in enumerate(sequences):
        groups.setdefault(ids, []).append(number)
    expected = [numbers for numbers in groups.values() if len(numbers) > 1]
    assert sorted(build(sequences).equal_patterns()) == sorted(expected)


def test_depth_is_the_longest_sequence():
    assert build([(1,), (1, 2, 3), (4, 5)]).depth == 3
    assert build([]).depth == 0


def test_ids_that_differ_only_in_high_bits_are_told_apart():
    trie = build([(5, 2**31 - 1), (2**31 - 1, 5)])
    where, pattern = trie.walk(np.array([5, 2**31 - 1, 5, -1], np.int64))
    assert list(zip(where.tolist(), pattern.tolist(), strict=True)) == [(0, 0), (1, 1)]


FAR_APART = st.integers(2**31 - 50, 2**31 - 1) | st.integers(0, 50)
MANY_IDS = st.lists(st.lists(FAR_APART, min_size=2, max_size=3).map(tuple), min_size=1)


@law
@given(MANY_IDS, st.data())
def test_a_walk_through_many_ids_misses_nothing(sequences, data):
    known = [i for ids in sequences for i in ids]
    tokens = data.draw(st.lists(st.sampled_from(known) | st.integers(-1, 60), max_size=30))
    for ids in sequences:  # each at least once
        tokens += ids
    where, pattern = build(sequences).walk(np.array([*tokens, -1], np.int64))
    found = set(zip(where.tolist(), pattern.tolist(), strict=True))
    assert found == {
        (start, number)
        for number, ids in enumerate(sequences)
        for start in range(len(tokens))
        if tuple(tokens[start : start + len(ids)]) == ids
    }
