"""The same words are cut differently in different contexts; all the ways are found."""

import re
import zlib

import pytest
from core_builders import byte_tokenizer, law, make_adapter, make_concept, make_manifest, make_spec, make_tokenizer
from hypothesis import example, given
from hypothesis import strategies as st

from engram_core import CONTEXTS, Matcher, build_registry
from engram_core.registry import _locate

# A toy of real byte-pair encoders: a space, a quote or a bracket melts into the word behind it, words are
# cut every three characters counted from there, and runs of punctuation are one token.
_PIECES = re.compile(r"""[ "“'‘(\[*]?\w+|\s|[^\w\s]+""")


def pieces(text):
    """(start, stop) of every token."""
    spans = []
    for word in _PIECES.finditer(text):
        spans += [(at, min(at + 3, word.end())) for at in range(word.start(), word.end(), 3)]
    return spans


def melting_tokenizer(fold=str, **fields):
    def encode(text):
        return [zlib.crc32(fold(text[start:stop]).encode()) >> 1 for start, stop in pieces(text)]

    return make_tokenizer(encode, vocab_size=2**31, **fields)


def holds(ids, part):
    return any(tuple(ids[at : at + len(part)]) == tuple(part) for at in range(len(ids) - len(part) + 1))


TRIGGERS = [
    "Elena Vance, the red-haired pilot",
    "Aldric Vortex-9 CyberNebula",
    "x1",
    "(ink)",
    "7up",
    "Éire",
    "日本",
    "mango",
]
PHRASES = st.text("aAbZ7zop,.-'\"() é日", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.mark.parametrize("trigger", TRIGGERS)
@pytest.mark.parametrize("tokenizer", [byte_tokenizer(), melting_tokenizer(), melting_tokenizer(str.lower)])
def test_a_variant_is_what_its_example_holds(trigger, tokenizer):
    registry = build_registry(trigger, tokenizer, allow_single_token=True)
    assert registry.variants[0].ids == tuple(tokenizer.encode(trigger))
    assert len({variant.ids for variant in registry.variants}) == len(registry.variants)
    for variant in registry.variants:
        assert holds(tokenizer.encode(variant.example), variant.ids)
        assert trigger.casefold() in variant.example.casefold()


@law
@given(PHRASES, st.sampled_from(CONTEXTS))
@example("mango", ("a photo of ", "-like hat"))
@example("(", ("((", ":1.2))"))
@example("'s", ("a photo of ", "'s hat"))
def test_every_token_that_holds_a_part_of_the_phrase_is_located(phrase, context):
    before, after = context
    tokenizer, text = melting_tokenizer(), before + phrase + after
    located = _locate(before, phrase, after, tokenizer)
    spans = pieces(text)
    touching = [i for i, (start, stop) in enumerate(spans) if start < len(before + phrase) and stop > len(before)]
    wanted = tokenizer.encode(text)[touching[0] : touching[-1] + 1]
    assert holds(located, wanted)
    assert holds(tokenizer.encode(text), located)


@law
@given(PHRASES, st.sampled_from(CONTEXTS))
def test_bytes_never_depend_on_the_context(phrase, context):
    before, after = context
    assert _locate(before, phrase, after, byte_tokenizer()) == tuple(phrase.encode())


@pytest.mark.parametrize("trigger", ["Elena Vance, the red-haired pilot", "Aldric Vortex-9 CyberNebula"])
@pytest.mark.parametrize("fold", [str, str.lower])
def test_the_trigger_fires_in_every_context_and_case(trigger, fold):
    tokenizer = melting_tokenizer(fold)
    registry = build_registry(trigger, tokenizer)
    assert not registry.skipped
    triggers = [variant.ids for variant in registry.variants]
    matcher = Matcher(_adapter(triggers, tokenizer), "clip_l")
    for form in (trigger, trigger.lower(), trigger.upper(), trigger.title()):
        for before, after in CONTEXTS:
            assert len(matcher.match(tokenizer.encode(before + form + after))), before + form + after


def test_a_lower_casing_tokenizer_needs_no_variant_for_case():
    folded = {v.ids for v in build_registry("Red Cat", melting_tokenizer(str.lower)).variants}
    exact = {v.ids for v in build_registry("Red Cat", melting_tokenizer()).variants}
    assert len(folded) < len(exact)


def test_contexts_in_which_the_trigger_does_not_fit_are_reported():
    # Letters are cut one by one when they are upper case: too long for this encoder.
    def encode(text):
        return [ord(piece[-1]) for piece in re.findall(r" ?[a-z]+|.", text)]

    registry = build_registry("red cat", make_tokenizer(encode, max_tokens=4))
    reasons = {skip.reason for skip in registry.skipped}
    assert any("has 7 tokens with ToyTokenizer, the encoder reads 4" in reason for reason in reasons)
    assert all("RED CAT" in skip.example or "Red Cat" in skip.example for skip in registry.skipped)
    assert all(len(variant.ids) <= 4 for variant in registry.variants)


def test_a_variant_of_one_token_is_skipped_unless_allowed():
    def encode(text):
        return [1 if text == "AB" else 2] if text in ("AB", "ab") else [1, 2] if text == "Ab" else [5]

    contexts = [("", "")]
    refused = build_registry("Ab", make_tokenizer(encode), contexts=contexts)
    assert [v.ids for v in refused.variants] == [(1, 2)]
    assert [s.example for s in refused.skipped] == ["ab", "AB"]
    allowed = build_registry("Ab", make_tokenizer(encode), contexts=contexts, allow_single_token=True)
    assert [v.ids for v in allowed.variants] == [(1, 2), (2,), (1,)]
    assert not allowed.skipped


def _adapter(triggers, tokenizer):
    concept = make_concept("cat", *triggers)
    spec = make_spec(3, vocab_size=tokenizer.spec.vocab_size)
    return make_adapter(concept, manifest=make_manifest(streams={"clip_l": spec}))
