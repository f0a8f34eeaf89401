"""Which concepts contradict each other, and what each choice makes of them."""

from dataclasses import replace

import pytest
from core_builders import adapters as drawn_adapters
from core_builders import (
    law,
    make_adapter,
    make_concept,
    make_manifest,
    make_spec,
    make_stream,
    stored,
)
from hypothesis import given

from engram_core import (
    ON_CONFLICT,
    Concept,
    ConflictError,
    IncompatibleAdaptersError,
    InputError,
    extract_concepts,
    find_conflicts,
    merge_adapters,
)


def solo(name, *triggers, label=None, **fields):
    return make_adapter(make_concept(name, *triggers, **fields), label=label or f"{name}.safetensors")


def kinds(*parts):
    return [conflict.kind for conflict in find_conflicts(parts)]


# What is a conflict


def test_the_same_trigger_tokens_with_different_content():
    (conflict,) = find_conflicts([solo("one", (1, 2, 3)), solo("two", (1, 2, 3), seed=1)])
    assert conflict.kind == "trigger"
    assert (conflict.first, conflict.second) == ("one", "two")
    assert (conflict.first_label, conflict.second_label) == ("one.safetensors", "two.safetensors")
    assert (conflict.stream, conflict.ids) == ("clip_l", (1, 2, 3))
    assert conflict.describe() == (
        "'one' of one.safetensors and 'two' of two.safetensors share the trigger [1, 2, 3] of clip_l"
    )


def test_one_common_variant_is_enough():
    assert kinds(solo("one", (1, 2), (5, 6)), solo("two", (3, 4), (5, 6))) == ["trigger"]


def test_one_stream_is_enough():
    one = make_adapter(make_concept("one", (1, 2), streams=("clip_l", "t5")))
    two = make_adapter(make_concept("two", (1, 2), streams=("t5",)))
    (conflict,) = find_conflicts([one, two])
    assert conflict.stream == "t5"
    assert not kinds(solo("one", (1, 2), streams=("clip_l",)), solo("two", (1, 2), streams=("t5",)))


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("spans", "spans", ["span"]),
        ("spans", "anchored", ["span"]),
        ("anchored", "spans", ["span"]),
        ("anchored", "anchored", []),
    ],
)
def test_a_common_span_conflicts_when_one_side_fires_on_it_anywhere(one, two, expected):
    parts = [solo("one", (1, 2, 3), activation=one), solo("two", (2, 3, 4), activation=two)]
    conflicts = find_conflicts(parts)
    assert [conflict.kind for conflict in conflicts] == expected
    assert [conflict.ids for conflict in conflicts] == [(2, 3)] * len(expected)


def test_two_anchored_concepts_may_share_a_span_beside_a_third_that_leaks():
    calm = [solo("one", (1, 2, 3)), solo("two", (2, 3, 4))]
    assert not kinds(*calm, solo("leaky", (7, 8), activation="spans"))
    both = find_conflicts([*calm, solo("leaky", (7, 2, 3), activation="spans")])
    assert [(conflict.first, conflict.second) for conflict in both] == [("one", "leaky"), ("two", "leaky")]


def test_a_trigger_inside_another_is_no_conflict():
    assert not kinds(solo("one", (1, 2, 3)), solo("two", (2, 3)))


def test_the_name_alone_under_different_triggers():
    (conflict,) = find_conflicts([solo("cat", (1, 2), label="a"), solo("cat", (3, 4), label="b")])
    assert (conflict.kind, conflict.stream, conflict.ids) == ("name", "", ())
    assert conflict.describe() == "'cat' of a and 'cat' of b share the name 'cat'"


def test_each_pair_is_told_once_by_its_strongest_kind():
    one = solo("cat", (1, 2, 3), activation="spans")
    two = solo("cat", (1, 2, 3), activation="spans", seed=1)
    assert kinds(one, two) == ["trigger"]
    assert kinds(one, two, solo("cat", (1, 2, 3), seed=2)) == ["trigger"] * 3


def test_identical_concepts_agree():
    assert not kinds(solo("cat", (1, 2)), solo("cat", (1, 2)))


@pytest.mark.parametrize(
    "fields",
    [{"seed": 1}, {"rule": "relative"}, {"overlap": "mean"}, {"training": {"steps": 1}}, {"license": "MIT"}],
)
def test_any_difference_in_content_is_a_conflict(fields):
    assert kinds(solo("cat", (1, 2)), solo("cat", (1, 2), **fields)) == ["trigger"]


def test_the_same_content_under_another_name_would_fire_twice():
    assert kinds(solo("cat", (1, 2), trigger="x"), solo("kitty", (1, 2), trigger="x")) == ["trigger"]


def test_what_lives_together_in_one_adapter_was_settled_before():
    together = make_adapter(make_concept("one", (1, 2)), make_concept("two", (1, 2)))
    assert not kinds(together)
    assert not kinds(together, solo("three", (3, 4)))
    assert not kinds(together, together)


# What each choice does


def test_by_default_every_conflict_is_listed():
    parts = [
        make_adapter(make_concept("ant", (1, 2)), make_concept("bee", (3, 4)), label="a.safetensors"),
        make_adapter(make_concept("ant", (5, 6)), make_concept("cat", (3, 4)), label="b.safetensors"),
    ]
    with pytest.raises(ConflictError) as caught:
        merge_adapters(parts)
    assert [conflict.kind for conflict in caught.value.conflicts] == ["name", "trigger"]
    text = str(caught.value)
    assert text.startswith("2 conflicting pairs of concepts; choose keep-first, keep-last or both (--on-conflict):")
    for conflict in caught.value.conflicts:
        assert conflict.describe() in text
    assert tuple(find_conflicts(parts)) == caught.value.conflicts


def test_one_pair_is_one_pair():
    with pytest.raises(ConflictError, match=r"^1 conflicting pair of concepts"):
        merge_adapters([solo("one", (1, 2)), solo("two", (1, 2))])


def test_keep_first_and_keep_last():
    first, last = solo("cat", (1, 2)), solo("cat", (1, 2), seed=1)
    for parts in ([first, last], [last, first]):
        kept_first = merge_adapters(parts, on_conflict="keep-first")
        kept_last = merge_adapters(parts, on_conflict="keep-last")
        assert stored(kept_first.concept("cat")) == stored(parts[0].concept("cat"))
        assert stored(kept_last.concept("cat")) == stored(parts[1].concept("cat"))


def test_keeping_drops_only_what_contradicts_what_is_kept():
    # one - two - three: two contradicts both, they do not contradict each other.
    one, three = solo("one", (1, 2), (8, 8)), solo("three", (3, 4), (9, 9))
    two = solo("two", (1, 2), (3, 4))
    assert merge_adapters([one, two, three], on_conflict="keep-first").names() == ["one", "three"]
    assert merge_adapters([one, two, three], on_conflict="keep-last").names() == ["one", "three"]
    assert merge_adapters([two, one, three], on_conflict="keep-first").names() == ["two"]


def test_both_keeps_both_and_tells_their_names_apart():
    one, two = solo("cat", (1, 2)), solo("cat", (1, 2), seed=1)
    merge = merge_adapters([one, two], on_conflict="both")
    marks = {f"cat~{part.concept('cat').digest()[:8]}" for part in (one, two)}
    assert set(merge.names()) == marks
    assert len(marks) == 2


def test_both_leaves_distinct_names_alone():
    merge = merge_adapters([solo("one", (1, 2)), solo("two", (1, 2))], on_conflict="both")
    assert merge.names() == ["one", "two"]


def test_an_unknown_choice_is_refused():
    assert ON_CONFLICT == ("error", "keep-first", "keep-last", "both")
    with pytest.raises(InputError, match="on_conflict is 'newest', expected one of error, keep-first"):
        merge_adapters([solo("one", (1, 2))], on_conflict="newest")


# Names that an earlier merge marked


@pytest.fixture
def cats():
    """Three different cats, and the merge of the first two."""
    a, b, c = (solo("cat", (1, 2), seed=seed, label=f"{seed}.safetensors") for seed in range(3))
    return a, b, c, merge_adapters([a, b], on_conflict="both")


def test_meeting_a_marked_concept_again_is_no_news(cats):
    a, b, _, merge = cats
    again = merge_adapters([merge, a, b], on_conflict="both")
    assert again.to_bytes() == merge.to_bytes()
    assert not kinds(merge, a)
    assert merge_adapters([a, merge]).to_bytes() == merge.to_bytes()
    again.check()


def test_a_third_of_the_name_joins_them(cats):
    a, b, c, merge = cats
    assert len(merge_adapters([merge, c], on_conflict="both").names()) == 3
    flat = merge_adapters([a, b, c], on_conflict="both")
    assert merge_adapters([c, merge], on_conflict="both").to_bytes() == flat.to_bytes()


def test_a_newcomer_is_not_renamed_in_silence(cats):
    *_, merge = cats
    newcomer = solo("cat", (7, 8), label="new")
    with pytest.raises(ConflictError, match="and 'cat' of new share the name 'cat'"):
        merge_adapters([merge, newcomer])
    assert merge_adapters([merge, newcomer], on_conflict="keep-last").names() == ["cat"]


def test_a_mark_that_is_no_mark_is_a_name_like_any_other():
    one, two = solo("cat~12345678", (1, 2)), solo("cat", (3, 4))
    assert not kinds(one, two)
    assert merge_adapters([one, two]).names() == ["cat", "cat~12345678"]


def test_an_extracted_concept_keeps_its_mark_until_it_meets_the_plain_name(cats):
    a, _, _, merge = cats
    marked = f"cat~{a.concept('cat').digest()[:8]}"
    alone = extract_concepts(merge, [marked])
    assert merge_adapters([alone, alone]).names() == [marked]
    assert merge_adapters([alone, a]).to_bytes() == merge_adapters([a, alone]).to_bytes() == a.to_bytes()


def test_two_that_carry_marks_are_told_apart_by_them():
    a, b = solo("cat", (1, 2)), solo("cat", (3, 4))
    merge = merge_adapters([a, b], on_conflict="both")
    first, second = (extract_concepts(merge, [name]) for name in merge.names())
    assert merge_adapters([first, second]).to_bytes() == merge.to_bytes()


@law
@given(drawn_adapters(), drawn_adapters())
def test_no_conflict_means_the_default_merges(a, b):
    if find_conflicts([a, b]):
        with pytest.raises(ConflictError):
            merge_adapters([a, b])
    else:
        plain = merge_adapters([a, b]).to_bytes()
        for choice in ON_CONFLICT:
            assert merge_adapters([a, b], on_conflict=choice).to_bytes() == plain


# What cannot be merged at all


def other(**fields):
    streams = {"clip_l": make_spec(3)}
    return make_manifest(**{"streams": streams} | fields)


@pytest.mark.parametrize(
    ("manifest", "concept", "said"),
    [
        (other(backbone="sd35"), {}, "backbone is 'sd15' in the first and 'sd35' in the second"),
        (other(base_model="x/y"), {}, "base_model is 'toy/base' in the first and 'x/y' in the second"),
        (other(base_fingerprint="ef" * 32), {}, f"base_fingerprint is '{'cd' * 32}' in the first and '{'ef' * 32}'"),
        (other(base_fingerprint=None), {}, f"base_fingerprint is '{'cd' * 32}' in the first and None in the second"),
        (
            other(streams={"clip_l": make_spec(2)}),
            {"width": 2},
            "clip_l.width is 3 in the first and 2 in the second",
        ),
        (
            other(streams={"clip_l": make_spec(3, vocab_size=99)}),
            {},
            "clip_l.tokenizer.vocab_size is 1000 in the first and 99 in the second",
        ),
        (
            other(streams={"clip_l": make_spec(3, fingerprint="12" * 32)}),
            {},
            f"clip_l.tokenizer.fingerprint is '{'ab' * 32}' in the first and '{'12' * 32}' in the second",
        ),
    ],
)
def test_incompatible_adapters_name_both_files_and_both_values(manifest, concept, said):
    width = concept.get("width", 3)
    second = make_concept("two", (3, 4))
    second = Concept(record=second.record, streams={"clip_l": make_stream((3, 4), width=width)})
    two = make_adapter(second, manifest=manifest, label="two.safetensors")
    with pytest.raises(IncompatibleAdaptersError) as caught:
        merge_adapters([solo("one", (1, 2)), two])
    assert str(caught.value).startswith("one.safetensors and two.safetensors do not merge: " + said)
    with pytest.raises(IncompatibleAdaptersError):
        find_conflicts([solo("one", (1, 2)), two])


def test_an_incompatible_site_is_named():
    site = replace(make_spec(3), site="penultimate_hidden_state")
    two = make_adapter(make_concept("two", (3, 4)), manifest=other(streams={"clip_l": site}), label="two")
    with pytest.raises(
        IncompatibleAdaptersError, match=r"clip_l\.site is 'last_hidden_state' in the first and 'penultimate_hidden"
    ):
        merge_adapters([solo("one", (1, 2)), two])


def test_the_files_named_are_those_that_disagree():
    one = solo("one", (1, 2), streams=("clip_l",))
    two = solo("two", (3, 4), streams=("t5",))
    three = make_adapter(
        make_concept("three", (5, 6), streams=("t5",)),
        manifest=make_manifest(streams={"t5": make_spec(5, vocab_size=7)}),
        label="three.safetensors",
    )
    with pytest.raises(IncompatibleAdaptersError, match=r"^two\.safetensors and three\.safetensors do not merge"):
        merge_adapters([one, two, three])


def test_one_tokenizer_may_go_by_several_class_names():
    renamed = other(streams={"clip_l": make_spec(3, class_name="AlsoToyTokenizer")})
    one, two = solo("one", (1, 2)), make_adapter(make_concept("two", (3, 4)), manifest=renamed)
    merge = merge_adapters([one, two])
    assert merge.manifest.streams["clip_l"].tokenizer.class_name == "AlsoToyTokenizer"
    assert merge_adapters([two, one]).to_bytes() == merge.to_bytes()
