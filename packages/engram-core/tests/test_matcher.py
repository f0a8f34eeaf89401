"""Which entries fire where, against the plain oracle; hostile ids; locality."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from core_builders import WIDTHS, adapters, law, make_adapter, make_concept, make_manifest, make_spec, prompts
from core_oracles import naive_matches
from hypothesis import given
from hypothesis import strategies as st

from engram_core import NO_MATCHES, Adapter, AdapterFormatError, InputError, Matcher, Residual

INTEGERS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")


def fired(adapter, matches, stream="clip_l"):
    """Sorted (row, concept, entry, start), the oracle's terms."""
    table, names = adapter.streams[stream], adapter.names()
    return sorted(
        (row, names[concept], table.ngrams(slice(entry, entry + 1))[0], start)
        for row, concept, entry, start in zip(
            matches.row.tolist(), matches.concept.tolist(), matches.entry.tolist(), matches.start.tolist(), strict=True
        )
    )


def starts(matches):
    return list(zip(matches.row.tolist(), matches.start.tolist(), matches.length.tolist(), strict=True))


@law
@given(adapters(activations=("spans",), widths={"clip_l": 3}), prompts())
def test_spans_fire_wherever_their_ids_occur(adapter, rows):
    assert fired(adapter, Matcher(adapter, "clip_l").match(rows)) == naive_matches(adapter, "clip_l", rows)


@law
@given(adapters(activations=("anchored",), widths={"clip_l": 3}), prompts())
def test_anchored_entries_fire_inside_the_leftmost_longest_triggers(adapter, rows):
    assert fired(adapter, Matcher(adapter, "clip_l").match(rows)) == naive_matches(adapter, "clip_l", rows)


@law
@given(adapters(), prompts(), st.sampled_from(sorted(WIDTHS)))
def test_both_activations_together(adapter, rows, stream):
    if stream in adapter.streams:
        assert fired(adapter, Matcher(adapter, stream).match(rows), stream) == naive_matches(adapter, stream, rows)


@law
@given(adapters(activations=("anchored",), widths={"clip_l": 3}), prompts())
def test_anchored_never_fires_outside_a_full_trigger(adapter, rows):
    matches = Matcher(adapter, "clip_l").match(rows)
    covered = {
        (row, concept, start + at)
        for row, concept, start, length in zip(
            matches.trigger_row.tolist(),
            matches.trigger_concept.tolist(),
            matches.trigger_start.tolist(),
            matches.trigger_length.tolist(),
            strict=True,
        )
        for at in range(length)
    }
    for row, concept, start, length in zip(
        matches.row.tolist(), matches.concept.tolist(), matches.start.tolist(), matches.length.tolist(), strict=True
    ):
        assert {(row, concept, start + at) for at in range(length)} <= covered
    for row, concept, start, length in zip(
        matches.trigger_row.tolist(),
        matches.trigger_concept.tolist(),
        matches.trigger_start.tolist(),
        matches.trigger_length.tolist(),
        strict=True,
    ):
        triggers = adapter.concept(concept).streams["clip_l"].triggers
        assert tuple(rows[row][start : start + length]) in triggers


@law
@given(adapters(widths={"clip_l": 3}), prompts())
def test_matches_come_in_canonical_order_and_agree_with_the_table(adapter, rows):
    matches, table = Matcher(adapter, "clip_l").match(rows), adapter.streams["clip_l"]
    order = list(zip(matches.row.tolist(), matches.entry.tolist(), matches.start.tolist(), strict=True))
    assert order == sorted(set(order))
    assert matches.concept.tolist() == table.concept[matches.entry].tolist()
    assert matches.length.tolist() == np.diff(table.offsets)[matches.entry].tolist()
    assert matches.concepts() == sorted(set(matches.concept.tolist()))
    assert len(matches) == len(order)


@law
@given(adapters(widths={"clip_l": 3}), st.lists(st.integers(0, 3), max_size=12))
def test_a_prompt_alone_fires_as_in_any_batch(adapter, row):
    matcher = Matcher(adapter, "clip_l")
    alone = matcher.match(row)
    for neighbours in ([], [0, 1, 2, 3], [3] * 20):
        batch = matcher.match([neighbours, row, neighbours])
        middle = batch.row == 1
        for column in ("entry", "start", "length", "concept"):
            assert getattr(batch, column)[middle].tolist() == getattr(alone, column).tolist()


@law
@given(adapter=adapters(), rows=prompts())
def test_the_matches_of_a_row_are_those_of_its_prompt_alone(adapter, rows):
    for stream in adapter.streams:
        matcher = Matcher(adapter, stream)
        together = matcher.match(rows)
        for number, row in enumerate(rows):
            found, alone = together.of_row(number), matcher.match([row])
            for field in dataclasses.fields(alone):
                assert getattr(found, field.name).tolist() == getattr(alone, field.name).tolist()
        assert not len(together.of_row(len(rows)))


@law
@given(adapters(widths={"clip_l": 3}), prompts())
def test_addresses_are_all_occurrences_before_overlaps_are_resolved(adapter, rows):
    row, start, length, concept = Matcher(adapter, "clip_l").find_addresses(rows)
    expected = []
    for number, memory in enumerate(adapter.concepts()):
        stream = memory.streams["clip_l"]
        for address in stream.triggers if memory.record.activation == "anchored" else stream.entries:
            expected += [
                (r, at, len(address), number)
                for r, ids in enumerate(rows)
                for at in range(len(ids) - len(address) + 1)
                if tuple(ids[at : at + len(address)]) == address
            ]
    found = list(zip(row.tolist(), start.tolist(), length.tolist(), concept.tolist(), strict=True))
    assert found == sorted(expected)


# Overlapping triggers, case by case


def anchored(**triggers):
    return make_adapter(*(make_concept(name, ids, entries=[ids]) for name, ids in triggers.items()))


def winners(adapter, ids):
    names = adapter.names()
    matches = Matcher(adapter, "clip_l").match(ids)
    return [
        (names[c], start)
        for c, start in zip(matches.trigger_concept.tolist(), matches.trigger_start.tolist(), strict=True)
    ]


def test_the_leftmost_trigger_wins():
    adapter = anchored(left=(1, 2, 3), right=(3, 4, 5, 6))
    assert winners(adapter, [1, 2, 3, 4, 5, 6]) == [("left", 0)]
    assert winners(adapter, [0, 2, 3, 4, 5, 6]) == [("right", 2)]


def test_of_those_that_begin_together_the_longest_wins():
    adapter = anchored(short=(1, 2), long=(1, 2, 3))
    assert winners(adapter, [1, 2, 3]) == [("long", 0)]
    assert winners(adapter, [1, 2, 1, 2, 3]) == [("short", 0), ("long", 2)]


def test_what_a_winner_covers_is_taken_and_the_rest_is_free():
    adapter = anchored(one=(1, 2), two=(2, 3), three=(3, 1))
    assert winners(adapter, [1, 2, 3, 1, 2]) == [("one", 0), ("three", 2)]
    assert winners(adapter, [1, 2, 2, 3]) == [("one", 0), ("two", 2)]


def test_a_trigger_that_overlaps_itself_fires_once_a_stretch():
    assert winners(anchored(twins=(7, 7)), [7, 7, 7, 7, 7]) == [("twins", 0), ("twins", 2)]


def test_equal_triggers_of_two_concepts_both_fire():
    assert winners(anchored(one=(1, 2), two=(1, 2)), [1, 2]) == [("one", 0), ("two", 0)]


def test_a_loser_does_not_edit_what_the_winner_covers():
    adapter = make_adapter(make_concept("long", (1, 2, 3, 4)), make_concept("short", (2, 3)))
    matches = Matcher(adapter, "clip_l").match([1, 2, 3, 4])
    assert {adapter.names()[c] for c in matches.concepts()} == {"long"}


def test_every_variant_of_a_trigger_fires_with_its_own_entries():
    adapter = make_adapter(make_concept("cat", (1, 2), (8, 9, 2)))
    matcher = Matcher(adapter, "clip_l")
    assert starts(matcher.match([1, 2])) == [(0, 0, 2)]
    assert sorted(starts(matcher.match([8, 9, 2]))) == [(0, 0, 2), (0, 0, 3), (0, 1, 2)]
    assert matcher.match([8, 9, 3]) is NO_MATCHES


def test_a_trigger_of_one_token_fires_on_that_token():
    adapter = make_adapter(make_concept("dot", (5,)))
    assert starts(Matcher(adapter, "clip_l").match([[5, 1, 5]])) == [(0, 0, 1), (0, 2, 1)]


# Ids of every kind


@pytest.fixture
def cat():
    return Matcher(make_adapter(make_concept("cat", (1, 2), (5, 127))), "clip_l")


@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_type_is_read(cat, dtype):
    assert starts(cat.match(np.array([0, 1, 2, 5, 127], dtype))) == [(0, 1, 2), (0, 3, 2)]
    assert starts(cat.match(np.array([[1, 2, 0], [5, 127, 1]], dtype))) == [(0, 0, 2), (1, 0, 2)]
    assert starts(cat.match([np.array([2, 1], dtype), np.array([2, 1, 2], dtype)])) == [(1, 1, 2)]


@pytest.mark.parametrize("shift", [2**31, 2**32, 2**40, 2**62, -(2**32), -(2**31), -(2**63)])
@pytest.mark.parametrize("where", [0, 1])
def test_ids_beyond_31_bits_match_nothing(cat, shift, where):
    ids = [1, 2]
    ids[where] += shift
    assert cat.match(ids) is NO_MATCHES
    assert cat.match(np.array([ids])) is NO_MATCHES
    assert cat.match([ids, [2]]) is NO_MATCHES


@pytest.mark.parametrize("ids", [[2**63 + 1, 2**63 + 2], [2**64 - 1, 2**64 - 1], [2**32 + 1, 2**32 + 2]])
def test_large_unsigned_ids_match_nothing(cat, ids):
    assert cat.match(np.array(ids, np.uint64)) is NO_MATCHES
    assert starts(cat.match(np.array([*ids, 1, 2], np.uint64))) == [(0, 2, 2)]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64"])
def test_negative_ids_match_nothing_and_hide_nothing(cat, dtype):
    assert cat.match(np.array([-1, -2, -128], dtype)) is NO_MATCHES
    assert cat.match(np.array([1, -1, 2], dtype)) is NO_MATCHES
    assert starts(cat.match(np.array([-1, 1, 2, -1], dtype))) == [(0, 1, 2)]


def test_the_largest_id_is_an_id_like_any_other():
    manifest = make_manifest(streams={"clip_l": make_spec(3, vocab_size=2**31)})
    top = 2**31 - 1
    matcher = Matcher(make_adapter(make_concept("top", (top, top)), manifest=manifest), "clip_l")
    assert starts(matcher.match([0, top, top])) == [(0, 1, 2)]
    assert matcher.match([top + 1, top + 1]) is NO_MATCHES
    assert matcher.match([-1, -1]) is NO_MATCHES


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([1.0, 2.0], "float64 with 0 axes"),
        (np.array([1.0, 2.0]), "float64 with 1 axes"),
        (np.zeros((1, 2, 3), int), "int64 with 3 axes"),
        (np.array(5), "int64 with 0 axes"),
        ([[[1, 2]]], "int64 with 2 axes in a list"),
        ([[1, 2], 3], "int64 with 0 axes in a list"),
        ([1, [2, 3]], "object with 1 axes"),
        ([[[1, 2], [3]]], "object with 1 axes in a list"),
        ([2**70, 1], "object with 1 axes"),
        ([[1, 2], [-(2**70)]], "object with 1 axes in a list"),
        ([True, False], "bool with 1 axes"),
        (np.array([True, False]), "bool with 1 axes"),
        ("12", "<U1 with 0 axes"),
        (["cat", "dog"], "<U3 with 0 axes"),
        (None, "object with 0 axes"),
        ([None, 1], "object with 0 axes"),
        (7, "int64 with 0 axes"),
    ],
)
def test_what_is_not_integers_is_refused(cat, ids, said):
    with pytest.raises(InputError, match=f"token ids are {said}"):
        cat.match(ids)
    with pytest.raises(InputError, match=f"token ids are {said}"):
        cat.find_addresses(ids)


def test_mixed_lists_that_overflow_are_refused(cat):
    with pytest.raises(InputError, match="token ids are"):
        cat.match([-1, 2**63, 1, 2])


@pytest.mark.parametrize(
    "ids",
    [[], [[]], [[], []], (), np.zeros(0, int), np.zeros((0, 5), int), np.zeros((5, 0), int), [np.zeros(0, int)], [0]],
)
def test_no_ids_no_matches(cat, ids):
    assert cat.match(ids) is NO_MATCHES
    assert all(column.size == 0 for column in cat.find_addresses(ids))


def test_ragged_rows_keep_their_numbers(cat):
    assert starts(cat.match([[], [1, 2], [9], [0, 0, 0, 1, 2]])) == [(1, 0, 2), (3, 3, 2)]
    assert starts(cat.match(([1, 2], (0, 1, 2)))) == [(0, 0, 2), (1, 1, 2)]


def test_rows_never_run_into_each_other(cat):
    assert cat.match([[1], [2]]) is NO_MATCHES
    assert cat.match([[0, 1], [2, 0]]) is NO_MATCHES
    assert cat.match(np.array([[0, 1], [2, 0]])) is NO_MATCHES
    assert cat.match([[1], [], [2]]) is NO_MATCHES


def test_arrays_in_any_memory_order(cat):
    ids = np.array([[1, 2, 0], [0, 1, 2]])
    assert starts(cat.match(np.asfortranarray(ids))) == starts(cat.match(ids)) == [(0, 0, 2), (1, 1, 2)]
    assert starts(cat.match(np.repeat(ids, 2, axis=1)[:, ::2])) == starts(cat.match(ids))
    assert cat.match(ids[:, ::-1]) is NO_MATCHES


def test_the_ids_are_left_as_they_were(cat):
    ids = np.array([[1, 2, -1, 2**40]])
    ids.setflags(write=False)
    before = ids.copy()
    cat.match(ids)
    assert np.array_equal(ids, before)


# Locality, sharing, errors


@law
@given(adapters(widths={"clip_l": 3}), st.lists(st.integers(4, 999), max_size=30))
def test_without_a_trigger_nothing_happens_at_all(adapter, ids):
    matches = Matcher(adapter, "clip_l").match(ids)
    assert matches is NO_MATCHES
    hidden = np.zeros((1, max(1, len(ids)), 3), np.float32)
    assert Residual(adapter, "clip_l").apply(hidden, matches) is hidden


def test_no_matches_is_empty():
    assert len(NO_MATCHES) == 0
    assert NO_MATCHES.concepts() == []


def test_threads_share_a_matcher():
    rng = np.random.default_rng(0)
    concepts = [
        make_concept(f"c{i:02}", tuple(rng.integers(0, 6, 4).tolist()), activation=("anchored", "spans")[i % 2])
        for i in range(40)
    ]
    adapter = make_adapter(*concepts)
    batches = [rng.integers(0, 6, (4, 60)) for _ in range(24)]
    expected = [fired(adapter, Matcher(adapter, "clip_l").match(batch)) for batch in batches]
    assert all(expected)
    shared = Matcher(adapter, "clip_l")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(shared.match, batches * 4))
    assert [fired(adapter, matches) for matches in found] == expected * 4


def test_an_unknown_stream_is_named():
    adapter = make_adapter(make_concept("cat", (1, 2)), label="cat.safetensors")
    with pytest.raises(InputError, match=r"cat\.safetensors: has no stream 't5'; it has clip_l"):
        Matcher(adapter, "t5")


def test_malformed_addresses_are_refused_when_indexed():
    adapter = make_adapter(make_concept("cat", (1, 2)))
    info = adapter.container.tensors["clip_l.entries.ids"]
    data = bytearray(adapter.to_bytes())
    data[info.start : info.start + 4] = (5000).to_bytes(4, "little")
    broken = Adapter.from_bytes(bytes(data), "broken.safetensors")
    with pytest.raises(AdapterFormatError, match=r"broken\.safetensors: clip_l\.entries\.ids: holds the id 5000"):
        Matcher(broken, "clip_l")


def test_the_index_reports_its_memory():
    one = Matcher(make_adapter(make_concept("cat", (1, 2))), "clip_l")
    many = Matcher(make_adapter(*(make_concept(f"c{i}", (i, i + 1, 7)) for i in range(200))), "clip_l")
    assert 0 < one.nbytes < many.nbytes < 200 * 200
