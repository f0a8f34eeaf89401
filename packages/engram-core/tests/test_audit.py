"""Which text fires what, which prompts stay silent and why, and which concepts meet in one trigger."""

from dataclasses import dataclass
from itertools import count, islice, pairwise

import pytest
from core_builders import (
    WIDTHS,
    byte_tokenizer,
    law,
    make_adapter,
    make_concept,
    make_manifest,
    make_spec,
    make_tokenizer,
    prompts,
)
from core_builders import adapters as drawn_adapters
from hypothesis import given

from engram_core import (
    NO_MATCHES,
    Firing,
    InputError,
    Interference,
    Matcher,
    PromptAudit,
    audit_lines,
    find_interference,
    fired_spans,
)

BYTES = byte_tokenizer()


def ids(text):
    return tuple(text.encode())


def byte_adapter(*concepts, streams=("clip_l",)):
    specs = {stream: make_spec(WIDTHS[stream], vocab_size=256) for stream in streams}
    return make_adapter(*concepts, manifest=make_manifest(streams=specs), label="x.safetensors")


def fire(adapter, lines, **tokenizers):
    return list(audit_lines(adapter, tokenizers or {"clip_l": BYTES}, lines))


# Lines


def test_every_firing_line_is_told():
    adapter = byte_adapter(make_concept("cat", ids("zorp")), make_concept("dog", ids("quux")))
    lines = ["nothing", "a zorp", "", "quux and zorp"]
    assert fire(adapter, lines) == [
        Firing(line=2, text="a zorp", stream="clip_l", concept="cat", ids=ids("a zorp"), spans=((2, 6),)),
        Firing(line=4, text=lines[3], stream="clip_l", concept="cat", ids=ids(lines[3]), spans=((9, 13),)),
        Firing(line=4, text=lines[3], stream="clip_l", concept="dog", ids=ids(lines[3]), spans=((0, 4),)),
    ]


def test_streams_are_told_apart():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), streams=("clip_l", "t5")), streams=("clip_l", "t5"))
    shouting = make_tokenizer(lambda text: list(text.upper().encode()), vocab_size=256)
    found = fire(adapter, ["zorp", "ZORP"], clip_l=BYTES, t5=shouting)
    assert [(firing.line, firing.stream) for firing in found] == [(1, "clip_l")]
    found = fire(adapter, ["zorp", "ZORP"], clip_l=BYTES, t5=BYTES)
    assert [(firing.line, firing.stream) for firing in found] == [(1, "clip_l"), (1, "t5")]


def test_lines_are_read_in_batches_and_never_ahead():
    adapter = byte_adapter(make_concept("cat", ids("zorp")))
    taken = count()
    endless = ("zorp" for _ in iter(lambda: next(taken), None))
    firings = audit_lines(adapter, {"clip_l": BYTES}, endless)
    assert next(taken) == 0  # nothing is read before it is asked for
    assert [firing.line for firing in islice(firings, 1000)] == list(range(1, 1001))
    assert 1000 < next(taken) < 3000


def test_line_numbers_go_on_from_batch_to_batch():
    adapter = byte_adapter(make_concept("cat", ids("zorp")))
    lines = ["zorp" if number in (1, 512, 513, 1024, 1025, 2000) else "-" for number in range(1, 2001)]
    assert [firing.line for firing in fire(adapter, lines)] == [1, 512, 513, 1024, 1025, 2000]


def test_no_lines_no_firings():
    assert fire(byte_adapter(make_concept("cat", ids("zorp"))), []) == []


def test_the_tokenizer_must_be_the_adapters_own():
    adapter = byte_adapter(make_concept("cat", ids("zorp")))
    with pytest.raises(InputError, match=r"x\.safetensors: stream 'clip_l' needs its tokenizer"):
        list(audit_lines(adapter, {}, ["zorp"]))


# Spans


def spans_of(*concepts, row):
    adapter = make_adapter(*concepts)
    return fired_spans(Matcher(adapter, "clip_l").match([row]))


def test_ranges_that_overlap_or_touch_are_one():
    leaky = make_concept("cat", (1, 2, 3), entries=[(1, 2), (2, 3)], activation="spans")
    assert spans_of(leaky, row=[1, 2, 3]) == [(0, 0, ((0, 3),))]
    assert spans_of(leaky, row=[1, 2, 2, 3]) == [(0, 0, ((0, 4),))]
    assert spans_of(leaky, row=[1, 2, 0, 2, 3]) == [(0, 0, ((0, 2), (3, 5)))]
    nested = make_concept("cat", (1, 2, 3, 4), entries=[(2, 3), (1, 2, 3, 4)])
    assert spans_of(nested, row=[1, 2, 3, 4]) == [(0, 0, ((0, 4),))]


def test_concepts_keep_ranges_of_their_own():
    one = make_concept("one", (1, 2), activation="spans")
    two = make_concept("two", (2, 3), activation="spans")
    assert spans_of(one, two, row=[1, 2, 3]) == [(0, 0, ((0, 2),)), (0, 1, ((1, 3),))]


def test_nothing_fired_no_spans():
    assert fired_spans(NO_MATCHES) == []


@law
@given(drawn_adapters(widths={"clip_l": 3}), prompts())
def test_spans_cover_exactly_what_fires(adapter, rows):
    matches = Matcher(adapter, "clip_l").match(rows)
    fired = {
        (row, concept, start + at)
        for row, concept, start, length in zip(
            matches.row.tolist(), matches.concept.tolist(), matches.start.tolist(), matches.length.tolist(), strict=True
        )
        for at in range(length)
    }
    covered = set()
    for row, concept, spans in fired_spans(matches):
        assert all(before[1] < after[0] for before, after in pairwise(spans))
        covered |= {(row, concept, at) for start, stop in spans for at in range(start, stop)}
    assert covered == fired


# Prompts


@dataclass
class Examined:
    fired: list
    silent: dict


def examine(adapter, prompt, **tokenizers):
    report = PromptAudit(adapter, tokenizers or {"clip_l": BYTES}).examine(prompt)
    assert report.prompt == prompt
    return Examined(
        fired=[(stream, name) for stream, reading in report.streams.items() for name, _ in reading.fired],
        silent={(silent.stream, silent.concept): silent.reason for silent in report.silent},
    )


def test_a_prompt_that_fires_is_not_silent():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    audit = PromptAudit(adapter, {"clip_l": BYTES})
    reading = audit.examine("a zorp!").streams["clip_l"]
    assert (reading.ids, reading.n_read, reading.fired) == (ids("a zorp!"), 7, (("cat", ((2, 6),)),))
    assert audit.examine("a zorp!").silent == ()
    assert audit.examine("nothing here").silent == ()


def test_a_trigger_beyond_what_the_encoder_reads_is_told():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    found = examine(adapter, "a very zorp", clip_l=byte_tokenizer(max_tokens=9))
    assert found.fired == []
    assert found.silent == {("clip_l", "cat"): "it is cut off: it stands at tokens 8 to 11, the encoder reads 9"}
    assert examine(adapter, "a zorp", clip_l=byte_tokenizer(max_tokens=6)).silent == {}


def test_a_second_trigger_that_is_cut_off_is_told_though_the_first_fires():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    found = examine(adapter, "zorp zorp", clip_l=byte_tokenizer(max_tokens=7))
    assert found.fired == [("clip_l", "cat")]
    assert found.silent == {("clip_l", "cat"): "it is cut off: it stands at tokens 6 to 9, the encoder reads 7"}


def test_a_spans_trigger_that_is_cut_off_is_told_though_a_part_fires():
    adapter = byte_adapter(
        make_concept("cat", ids("zorp"), trigger="zorp", activation="spans"),
    )
    found = examine(adapter, "a zorp", clip_l=byte_tokenizer(max_tokens=5))
    assert "it is cut off: it stands at tokens 3 to 6, the encoder reads 5" in found.silent.values()


def test_a_trigger_inside_a_longer_word_is_not_expected_to_fire():
    adapter = byte_adapter(make_concept("cat", ids("Zorp"), trigger="Zorp"))
    assert examine(adapter, "a zorper and unzorp").silent == {}
    assert list(examine(adapter, "a zorper, a zorp").silent) == [("clip_l", "cat")]


def test_a_trigger_that_fires_once_and_is_cut_off_once_is_told():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    found = examine(adapter, "zorp and zorp", clip_l=byte_tokenizer(max_tokens=10))
    assert found.fired == [("clip_l", "cat")]
    assert found.silent == {("clip_l", "cat"): "it is cut off: it stands at tokens 10 to 13, the encoder reads 10"}


@pytest.mark.parametrize("prompt", ["ZORPS", "unZORPed", "9ZORP"])
def test_a_part_of_a_longer_word_is_no_trigger(prompt):
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    assert examine(adapter, prompt).silent == {}
    assert examine(adapter, f"{prompt} (ZORP)").silent != {}


def test_a_trigger_that_is_cut_into_other_tokens_is_told():
    adapter = byte_adapter(make_concept("cat", ids("zorp"), trigger="zorp"))
    found = examine(adapter, "a ZORP")
    assert found.silent == {("clip_l", "cat"): "the tokenizer cuts it here into tokens that are not registered"}


def test_a_trigger_that_another_covers_is_told():
    adapter = byte_adapter(
        make_concept("cat", ids("zorp"), trigger="zorp"), make_concept("king", ids("king zorp"), trigger="king zorp")
    )
    found = examine(adapter, "the king zorp")
    assert found.fired == [("clip_l", "king")]
    assert found.silent == {("clip_l", "cat"): "a trigger that begins earlier, or is longer, covers it"}
    assert examine(adapter, "the king zorp and zorp").silent == {}


def test_each_silent_stream_is_told():
    adapter = byte_adapter(
        make_concept("cat", ids("zorp"), trigger="zorp", streams=("clip_l", "t5")), streams=("clip_l", "t5")
    )
    found = examine(adapter, "a very zorp", clip_l=byte_tokenizer(max_tokens=5), t5=BYTES)
    assert found.fired == [("t5", "cat")]
    assert list(found.silent) == [("clip_l", "cat")]


def test_streams_that_a_concept_never_had_are_not_silent():
    adapter = byte_adapter(
        make_concept("cat", ids("zorp"), trigger="zorp", streams=("t5",)),
        make_concept("dog", ids("quux"), trigger="quux", streams=("clip_l",)),
        streams=("clip_l", "t5"),
    )
    found = examine(adapter, "zorp", clip_l=BYTES, t5=BYTES)
    assert found.fired == [("t5", "cat")]
    assert found.silent == {}


def test_prompts_need_the_adapters_tokenizers():
    with pytest.raises(InputError, match="stream 'clip_l' needs its tokenizer"):
        PromptAudit(byte_adapter(make_concept("cat", ids("zorp"))), {})


# Interference


def meeting(*concepts):
    found = find_interference(make_adapter(*concepts))
    return [(each.concept, each.inside, each.ids, each.resolved) for each in found]


def test_concepts_apart_do_not_meet():
    assert meeting(make_concept("one", (1, 2, 3)), make_concept("two", (3, 4, 5))) == []


@pytest.mark.parametrize("inner", [(1, 2), (2, 3), (3, 4)])
def test_a_trigger_inside_a_longer_one_is_settled(inner):
    found = meeting(make_concept("long", (1, 2, 3, 4)), make_concept("short", inner))
    assert found == [("short", "long", inner, True)]


def test_equal_triggers_both_fire():
    assert meeting(make_concept("one", (1, 2)), make_concept("two", (1, 2))) == [
        ("one", "two", (1, 2), False),
        ("two", "one", (1, 2), False),
    ]


def test_a_span_that_fires_anywhere_fires_inside():
    leaky = make_concept("leaky", (8, 2, 3, 9), entries=[(2, 3), (8, 2, 3, 9)], activation="spans")
    assert meeting(make_concept("calm", (1, 2, 3)), leaky) == [("leaky", "calm", (2, 3), False)]


def test_an_anchored_trigger_fires_inside_one_that_is_not_anchored():
    leaky = make_concept("leaky", (1, 2, 3), activation="spans")
    assert ("calm", "leaky", (2, 3), False) in meeting(make_concept("calm", (2, 3)), leaky)


def test_an_address_that_is_a_whole_variant_is_never_settled():
    several = make_concept("several", (1, 2), (1, 2, 3))
    assert ("plain", "several", (1, 2), False) in meeting(several, make_concept("plain", (1, 2)))


def test_interference_names_the_stream():
    adapter = make_adapter(
        make_concept("one", (1, 2, 3), streams=("t5",)), make_concept("two", (2, 3), streams=("t5", "clip_l"))
    )
    assert find_interference(adapter) == [
        Interference(stream="t5", concept="two", inside="one", ids=(2, 3), resolved=True)
    ]


@law
@given(drawn_adapters(widths={"clip_l": 3}))
def test_what_is_settled_stays_silent_inside_the_trigger(adapter):
    matcher, memories = Matcher(adapter, "clip_l"), {concept.name: concept for concept in adapter.concepts()}
    names = adapter.names()
    found = {(each.concept, each.inside): True for each in find_interference(adapter)}
    for each in find_interference(adapter):
        found[each.concept, each.inside] &= each.resolved
    for owner, memory in memories.items():
        triggers = memory.streams["clip_l"].triggers
        fired = {names[c] for trigger in triggers for c in Matcher.match(matcher, [trigger]).concepts()} - {owner}
        # Whatever fires in a concept's own trigger was announced as not settled.
        assert all(found.get((name, owner)) is False for name in fired)
