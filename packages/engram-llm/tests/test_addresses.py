"""Rows of hashed n-grams as tensors: the published values, and `engram_core.NgramHash` for any settings."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_builders import SETTINGS, make_ids, make_lookup, make_memory

from engram_core import NgramHash
from engram_llm.addresses import Addresses
from engram_llm.reading import Neighbours, Positions

GOLDEN = json.loads((Path(__file__).parent / "golden" / "hash.json").read_text(encoding="utf-8"))
SHAPE = ("engram_vocab_size", "max_ngram_size", "n_head_per_ngram", "layer_ids", "compressed_vocab_size")


def rows_of(ngrams: NgramHash, ids: torch.Tensor) -> Mapping[int, torch.Tensor]:
    """Rows for a text that begins at the first id."""
    padded = torch.nn.functional.pad(ids, (ngrams.max_ngram_size - 1, 0), value=ngrams.compressed_pad_id)
    return Addresses(ngrams)(padded.unfold(1, ids.shape[1], 1).transpose(0, 1).flip(0))


def offsets_of(ngrams: NgramHash, layer: int) -> np.ndarray:
    """Where each head's rows begin."""
    sizes = ngrams.primes[layer].reshape(-1)
    return np.concatenate([[0], np.cumsum(sizes)[:-1]])


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: f"{case['compressed_vocab_size']} ids")
def test_the_golden_rows(case):
    ngrams = NgramHash(**{name: case[name] for name in (*SHAPE, "compressed_pad_id", "seed")})
    ids = torch.tensor(case["compressed_input_ids"])
    rows = rows_of(ngrams, ids)
    assert list(rows) == case["layer_ids"]
    for layer, found in rows.items():
        assert found.dtype == torch.int64
        assert (found.numpy() - offsets_of(ngrams, layer)).tolist() == case["hash_ids"][str(layer)]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_rows_are_those_of_the_reference_with_one_table_after_the_other(data):
    n = data.draw(st.integers(2, 5))
    vocabulary = data.draw(st.sampled_from([1, 2, 90, 150_000, 2**31]))
    ngrams = NgramHash(
        engram_vocab_size=data.draw(st.lists(st.integers(1, 5000), min_size=n - 1, max_size=n - 1)),
        max_ngram_size=n,
        n_head_per_ngram=data.draw(st.integers(1, 3)),
        layer_ids=data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=3, unique=True)),
        compressed_vocab_size=vocabulary,
        compressed_pad_id=data.draw(st.integers(0, vocabulary - 1)),
        seed=data.draw(st.integers(0, 2**62)),
        oldest_first=data.draw(st.booleans()),
    )
    length = data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    ids = rng.integers(0, vocabulary, (2, length))
    for layer, found in rows_of(ngrams, torch.from_numpy(ids)).items():
        expected = ngrams.addresses(ids, layer) + offsets_of(ngrams, layer)
        assert found.tolist() == expected.tolist()
        assert expected.max() < Addresses(ngrams).n_rows[layer] == ngrams.primes[layer].sum()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_memory_addresses_what_the_reference_does(name):
    memory, ids = make_memory(SETTINGS[name]), make_ids(2, 15)
    compressed = memory.compress(ids)
    assert np.array_equal(compressed.numpy(), make_lookup()[ids.numpy()])
    ngrams = memory.settings.hash_lookup(make_lookup())
    positions = Positions(ids=compressed, starts=torch.zeros_like(ids, dtype=torch.bool), plain=True)
    rows = memory.rows(positions, Neighbours(positions, 15, memory.reach), 15)
    for layer, found in rows.items():
        expected = ngrams.addresses(compressed.numpy(), layer) + offsets_of(ngrams, layer)
        assert found.tolist() == expected.tolist()
        assert memory.layers[str(layer)].multi_head_embedding.embedding.weight.shape[0] == ngrams.primes[layer].sum()
