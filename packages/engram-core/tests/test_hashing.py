"""The hashed memory's addresses: the published values, and the rules behind them."""

import json
from pathlib import Path

import numpy as np
import pytest
from core_builders import law
from hypothesis import given
from hypothesis import strategies as st

from engram_core import EngramError, InputError, NgramHash
from engram_core.hashing import is_prime

GOLDEN = json.loads((Path(__file__).parent / "golden" / "hash.json").read_text(encoding="utf-8"))
SETTINGS = (
    "engram_vocab_size",
    "max_ngram_size",
    "n_head_per_ngram",
    "layer_ids",
    "compressed_vocab_size",
    "compressed_pad_id",
    "seed",
)


def make(**fields):
    defaults = {
        "engram_vocab_size": [50, 40],
        "max_ngram_size": 3,
        "n_head_per_ngram": 2,
        "layer_ids": [1, 3],
        "compressed_vocab_size": 100,
        "compressed_pad_id": 2,
    }
    return NgramHash(**defaults | fields)


@pytest.fixture(params=GOLDEN, ids=lambda case: f"{case['compressed_vocab_size']} ids, N={case['max_ngram_size']}")
def case(request):
    return request.param


def golden_hash(case):
    return NgramHash(**{name: case[name] for name in SETTINGS})


def test_the_golden_multipliers(case):
    found = golden_hash(case).multipliers
    assert {str(layer): values.tolist() for layer, values in found.items()} == case["multipliers"]


def test_the_golden_primes(case):
    found = golden_hash(case).primes
    assert {str(layer): values.tolist() for layer, values in found.items()} == case["primes"]


def test_the_golden_addresses(case):
    ngram_hash = golden_hash(case)
    found = {
        str(layer): ngram_hash.addresses(case["compressed_input_ids"], layer).tolist() for layer in case["layer_ids"]
    }
    assert found == case["hash_ids"]


def test_the_golden_file_covers_several_settings():
    assert len(GOLDEN) == 3
    assert {case["max_ngram_size"] for case in GOLDEN} == {3, 4}


def naive_addresses(ngram_hash, row, layer):
    """The published formula with Python's own integers, 64 bits wide."""
    multipliers, primes = ngram_hash.multipliers[layer].tolist(), ngram_hash.primes[layer].tolist()
    found = []
    for position in range(len(row)):
        heads = []
        for n in range(2, ngram_hash.max_ngram_size + 1):
            mix = 0
            for back in range(n):
                token = row[position - back] if position >= back else ngram_hash.compressed_pad_id
                product = token * multipliers[back] & (2**64 - 1)
                mix ^= product - 2**64 if product >= 2**63 else product
            heads += [mix % prime for prime in primes[n - 2]]
        found.append(heads)
    return found


@law
@given(
    rows=st.integers(0, 9).flatmap(
        lambda length: st.lists(st.lists(st.integers(0, 99), min_size=length, max_size=length), min_size=1, max_size=3)
    ),
    max_ngram=st.integers(2, 5),
    heads=st.integers(1, 3),
    seed=st.integers(0, 2**40),
)
def test_addresses_follow_the_formula(rows, max_ngram, heads, seed):
    ngram_hash = make(
        max_ngram_size=max_ngram, engram_vocab_size=[50] * (max_ngram - 1), n_head_per_ngram=heads, seed=seed
    )
    for layer in ngram_hash.layer_ids:
        found = ngram_hash.addresses(np.array(rows, np.int64), layer)
        assert found.tolist() == [naive_addresses(ngram_hash, row, layer) for row in rows]
        assert found.dtype == np.int64
        assert found.shape == (len(rows), len(rows[0]), (max_ngram - 1) * heads)


def test_addresses_lie_within_their_tables():
    ngram_hash = make()
    ids = np.random.default_rng(0).integers(0, 100, (4, 200))
    for layer in (1, 3):
        found = ngram_hash.addresses(ids, layer)
        assert (found >= 0).all()
        assert (found < ngram_hash.primes[layer].reshape(-1)).all()


def test_an_address_depends_on_its_own_past_alone():
    ngram_hash = make()
    ids = np.random.default_rng(0).integers(0, 100, (1, 30))
    whole = ngram_hash.addresses(ids, 1)
    changed = ids.copy()
    changed[0, 20] = (changed[0, 20] + 1) % 100
    differs = (ngram_hash.addresses(changed, 1) != whole).any(axis=-1)[0]
    assert set(np.flatnonzero(differs).tolist()) == {20, 21, 22}
    assert np.array_equal(ngram_hash.addresses(ids[:, :11], 1), whole[:, :11])


def test_the_text_begins_after_padding():
    ngram_hash = make(compressed_pad_id=7)
    assert np.array_equal(ngram_hash.addresses([[7, 7, 5, 6]], 1)[:, 2:], ngram_hash.addresses([[5, 6]], 1))


@pytest.mark.parametrize("dtype", ["int32", "uint8", "uint64", "int64"])
def test_ids_of_any_integer_type(dtype):
    ids = np.array([[5, 6, 99]])
    assert np.array_equal(make().addresses(ids.astype(dtype), 1), make().addresses(ids, 1))


def test_primes_are_unique_across_the_model_and_ascend():
    ngram_hash = make(layer_ids=[4, 0, 9], engram_vocab_size=[50, 50], n_head_per_ngram=5)
    flat = [prime for layer in (4, 0, 9) for prime in ngram_hash.primes[layer].reshape(-1).tolist()]
    assert len(set(flat)) == len(flat) == 30
    # All tables ask for the same size, so the primes are simply the next ones, in (layer, n, head) order.
    assert flat == [number for number in range(50, 400) if is_prime(number)][:30]


def test_multipliers_are_odd_and_differ_by_layer_and_seed():
    one, other = make(), make(seed=1)
    assert all((values % 2 == 1).all() for values in one.multipliers.values())
    assert one.multipliers[1].tolist() != one.multipliers[3].tolist()
    assert one.multipliers[1].tolist() != other.multipliers[1].tolist()
    assert make().multipliers[1].tolist() == one.multipliers[1].tolist()


# Primes


def test_primes_agree_with_a_sieve():
    limit = 100_000
    sieve = np.ones(limit, bool)
    sieve[:2] = False
    for number in range(2, 317):
        if sieve[number]:
            sieve[number * number :: number] = False
    assert [is_prime(number) for number in range(limit)] == sieve.tolist()


@pytest.mark.parametrize(
    ("number", "prime"),
    [
        (2**31 - 1, True),
        (2**61 - 1, True),
        (2**64 - 59, True),
        (2**64 - 1, False),
        (3215031751, False),  # passes Miller-Rabin for 2, 3, 5 and 7
        (3825123056546413051, False),  # passes for 2 to 23
        ((2**31 - 1) ** 2, False),
        (561, False),
        (-7, False),
    ],
)
def test_large_and_treacherous_numbers(number, prime):
    assert is_prime(number) is prime


# Errors


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"engram_vocab_size": [50]}, "engram_vocab_size has 1 sizes; max_ngram_size 3 needs 2"),
        ({"max_ngram_size": 1, "engram_vocab_size": []}, "max_ngram_size 1 needs 1"),
        ({"engram_vocab_size": [50, 0]}, "must be positive"),
        ({"n_head_per_ngram": 0}, "must be positive"),
        ({"layer_ids": []}, r"layer_ids \[\] must be distinct"),
        ({"layer_ids": [1, 1]}, r"layer_ids \[1, 1\] must be distinct"),
        ({"layer_ids": [-1]}, r"layer_ids \[-1\] must be distinct, not negative"),
        ({"compressed_pad_id": 100}, r"compressed_pad_id 100 is outside 0\.\.99"),
        ({"compressed_pad_id": -1}, r"compressed_pad_id -1 is outside 0\.\.99"),
    ],
)
def test_settings_must_make_sense(fields, said):
    with pytest.raises(InputError, match=said) as caught:
        make(**fields)
    assert isinstance(caught.value, EngramError)


@pytest.mark.parametrize(
    ("ids", "layer", "said"),
    [
        ([1, 2], 1, "ids are int64 with 1 axes"),
        ([[[1]]], 1, "ids are int64 with 3 axes"),
        ([[1.0]], 1, "ids are float64 with 2 axes"),
        ([[True]], 1, "ids are bool with 2 axes"),
        ([[1]], 2, r"layer 2 has no memory; layers \[1, 3\] have"),
        ([[100]], 1, r"ids reach from 100 to 100, outside 0\.\.99"),
        ([[-1, 5]], 1, r"ids reach from -1 to 5, outside 0\.\.99"),
    ],
)
def test_ids_must_make_sense(ids, layer, said):
    with pytest.raises(InputError, match=said):
        make().addresses(ids, layer)


def test_no_ids_no_addresses():
    assert make().addresses(np.zeros((0, 5), int), 1).shape == (0, 5, 4)
    assert make().addresses(np.zeros((2, 0), int), 1).shape == (2, 0, 4)
