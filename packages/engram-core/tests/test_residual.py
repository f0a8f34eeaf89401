"""What matched entries add to the states: against the plain oracle, and to the bit where nothing fires."""

import numpy as np
import pytest
from core_builders import (
    RULES,
    adapters,
    bits,
    law,
    make_adapter,
    make_concept,
    prompts,
    vectors,
)
from core_oracles import naive_matches, naive_states
from hypothesis import given
from hypothesis import strategies as st

from engram_core import NO_MATCHES, ConceptNotFoundError, InputError, Matcher, Residual
from engram_core.residual import mean_norm

STRENGTHS = st.sampled_from([1.0, 0.5, -1.0, 2, 0.0, 1e-3])
ONE_STREAM = {"clip_l": 3}


def edit(adapter, rows, hidden, stream="clip_l", **options):
    return Residual(adapter, stream).apply(hidden, Matcher(adapter, stream).match(rows), **options)


def edited_positions(adapter, rows):
    return {
        (row, start + at) for row, _, entry, start in naive_matches(adapter, "clip_l", rows) for at in range(len(entry))
    }


def states_for(data, rows, width=3):
    length = max(1, *map(len, rows)) + data.draw(st.integers(0, 3), label="padding")
    return data.draw(vectors((len(rows), length, width)), label="hidden")


def assert_close(found, expected, scale):
    """Within float32's reach: `scale` is the size of what was added up."""
    assert np.abs(found.astype(np.float64) - expected).max() <= 1e-5 * scale


@pytest.mark.parametrize("rule", RULES)
@law
@given(data=st.data(), rows=prompts())
def test_every_rule_agrees_with_the_oracle(rule, data, rows):
    adapter = data.draw(adapters(widths=ONE_STREAM, rules=[rule]), label="adapter")
    hidden = states_for(data, rows)
    names = adapter.names()
    strength = data.draw(st.one_of(STRENGTHS, st.dictionaries(st.sampled_from(names), STRENGTHS)), label="strength")
    lengths = data.draw(
        st.none() | st.lists(st.integers(1, hidden.shape[1]), min_size=len(rows), max_size=len(rows)), label="lengths"
    )
    before = hidden.copy()
    found = edit(adapter, rows, hidden, strength=strength, lengths=lengths)
    expected = naive_states(adapter, "clip_l", rows, hidden, strength, lengths)
    largest = max(1.0, *(float(np.abs(c.streams["clip_l"].vectors).max()) for c in adapter.concepts()))
    assert_close(found, expected, largest * max(1.0, float(np.abs(hidden).max())) * 200)
    assert found.dtype == np.float32
    assert bits(hidden) == bits(before)


@law
@given(data=st.data(), rows=prompts())
def test_mixed_rules_in_one_adapter_agree_with_the_oracle(data, rows):
    adapter = data.draw(adapters(widths=ONE_STREAM), label="adapter")
    hidden = states_for(data, rows)
    expected = naive_states(adapter, "clip_l", rows, hidden)
    largest = max(1.0, *(float(np.abs(c.streams["clip_l"].vectors).max()) for c in adapter.concepts()))
    assert_close(edit(adapter, rows, hidden), expected, largest * max(1.0, float(np.abs(hidden).max())) * 200)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@law
@given(adapter=adapters(widths=ONE_STREAM, max_size=2), rows=prompts(), seed=st.integers(0, 2**32 - 1))
def test_positions_where_nothing_fires_keep_their_bytes(dtype, adapter, rows, seed):
    length = 1 + max(1, *map(len, rows))
    rng = np.random.default_rng(seed)
    hidden = np.zeros((len(rows), length, 3), dtype)
    word = hidden.view(f"u{hidden.itemsize}")
    quiet = {"float32": 0x7FC00000, "float16": 0x7E00}[dtype]
    touched = edited_positions(adapter, rows)
    for row, position in np.ndindex(hidden.shape[:2]):
        if (row, position) not in touched:  # zeros of both signs, and NaN with all kinds of payload
            word[row, position] = quiet | rng.integers(0, 256, 3)
            hidden[row, position, rng.integers(3)] = -0.0
    found = edit(adapter, rows, hidden)
    for row, position in np.ndindex(hidden.shape[:2]):
        if (row, position) not in touched:
            assert bits(found[row, position]) == bits(hidden[row, position])
    if not touched:
        assert found is hidden


@law
@given(adapter=adapters(widths=ONE_STREAM), rows=prompts(), zero=st.sampled_from([0, 0.0, -0.0, False]))
def test_strength_zero_is_the_base_model(adapter, rows, zero):
    hidden = np.full((len(rows), 12, 3), -0.0, np.float32)
    assert edit(adapter, rows, hidden, strength=zero) is hidden
    assert edit(adapter, rows, hidden, strength=dict.fromkeys(adapter.names(), zero)) is hidden


@law
@given(adapter=adapters(widths=ONE_STREAM, activations=["spans"], rules=["absolute", "absolute-tanh"]), rows=prompts())
def test_silencing_a_concept_leaves_exactly_the_others(adapter, rows):
    hidden = np.zeros((len(rows), 12, 3), np.float32)
    silent, *others = adapter.names()
    rest = [adapter.concept(name) for name in others]
    found = edit(adapter, rows, hidden, strength={silent: 0.0})
    expected = edit(make_adapter(*rest), rows, hidden) if rest and "clip_l" in make_adapter(*rest).streams else hidden
    assert bits(found) == bits(expected)


@law
@given(adapter=adapters(widths=ONE_STREAM), rows=prompts(), seed=st.integers(0, 99))
def test_a_row_is_edited_alike_alone_and_in_a_batch(adapter, rows, seed):
    hidden = np.random.default_rng(seed).normal(size=(len(rows), 12, 3)).astype(np.float32)
    together = edit(adapter, rows, hidden)
    for number, row in enumerate(rows):
        alone = edit(adapter, [row], hidden[number : number + 1])
        assert bits(alone[0]) == bits(together[number])


# One entry, by hand

ONE = {"entries": [(1, 2)], "vectors": [[3.0, 0.0, 4.0]], "scales": [2.0, 1.0, -0.5]}


def one(**fields):
    return make_adapter(make_concept("cat", (1, 2), **ONE | fields))


def test_absolute_is_vector_times_scale():
    hidden = np.ones((1, 3, 3), np.float32)
    found = edit(one(), [[0, 1, 2]], hidden)
    assert found.tolist() == [[[1, 1, 1], [7, 1, -1], [7, 1, -1]]]


def test_absolute_tanh_bounds_the_scale():
    found = edit(one(rule="absolute-tanh"), [[1, 2]], np.zeros((1, 2, 3), np.float32))
    assert found[0, 0] == pytest.approx([3 * np.tanh(2), 0, 4 * np.tanh(-0.5)], rel=1e-6)


def test_relative_is_direction_times_tanh_times_the_mean_norm():
    hidden = np.zeros((1, 4, 3), np.float32)
    hidden[0, :, 0] = [2, 0, 6, 100]
    found = edit(one(rule="relative"), [[1, 2]], hidden, lengths=[3])
    rho = (2 + 0 + 6) / 3
    assert (found - hidden)[0, 1] == pytest.approx([0.6 * np.tanh(2) * rho, 0, 0.8 * np.tanh(-0.5) * rho], rel=1e-6)
    padded = edit(one(rule="relative"), [[1, 2]], hidden)
    assert (padded - hidden)[0, 1, 0] == pytest.approx(0.6 * np.tanh(2) * 27, rel=1e-6)


def test_relative_takes_its_size_from_its_own_row():
    hidden = np.zeros((2, 2, 3), np.float32)
    hidden[0, :, 0], hidden[1, :, 0] = 1, 1000
    found = edit(one(rule="relative"), [[1, 2], [1, 2]], hidden)
    change = found - hidden
    assert change[1, 0, 2] == pytest.approx(1000 * change[0, 0, 2], rel=1e-5)


def test_a_zero_vector_adds_nothing_under_the_relative_rule():
    hidden = np.ones((1, 2, 3), np.float32)
    found = edit(one(rule="relative", vectors=[[0, 0, 0]]), [[1, 2]], hidden)
    assert found.tolist() == hidden.tolist()


def three_spans(**fields):
    spans = {"entries": [(1, 1), (1, 1, 1)], "vectors": [[1, 0, 0], [0, 10, 0]], "scales": [1, 1, 1]}
    return make_adapter(make_concept("cat", (1, 1, 1), **spans | fields))


def test_entries_over_one_position_add_up():
    found = edit(three_spans(), [[1, 1, 1]], np.zeros((1, 3, 3), np.float32))
    assert found[0].tolist() == [[1, 10, 0], [2, 10, 0], [1, 10, 0]]


def test_or_are_averaged():
    found = edit(three_spans(overlap="mean"), [[1, 1, 1]], np.zeros((1, 3, 3), np.float32))
    assert found[0, 0].tolist() == [0.5, 5, 0]
    assert found[0, 1] == pytest.approx([2 / 3, 10 / 3, 0])


def test_concepts_are_averaged_each_for_itself():
    loud = make_concept("loud", (1, 1, 1), entries=[(1, 1, 1)], vectors=[[0, 0, 100]], scales=[1, 1, 1])
    quiet = three_spans(overlap="mean").concept("cat")
    found = edit(make_adapter(loud, quiet), [[1, 1, 1]], np.zeros((1, 3, 3), np.float32))
    assert found[0, 0].tolist() == [0.5, 5, 100]


def test_strength_multiplies_each_concept_by_name():
    adapter = make_adapter(
        make_concept("one", (1, 2), entries=[(1, 2)], vectors=[[1, 0, 0]], scales=[1, 1, 1]),
        make_concept("two", (1, 2), entries=[(1, 2)], vectors=[[0, 1, 0]], scales=[1, 1, 1]),
    )
    found = edit(adapter, [[1, 2]], np.zeros((1, 2, 3), np.float32), strength={"two": -2.5})
    assert found[0].tolist() == [[1, -2.5, 0], [1, -2.5, 0]]


def test_states_of_half_precision_stay_so():
    adapter, rows = one(), [[1, 2, 0], [0, 0, 0]]
    hidden = np.random.default_rng(0).normal(size=(2, 3, 3)).astype(np.float16)
    found = edit(adapter, rows, hidden)
    assert found.dtype == np.float16
    expected = hidden.copy()
    expected[0, :2] += np.array([6, 0, -2], np.float16)
    assert bits(found) == bits(expected)


def test_states_in_any_memory_order():
    adapter, rows = one(rule="relative"), [[1, 2, 0]]
    hidden = np.random.default_rng(0).normal(size=(1, 3, 3)).astype(np.float32)
    expected = edit(adapter, rows, hidden)
    for same in (np.asfortranarray(hidden), np.repeat(hidden, 2, axis=2)[..., ::2]):
        assert edit(adapter, rows, same) == pytest.approx(expected, rel=1e-6)
    hidden.setflags(write=False)
    assert bits(edit(adapter, rows, hidden)) == bits(expected)


def test_the_mean_norm_counts_the_positions_that_are_read():
    hidden = np.zeros((2, 3, 2), np.float32)
    hidden[0] = [[3, 4], [0, 0], [6, 8]]
    hidden[1] = [[0, 1], [0, 3], [0, 100]]
    assert mean_norm(hidden).tolist() == pytest.approx([5, 104 / 3])
    assert mean_norm(hidden, [3, 2]).tolist() == [5, 2]
    assert mean_norm(hidden.astype(np.float16), np.array([1, 1], np.uint8)).tolist() == [5, 1]
    assert mean_norm(hidden).dtype == np.float32


def test_half_precision_norms_do_not_overflow():
    assert mean_norm(np.full((1, 1, 4), 60000, np.float16)).tolist() == [120000]


# Errors


def apply_to(hidden, **options):
    adapter = one(rule="relative")
    return Residual(adapter, "clip_l").apply(hidden, Matcher(adapter, "clip_l").match([[1, 2]]), **options)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e39, {"cat": float("nan")}])
def test_the_strength_must_be_a_finite_number(strength):
    value = strength["cat"] if isinstance(strength, dict) else strength
    with pytest.raises(InputError, match=f"strength of concept 'cat' is {value}".replace("+", r"\+")):
        apply_to(np.zeros((1, 2, 3), np.float32), strength=strength)


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (1, 2, 4), (1, 2, 3, 1)])
def test_states_must_have_the_width_of_the_stream(shape):
    with pytest.raises(InputError, match=rf"states have shape \[{shape[0]}, .*expected \[B, L, 3\]"):
        apply_to(np.zeros(shape, np.float32))


@pytest.mark.parametrize("shape", [(1, 1, 3), (0, 2, 3)])
def test_matches_must_lie_within_the_states(shape):
    with pytest.raises(InputError, match="matches reach beyond the states"):
        apply_to(np.zeros(shape, np.float32))


def test_states_must_be_floats():
    with pytest.raises(InputError, match="states are int64, expected floats"):
        apply_to(np.zeros((1, 2, 3), np.int64))


@pytest.mark.parametrize(
    ("lengths", "said"),
    [
        ([0], "lengths reach from 0 to 0, outside 1..2"),
        ([3], "lengths reach from 3 to 3, outside 1..2"),
        ([-1], "lengths reach from -1 to -1, outside 1..2"),
        ([1, 2], r"lengths are int64 \[2\], expected integers \[1\]"),
        (2, r"lengths are int64 \[\], expected integers \[1\]"),
        ([1.5], r"lengths are float64 \[1\]"),
    ],
)
def test_lengths_must_fit_the_states(lengths, said):
    with pytest.raises(InputError, match=said):
        apply_to(np.ones((1, 2, 3), np.float32), lengths=lengths)


def test_an_unknown_stream_is_named():
    with pytest.raises(InputError, match="has no stream 't5'; it has clip_l"):
        Residual(one(), "t5")


def test_nothing_is_asked_of_states_when_nothing_fires():
    hidden = np.zeros((4, 9, 3), np.float32)
    assert Residual(one(), "clip_l").apply(hidden, NO_MATCHES, strength=float("nan")) is hidden


def test_a_strength_for_a_concept_that_is_not_there_is_refused():
    residual = Residual(make_adapter(make_concept("cat", (1, 2))), "clip_l")
    with pytest.raises(ConceptNotFoundError, match="has no concept 'cta'; it has 'cat'"):
        residual.apply(np.zeros((1, 4, 3), np.float32), NO_MATCHES, strength={"cta": 0.0})
