"""From a trigger's token ids to its entries: the published rule, and which vectors they share."""

import pytest
from core_builders import byte_tokenizer, law, make_tokenizer, ngrams, word_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from engram_core import DEFAULT_MAX_NGRAM, EngramError, InputError, Registry, TriggerError, Variant, build_registry
from engram_core.registry import ngram_spans


def register(ids, max_ngram=DEFAULT_MAX_NGRAM, **fields):
    """The registry of a trigger whose ids are given, in no context."""
    return build_registry(
        "the trigger", make_tokenizer(lambda text: list(ids)), max_ngram=max_ngram, contexts=(), **fields
    )


def published_rule(ids, max_ngram):
    """Every contiguous span [i, j) of 2 to N tokens, and the whole trigger."""
    spans = {ids[i:j] for i in range(len(ids)) for j in range(i + 1, len(ids) + 1) if 2 <= j - i <= max_ngram}
    return spans | {ids}


@law
@given(ngrams(min_size=2, max_size=12), st.integers(2, 9))
def test_entries_are_those_of_the_published_rule(ids, max_ngram):
    registry = register(ids, max_ngram)
    assert set(registry.entries) == published_rule(ids, max_ngram)
    assert len(set(registry.entries)) == len(registry.entries)


@law
@given(ngrams(min_size=2, max_size=12), st.integers(2, 9))
def test_entries_come_in_canonical_order(ids, max_ngram):
    entries = register(ids, max_ngram).entries
    assert list(entries) == sorted(entries, key=lambda entry: (len(entry), entry))


@law
@given(ngrams(min_size=2, max_size=12), st.integers(2, 9))
def test_one_variant_has_one_vector_for_each_entry(ids, max_ngram):
    registry = register(ids, max_ngram)
    assert sorted(registry.slots) == list(range(len(registry.entries)))
    assert registry.n_slots == len(registry.entries)


def test_a_trigger_longer_than_the_longest_span_is_an_entry_itself():
    ids = tuple(range(10, 19))
    assert register(ids, 3).entries == (
        *[(i, i + 1) for i in range(10, 18)],
        *[(i, i + 1, i + 2) for i in range(10, 17)],
        ids,
    )


@pytest.mark.parametrize("length", [6, 7])
def test_a_trigger_up_to_the_longest_span_is_registered_once(length):
    ids = tuple(range(length))
    assert register(ids).entries.count(ids) == 1
    assert max(map(len, register(ids).entries)) == length


def test_repeated_spans_are_one_entry():
    assert register((5, 5, 5, 5), 2).entries == ((5, 5), (5, 5, 5, 5))
    assert ngram_spans((5, 5, 5, 5), 2) == [(5, 5), (5, 5), (5, 5), (5, 5, 5, 5)]


def test_a_single_token_is_refused_unless_allowed():
    with pytest.raises(TriggerError, match="is the single token 9 of ToyTokenizer and would fire wherever"):
        register((9,))
    registry = register((9,), allow_single_token=True)
    assert registry.entries == ((9,),)
    assert [variant.ids for variant in registry.variants] == [(9,)]


@pytest.mark.parametrize("trigger", ["", "  ", "\n"])
def test_an_empty_trigger_is_refused(trigger):
    with pytest.raises(TriggerError, match="gives no token with ToyTokenizer"):
        build_registry(trigger, byte_tokenizer(), allow_single_token=True)


def test_a_trigger_without_tokens_is_refused():
    with pytest.raises(TriggerError, match="'the trigger' gives no token with ToyTokenizer"):
        register(())


def test_special_tokens_are_refused_with_their_ids():
    tokenizer = make_tokenizer(lambda text: [4, 7, 5, 7], special=(0, 5, 7))
    with pytest.raises(TriggerError, match=r"contains special tokens of ToyTokenizer \(ids \[5, 7\]: <5> <7>\)"):
        build_registry("x y", tokenizer)


def test_a_trigger_longer_than_the_encoder_reads_is_refused():
    with pytest.raises(TriggerError, match="'abcde' has 5 tokens with ToyTokenizer, the encoder reads 4"):
        build_registry("abcde", byte_tokenizer(max_tokens=4))
    assert build_registry("abcd", byte_tokenizer(max_tokens=4)).variants[0].ids == tuple(b"abcd")


def test_errors_name_the_trigger_and_are_value_errors():
    with pytest.raises(TriggerError, match="'cat'") as caught:
        build_registry("cat", word_tokenizer())
    assert isinstance(caught.value, EngramError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("max_ngram", [1, 0, -3])
def test_spans_have_at_least_two_tokens(max_ngram):
    with pytest.raises(InputError, match=f"max_ngram is {max_ngram}"):
        register((1, 2), max_ngram)


def test_ids_become_plain_integers():
    numpy = pytest.importorskip("numpy")
    registry = build_registry("x y", make_tokenizer(lambda text: numpy.array([3, 4], numpy.uint16)), contexts=())
    assert registry.variants[0].ids == (3, 4)
    assert {type(i) for entry in registry.entries for i in entry} == {int}


def test_outer_space_is_no_part_of_the_trigger():
    registry = build_registry("  red cat\n", byte_tokenizer(), contexts=())
    assert registry.trigger == "red cat"
    assert registry.variants[0] == Variant(ids=tuple(b"red cat"), example="red cat")


# Variants and the vectors they share


def make_registry(*variants, entries=None, slots=None, max_ngram=2):
    entries = entries or sorted({span for ids in variants for span in ngram_spans(ids, max_ngram)})
    return Registry(
        trigger="t",
        variants=tuple(Variant(ids=ids, example=f"example of {ids}") for ids in variants),
        entries=tuple(entries),
        slots=tuple(slots),
        skipped=(),
        max_ngram=max_ngram,
    )


def cut_by_context(*cuts):
    """A tokenizer that cuts the trigger `the phrase` in another way in each of the contexts `0 `, `1 `, ..."""

    def encode(text):
        words = text.split(" ")
        number = int(words.pop(0)) if words[0].isdigit() else 0
        ids = [900 + number] if text[0].isdigit() else []
        return ids + (list(cuts[number]) if words == ["the", "phrase"] else [800 + len(word) for word in words])

    contexts = [(f"{number} ", "") for number in range(len(cuts))]
    return build_registry("the phrase", make_tokenizer(encode), max_ngram=3, contexts=contexts)


def slot_map(registry):
    return dict(zip(registry.entries, registry.slots, strict=True))


def test_variants_of_equal_length_share_vectors_position_by_position():
    registry = cut_by_context((1, 2, 3), (11, 2, 3))
    assert [variant.ids for variant in registry.variants] == [(1, 2, 3), (11, 2, 3)]
    slots = slot_map(registry)
    assert slots[1, 2] == slots[11, 2]
    assert slots[1, 2, 3] == slots[11, 2, 3]
    assert len({slots[1, 2], slots[2, 3], slots[1, 2, 3]}) == 3
    assert registry.n_slots == 3


def test_a_variant_of_another_length_has_vectors_of_its_own():
    registry = cut_by_context((1, 2, 3), (7, 8, 9, 6))
    slots = slot_map(registry)
    first, second = registry.slots_of(registry.variants[0]), registry.slots_of(registry.variants[1])
    assert not first & second
    assert first | second == set(slots.values()) == set(range(registry.n_slots))


def test_equal_spans_share_a_vector_whatever_the_length():
    registry = cut_by_context((1, 2, 3), (1, 2, 9, 9))
    first, second = registry.slots_of(registry.variants[0]), registry.slots_of(registry.variants[1])
    assert first & second == {slot_map(registry)[1, 2]}


@law
@given(st.lists(ngrams(max_size=5), min_size=1, max_size=4, unique=True))
def test_every_entry_belongs_to_a_variant_and_slots_are_dense(cuts):
    registry = cut_by_context(*cuts)
    assert [variant.ids for variant in registry.variants] == cuts
    assert set(registry.entries) == {span for ids in cuts for span in ngram_spans(ids, 3)}
    assert set(registry.slots) == set(range(registry.n_slots))
    for variant in registry.variants:
        slots = slot_map(registry)
        assert registry.slots_of(variant) == {slots[span] for span in ngram_spans(variant.ids, 3)}


# What training never visited


def test_a_variant_training_never_showed_is_dropped():
    registry = cut_by_context((1, 2, 3), (7, 8, 9, 6))
    seen = registry.slots_of(registry.variants[0])
    kept, sources = registry.keep_trained([slot in seen for slot in range(registry.n_slots)])
    assert [variant.ids for variant in kept.variants] == [(1, 2, 3)]
    assert set(kept.entries) == {(1, 2), (2, 3), (1, 2, 3)}
    assert kept.n_slots == 3
    before = slot_map(registry)
    assert sources == [before[entry] for entry in kept.entries]


def test_dropping_the_first_variant_renumbers_the_vectors():
    registry = cut_by_context((1, 2, 3), (7, 8, 9, 6))
    seen = registry.slots_of(registry.variants[1])
    kept, sources = registry.keep_trained([slot in seen for slot in range(registry.n_slots)])
    assert [variant.ids for variant in kept.variants] == [(7, 8, 9, 6)]
    assert set(kept.slots) == set(range(len(seen)))
    assert sources == [slot_map(registry)[entry] for entry in kept.entries]
    assert set(sources) == seen


def test_variants_that_share_their_vectors_stay_together():
    registry = cut_by_context((1, 2, 3), (11, 12, 13))
    kept, sources = registry.keep_trained([True] * registry.n_slots)
    assert kept == registry
    assert sources == list(registry.slots)


@law
@given(st.lists(ngrams(max_size=5), min_size=1, max_size=4, unique=True), st.data())
def test_nothing_untrained_is_ever_kept(cuts, data):
    registry = cut_by_context(*cuts)
    trained = data.draw(st.lists(st.booleans(), min_size=registry.n_slots, max_size=registry.n_slots))
    complete = [variant for variant in registry.variants if all(trained[slot] for slot in registry.slots_of(variant))]
    if not complete:
        with pytest.raises(InputError, match="training visited no token variant of 'the phrase' in full"):
            registry.keep_trained(trained)
        return
    kept, sources = registry.keep_trained(trained)
    assert list(kept.variants) == complete
    assert set(kept.entries) == {span for variant in complete for span in ngram_spans(variant.ids, 3)}
    assert all(trained[slot] for slot in sources)
    # Entries that shared a vector still do, and no others.
    assert len(set(zip(kept.slots, sources, strict=True))) == len(set(kept.slots)) == len(set(sources))


def test_the_flags_must_be_one_for_each_vector():
    registry = cut_by_context((1, 2, 3))
    with pytest.raises(InputError, match="got 2 flags for 3 vectors of trigger 'the phrase'"):
        registry.keep_trained([True, False])


def test_a_registry_without_entries_has_no_vectors():
    assert make_registry((1, 2), entries=[(1, 2)], slots=[0]).n_slots == 1
    assert Registry(trigger="t", variants=(), entries=(), slots=(), skipped=(), max_ngram=2).n_slots == 0
