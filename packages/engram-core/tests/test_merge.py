"""The laws of merging and extracting: exact, reversible, idempotent, commutative, associative, to the byte."""

import numpy as np
import pytest
from core_builders import (
    WIDTHS,
    adapters,
    apart,
    bits,
    law,
    make_adapter,
    make_concept,
    make_manifest,
    ngrams,
    stored,
    vectors,
)
from hypothesis import assume, given
from hypothesis import strategies as st

from engram_core import (
    ConceptNotFoundError,
    InputError,
    Matcher,
    Residual,
    extract_concepts,
    merge_adapters,
)

# Names that interleave in canonical order, and ids that overlap: the hardest neighbours.
NAMES = [("ant", "cow", "fox"), ("bee", "dog", "gnu"), ("cat", "eel", "hen")]
NEIGHBOURS = [
    adapters(names=names, max_size=3, ids=st.integers(low, low + 3))
    for names, low in zip(NAMES, (0, 2, 4), strict=True)
]


def edited(adapter, stream, rows, hidden):
    if stream not in adapter.streams:
        return hidden
    return Residual(adapter, stream).apply(hidden, Matcher(adapter, stream).match(rows))


def fires(adapter, stream, rows):
    names = adapter.names()
    return {names[c] for c in Matcher(adapter, stream).match(rows).concepts()} if stream in adapter.streams else set()


def both(*parts):
    return merge_adapters(parts, on_conflict="both")


@law
@given(data=st.data(), a=NEIGHBOURS[0], b=NEIGHBOURS[1], c=NEIGHBOURS[2], stream=st.sampled_from(sorted(WIDTHS)))
def test_a_merge_never_changes_what_a_concept_does(data, a, b, c, stream):
    spelled = [ids for concept in a.concepts() if stream in concept.streams for ids in concept.streams[stream].triggers]
    words = st.lists(st.sampled_from(spelled) | ngrams(0, 2), max_size=4) if spelled else st.just([])
    rows = data.draw(st.lists(words.map(lambda parts: [i for ids in parts for i in ids]), min_size=1, max_size=2))
    merges = [both(a, b), both(b, a), both(both(a, c), b)]
    assume(all(fires(merge, stream, rows) <= set(a.names()) for merge in merges))
    hidden = data.draw(vectors((len(rows), max(1, *map(len, rows)), WIDTHS[stream])))
    alone = edited(a, stream, rows, hidden)
    for merge in merges:
        found = edited(merge, stream, rows, hidden)
        assert bits(found) == bits(alone)
        assert (found is hidden) == (alone is hidden)


@law
@given(a=NEIGHBOURS[0], b=NEIGHBOURS[1])
def test_extracting_gives_back_the_parts_byte_for_byte(a, b):
    merge = both(a, b)
    assert merge.names() == sorted([*a.names(), *b.names()])
    assert extract_concepts(merge, a.names()).to_bytes() == a.to_bytes()
    assert extract_concepts(merge, b.names()[::-1]).to_bytes() == b.to_bytes()
    assert extract_concepts(merge, merge.names()).to_bytes() == merge.to_bytes()


@law
@given(a=adapters())
def test_merging_with_itself_or_nothing_changes_nothing(a):
    assert merge_adapters([a]).to_bytes() == a.to_bytes()
    assert merge_adapters([a, a]).to_bytes() == a.to_bytes()
    for choice in ("keep-first", "keep-last", "both"):
        assert merge_adapters([a, a, a], on_conflict=choice).to_bytes() == a.to_bytes()


@law
@given(apart(3))
def test_order_and_grouping_do_not_matter(parts):
    a, b, c = parts
    whole = merge_adapters([a, b, c]).to_bytes()
    for order in ([a, c, b], [b, a, c], [b, c, a], [c, a, b], [c, b, a]):
        assert merge_adapters(order).to_bytes() == whole
    assert merge_adapters([merge_adapters([a, b]), c]).to_bytes() == whole
    assert merge_adapters([a, merge_adapters([b, c])]).to_bytes() == whole
    assert merge_adapters([merge_adapters([b, a]), merge_adapters([c, a])]).to_bytes() == whole


@law
@given(a=adapters(), b=adapters(), c=adapters())
def test_order_and_grouping_do_not_matter_when_both_are_kept(a, b, c):
    whole = both(a, b, c).to_bytes()
    assert both(c, b, a).to_bytes() == whole
    assert both(b, c, a).to_bytes() == whole
    assert both(both(a, b), c).to_bytes() == whole
    assert both(a, both(b, c)).to_bytes() == whole
    assert both(both(a, b), both(b, c)).to_bytes() == whole
    assert both(both(both(a, b), c), a).to_bytes() == whole
    both(both(a, b), c).check()


@law
@given(a=adapters(), b=adapters())
def test_both_keeps_the_content_of_each(a, b):
    merge = both(a, b)

    def contents(adapter):
        return {concept.digest() for concept in adapter.concepts()}

    assert contents(merge) == contents(a) | contents(b)
    for concept in merge.concepts():
        marked = concept.name.partition("~")[0]
        assert marked in {*a.names(), *b.names()}
    merge.check()


@law
@given(a=adapters(), b=adapters(), choice=st.sampled_from(["keep-first", "keep-last"]))
def test_the_side_that_is_kept_is_kept_whole(a, b, choice):
    kept, other = (a, b) if choice == "keep-first" else (b, a)
    merge = merge_adapters([a, b], on_conflict=choice)
    assert set(kept.names()) <= set(merge.names())
    for concept in kept.concepts():
        assert stored(merge.concept(concept.name)) == stored(concept)
    for name in set(merge.names()) - set(kept.names()):
        assert stored(merge.concept(name)) == stored(other.concept(name))
    merge.check()


@law
@given(apart(2))
def test_every_concept_is_carried_over(parts):
    merge = merge_adapters(parts)
    for part in parts:
        for concept in part.concepts():
            assert stored(merge.concept(concept.name)) == stored(concept)
            assert merge.concept(concept.name).digest() == concept.digest()
    merge.check()


# Case by case


def test_nothing_to_merge_is_an_error():
    with pytest.raises(InputError, match="nothing to merge"):
        merge_adapters([])


@pytest.mark.parametrize("one", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("other", ["f32", "f16", "bf16"])
def test_vectors_of_different_types_live_together_and_come_apart(one, other):
    a = make_adapter(make_concept("ant", (1, 2), dtype=one), make_concept("cow", (5, 6), dtype=one, seed=1))
    b = make_adapter(make_concept("bee", (3, 4), dtype=other, seed=2))
    merge = merge_adapters([a, b])
    assert merge.streams["clip_l"].dtype == (one if one == other else "f32")
    assert extract_concepts(merge, ["ant", "cow"]).to_bytes() == a.to_bytes()
    assert extract_concepts(merge, ["bee"]).to_bytes() == b.to_bytes()
    assert merge_adapters([b, a]).to_bytes() == merge.to_bytes()
    merge.check()


def test_each_stream_has_a_type_of_its_own():
    a = make_adapter(make_concept("ant", (1, 2), dtype="f16", streams=("clip_l", "t5")))
    b = make_adapter(make_concept("bee", (3, 4), dtype="bf16", streams=("clip_l",)))
    merge = merge_adapters([a, b])
    assert {name: table.dtype for name, table in merge.streams.items()} == {"clip_l": "f32", "t5": "f16"}
    assert extract_concepts(merge, ["ant"]).to_bytes() == a.to_bytes()
    assert extract_concepts(merge, ["bee"]).to_bytes() == b.to_bytes()


def test_streams_that_only_one_side_has_are_joined_and_dropped_again():
    a = make_adapter(make_concept("ant", (1, 2), streams=("clip_l",)))
    b = make_adapter(make_concept("bee", (3, 4), streams=("t5",)))
    merge = merge_adapters([a, b])
    assert list(merge.streams) == ["clip_l", "t5"]
    assert list(merge.concept("ant").streams) == ["clip_l"]
    assert not merge.streams["t5"].scales[merge.index("ant")].any()
    assert list(extract_concepts(merge, ["ant"]).streams) == ["clip_l"]
    assert extract_concepts(merge, ["bee"]).to_bytes() == b.to_bytes()


def test_concepts_keep_rules_of_their_own():
    records = [{"rule": "relative", "overlap": "mean"}, {"rule": "absolute-tanh", "activation": "spans"}]
    parts = [make_adapter(make_concept(f"c{i}", (i, i + 10), **fields)) for i, fields in enumerate(records)]
    merge = merge_adapters(parts)
    for i, fields in enumerate(records):
        assert {key: getattr(merge.record(i), key) for key in fields} == fields


@pytest.mark.parametrize("seed", range(20))
def test_a_name_that_a_merge_marks_does_not_change_the_order_of_additions(seed):
    # Three residuals in one place: their sum depends on the order, and "cat~..." sorts behind "cat 2".
    names = ["cat", "cat 2", "cat 3"]
    a = make_adapter(*(make_concept(name, (1, 2), seed=10 * seed + i) for i, name in enumerate(names)))
    merge = both(a, make_adapter(make_concept("cat", (8, 9))))
    assert [name.partition("~")[0] for name in merge.names()] == ["cat 2", "cat 3", "cat", "cat"]
    hidden = np.zeros((1, 2, 3), np.float32)
    assert bits(edited(merge, "clip_l", [[1, 2]], hidden)) == bits(edited(a, "clip_l", [[1, 2]], hidden))


def test_the_sign_of_zero_survives():
    a = make_adapter(make_concept("ant", (1, 2), vectors=[[-0.0, 0.0, 1.0]], scales=[-0.0, 0.0, 1.0]))
    b = make_adapter(make_concept("bee", (3, 4), dtype="bf16"))
    stream = merge_adapters([a, b]).concept("ant").streams["clip_l"]
    assert np.signbit(stream.vectors[0]).tolist() == np.signbit(stream.scales).tolist() == [True, False, False]


def test_a_merge_has_the_bytes_of_building_it_at_once():
    concepts = [make_concept(name, (i, i + 1, 9)) for i, name in enumerate(("ant", "bee", "cat"))]
    parts = [make_adapter(concept) for concept in concepts]
    assert merge_adapters(parts).to_bytes() == make_adapter(*concepts).to_bytes()


def test_extracting_needs_a_name():
    with pytest.raises(InputError, match=r"a\.safetensors: name at least one concept to extract"):
        extract_concepts(make_adapter(make_concept("ant", (1, 2)), label="a.safetensors"), [])


def test_extracting_a_stranger_says_what_there_is():
    adapter = make_adapter(make_concept("ant", (1, 2)), make_concept("bee", (3, 4)), label="a.safetensors")
    with pytest.raises(ConceptNotFoundError, match=r"a\.safetensors: has no concept 'cat'; it has 'ant', 'bee'"):
        extract_concepts(adapter, ["ant", "cat"])


def test_extracting_twice_the_same_name_gives_it_once():
    adapter = make_adapter(make_concept("ant", (1, 2)), make_concept("bee", (3, 4)))
    assert extract_concepts(adapter, ["ant", "ant"]).names() == ["ant"]


def test_the_sources_are_left_as_they_were():
    a, b = make_adapter(make_concept("ant", (1, 2))), make_adapter(make_concept("bee", (3, 4), dtype="f16"))
    before = a.to_bytes(), b.to_bytes()
    extract_concepts(merge_adapters([a, b]), ["ant"])
    assert (a.to_bytes(), b.to_bytes()) == before


def test_a_merge_of_one_stream_manifests_keeps_the_base_model():
    manifest = make_manifest({"clip_l": 3}, base_fingerprint=None, base_model="some/model")
    parts = [make_adapter(make_concept(f"c{i}", (i, i + 1)), manifest=manifest) for i in range(2)]
    merge = merge_adapters(parts)
    assert (merge.manifest.base_model, merge.manifest.base_fingerprint) == ("some/model", None)
    assert merge.manifest == parts[0].manifest
