"""Arguments that make no sense are errors that say which argument, its value and what was expected."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_builders import (
    MANIFEST,
    make_adapter,
    make_concept,
    make_manifest,
    make_spec,
    make_stream,
    make_tokenizer,
    word_tokenizer,
)

from engram_core import (
    Adapter,
    Concept,
    ConceptNotFoundError,
    ConceptRecord,
    ConceptStream,
    ConflictError,
    EngramError,
    IncompatibleAdaptersError,
    InputError,
    Manifest,
    Matcher,
    Residual,
    TriggerError,
    build_registry,
    extract_concepts,
    extract_file,
    find_conflicts,
    merge_adapters,
    merge_files,
)


def expect(kind: type[Exception], words: Sequence[str], call: Callable[[], object]) -> Exception:
    with pytest.raises(kind) as caught:
        call()
    assert isinstance(caught.value, EngramError)
    message = str(caught.value)
    assert message.replace("\n", " ").isprintable()
    assert max(map(len, message.splitlines())) < 800  # a line each, however many conflicts there are
    for word in words:
        assert word in message
    return caught.value


# Concepts that do not fit


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


def circular() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["itself"] = value
    return value


@pytest.mark.parametrize(
    ("training", "words"),
    [
        ({"a": {1}}, ["concept 'cat' cannot be written as JSON", "set"]),
        ({"a": b"x"}, ["cannot be written as JSON", "bytes"]),
        ({"a": np.float32(1)}, ["cannot be written as JSON", "float32"]),
        ({(1, 2): 1}, ["cannot be written as JSON", "tuple"]),
        ({"a": float("nan")}, ["cannot be written as JSON"]),
        ({"a": -float("inf")}, ["cannot be written as JSON"]),
        ({"a": "\ud800"}, ["cannot be written as JSON", "surrogates"]),
        (circular(), ["cannot be written as JSON", "Circular"]),
        ({"a": nested(100_000)}, ["cannot be written as JSON", "recursion"]),
        ({"a": 10**1000}, ["holds the integer 1000", "at most 1000 characters"]),
        ({"a": nested(63)}, ["nests its JSON too deeply", "64"]),
        ({"a": "x" * (1 << 18)}, ["concept 'cat' has a record of 2622", "262144", "keep less in `training`"]),
    ],
)
def test_training_notes_that_json_cannot_hold(training, words):
    expect(InputError, words, lambda: make_adapter(make_concept("cat", (1, 2), training=training)))


def test_training_notes_up_to_the_limits():
    adapter = make_adapter(make_concept("cat", (1, 2), training={"a": nested(62), "b": "x" * ((1 << 18) - 1000)}))
    assert Adapter.from_bytes(adapter.to_bytes()).concept("cat").record.training["a"] == nested(62)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": ""}, ["concept name is ''", "1..256 printable characters without outer spaces"]),
        ({"name": 5}, ["concept name is 5"]),
        ({"name": "x" * 257}, ["concept name is 'xxx", "..."]),
        ({"name": "two\nlines"}, [r"concept name is 'two\nlines'"]),
        ({"name": "cat "}, ["concept name is 'cat '"]),
        ({"trigger": None}, ["concept trigger is None"]),
        ({"trigger": "\x1b[31m"}, [r"concept trigger is '\x1b[31m'"]),
        ({"rule": "absolut"}, ["'cat': rule is 'absolut', expected one of absolute, absolute-tanh, relative"]),
        ({"activation": None}, ["'cat': activation is None, expected one of anchored, spans"]),
        ({"overlap": "add"}, ["'cat': overlap is 'add', expected one of sum, mean"]),
        ({"dtype": "float32"}, ["'cat': dtype is 'float32', expected one of f32, f16, bf16"]),
        ({"dtype": ["f32"]}, ["'cat': dtype is ['f32']"]),
        ({"max_ngram": 1}, ["'cat': max_ngram is 1, expected at least 2"]),
        ({"max_ngram": 7.0}, ["'cat': max_ngram is 7.0"]),
        ({"max_ngram": "7"}, ["'cat': max_ngram is '7'"]),
        ({"max_ngram": True}, ["'cat': max_ngram is True"]),
        ({"training": None}, ["'cat': training has the type NoneType"]),
        ({"training": [1]}, ["'cat': training has the type list"]),
        ({"license": 5}, ["'cat': license has the type int"]),
    ],
)
def test_a_record_that_is_wrong(fields, words):
    settings: dict[str, Any] = {"name": "cat", "trigger": "the cat", "rule": "absolute"}
    expect(InputError, words, lambda: ConceptRecord(**settings | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"entries": []}, ["clip_l"]),
        ({"entries": [()]}, ["clip_l.entries.offsets: row 0 reaches from 0 to 0, expected 1..4096 ids"]),
        ({"entries": [(1, 2), (1, 2)]}, ["clip_l.entries: row 1 repeats or precedes"]),
        ({"entries": [(1, 1000)]}, ["clip_l.entries.ids: holds the id 1000, the vocabulary has 1000"]),
        ({"entries": [(1, -1)]}, ["stream 'clip_l': entries hold ids outside 0..2**31-1"]),
        ({"entries": [(1, 1 << 31)]}, ["stream 'clip_l': entries hold ids outside 0..2**31-1"]),
        ({"entries": [(1, 1 << 70)]}, ["stream 'clip_l': entries hold ids of type object, expected integers"]),
        ({"entries": [(1.5, 2.0)]}, ["stream 'clip_l': entries hold ids of type float64, expected integers"]),
        ({"entries": [(True, False)]}, ["stream 'clip_l': entries hold ids of type bool, expected integers"]),
        ({"entries": [("a", "b")]}, ["stream 'clip_l': entries hold ids of type <U1, expected integers"]),
        ({"entries": [tuple(range(900)) * 5]}, ["row 0 reaches from 0 to 4500, expected 1..4096 ids"]),
        ({"vectors": np.ones((2, 3))}, ["concept 'cat', stream 'clip_l': vectors have shape (2, 3), expected (1, 3)"]),
        ({"vectors": np.ones((1, 4))}, ["vectors have shape (1, 4), expected (1, 3)"]),
        ({"vectors": np.ones(3)}, ["vectors have shape (3,), expected (1, 3)"]),
        ({"vectors": None}, ["vectors have shape (), expected (1, 3)"]),
        ({"vectors": np.ones((1, 3), complex)}, ["'cat', stream 'clip_l': vectors are complex128, expected floats"]),
        ({"vectors": [["a", "b", "c"]]}, ["'cat', stream 'clip_l': vectors are <U1, expected floats"]),
        ({"vectors": [[1, 2, np.nan]]}, ["clip_l.vectors: holds NaN or infinity"]),
        ({"vectors": [[1, 2, 1e39]]}, ["clip_l.vectors: holds NaN or infinity"]),
        ({"vectors": [[1, 2, 70000]], "dtype": "f16"}, ["clip_l.vectors: holds NaN or infinity"]),
        ({"scales": np.ones((1, 3))}, ["'cat', stream 'clip_l': scales have shape (1, 3), expected (3,)"]),
        ({"scales": 1.0}, ["'cat', stream 'clip_l': scales have shape (), expected (3,)"]),
        ({"scales": [1, -np.inf, 1]}, ["clip_l.scales: holds NaN or infinity"]),
        ({"triggers": []}, ["clip_l.triggers: concept 0 has entries without trigger"]),
        ({"triggers": [(1, 2), (1, 2)]}, ["clip_l.triggers: row 1 repeats or precedes"]),
        ({"triggers": [(1.0, 2.5)]}, ["stream 'clip_l': triggers hold ids of type float64, expected integers"]),
    ],
)
def test_a_memory_that_is_wrong(fields, words):
    def build() -> Adapter:
        record = {"name": "cat", "trigger": "the cat", "rule": "absolute", "dtype": fields.pop("dtype", "f32")}
        entries = fields.get("entries", [(1, 2)])
        memory: dict[str, Any] = {
            "triggers": ((1, 2),),
            "entries": entries,
            "vectors": np.ones((len(entries), 3), np.float32),
            "scales": np.ones(3, np.float32),
        }
        return make_adapter(
            Concept(record=ConceptRecord(**record), streams={"clip_l": ConceptStream(**memory | fields)})
        )

    expect(InputError, words, build)


def test_streams_that_are_not_in_the_manifest():
    concept = make_concept("cat", (1, 2), streams=("clip_l", "t5"))
    words = ["stream 't5' is not in the manifest, which has clip_l"]
    expect(InputError, words, lambda: make_adapter(concept, manifest=make_manifest({"clip_l": 3})))


def test_a_concept_for_another_width():
    words = ["concept 'cat', stream 'clip_l': vectors have shape (1, 3), expected (1, 768)"]
    manifest = make_manifest({"clip_l": 768})
    expect(InputError, words, lambda: make_adapter(make_concept("cat", (1, 2)), manifest=manifest))


def test_a_concept_without_streams():
    concept = replace(make_concept("cat", (1, 2)), streams={})
    expect(InputError, [], lambda: make_adapter(concept))
    expect(
        InputError, ["concept 0 has no entry in any stream"], lambda: make_adapter(concept, make_concept("z", (3, 4)))
    )


def test_no_concept_and_two_of_one_name():
    expect(InputError, ["at least one concept, got none"], make_adapter)
    concepts = make_concept("cat", (1, 2)), make_concept("cat", (3, 4))
    expect(InputError, ["two concepts have the name 'cat'"], lambda: make_adapter(*concepts))


def test_more_streams_than_a_header_holds():
    names = [f"stream_{number}" for number in range(500)]
    record = ConceptRecord(name="cat", trigger="the cat", rule="absolute")
    concept = Concept(record=record, streams={name: make_stream((1, 2), width=1) for name in names})
    manifest = make_manifest(dict.fromkeys(names, 1))
    words = ["the header would have", "the limit is 262144"]
    expect(InputError, words, lambda: make_adapter(concept, manifest=manifest))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backbone": "SD 1.5"}, ["backbone is 'SD 1.5', expected a lower-case name"]),
        ({"backbone": None}, ["backbone is None"]),
        ({"base_model": ""}, ["base_model.id is ''"]),
        ({"base_model": None}, ["base_model.id is None"]),
        ({"base_model": "\x1b[31m"}, [r"base_model.id is '\x1b[31m'"]),
        ({"base_fingerprint": "abc"}, ["base_model.fingerprint is 'abc', expected null or 64 hexadecimal digits"]),
        ({"base_fingerprint": 5}, ["base_model.fingerprint is 5"]),
        ({"streams": {}}, ["streams is {}, expected at least one stream"]),
        ({"streams": {"Clip": make_spec(3)}}, ["streams is 'Clip', expected lower-case stream names"]),
        ({"streams": {"clip": make_spec(0)}}, ["streams.clip.width is 0, expected 1..1048576"]),
        ({"streams": {"clip": make_spec(3.0)}}, ["streams.clip.width is 3.0"]),
        ({"streams": {"clip": make_spec(True)}}, ["streams.clip.width is True"]),
        ({"streams": {"clip": make_spec("3")}}, ["streams.clip.width is '3'"]),
        ({"streams": {"clip": replace(make_spec(3), site="the end")}}, ["streams.clip.site is 'the end'"]),
        ({"streams": {"clip": make_spec(3, vocab_size=0)}}, ["streams.clip.tokenizer.vocab_size is 0"]),
        ({"streams": {"clip": make_spec(3, vocab_size=(1 << 31) + 1)}}, ["vocab_size is 2147483649"]),
        ({"streams": {"clip": make_spec(3, class_name="")}}, ["streams.clip.tokenizer.class is ''"]),
        ({"streams": {"clip": make_spec(3, fingerprint=None)}}, ["streams.clip.tokenizer.fingerprint is None"]),
    ],
)
def test_a_manifest_that_is_wrong(fields, words):
    settings: dict[str, Any] = {"backbone": "sd15", "base_model": "toy", "streams": {"clip": make_spec(3)}}
    expect(InputError, words, lambda: Manifest(**settings | fields))


# Ids, states and strengths

CAT_AND_DOG = make_adapter(make_concept("cat", (1, 2)), make_concept("dog", (3, 4), rule="relative"))
FIRED = Matcher(CAT_AND_DOG, "clip_l").match([[1, 2, 3, 4]])
STATES = np.ones((1, 4, 3), np.float32)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([1.0, 2.0], ["float64"]),
        (np.array([1.0, 2.0]), ["float64 with 1 axes"]),
        (np.array([np.nan]), ["float64"]),
        ([True, False], ["bool"]),
        (np.zeros((2, 2), bool), ["bool with 2 axes"]),
        (np.zeros((1, 1, 1), int), ["int64 with 3 axes"]),
        ([[[1]]], ["int64 with 2 axes in a list"]),
        (np.int64(1), ["int64 with 0 axes"]),
        (5, ["0 axes"]),
        (None, ["object with 0 axes"]),
        ("text", ["<U1"]),
        (["a", "b"], ["<U1"]),
        ([1, [2]], ["object"]),
        ([[1], 2], ["int64 with 0 axes in a list"]),
        ([[1, [2, 3]]], ["object"]),
        ([[1], None], ["object"]),
        ([1 << 70], ["object"]),
        ({1, 2}, ["object"]),
        ((token for token in [1, 2]), ["object"]),
    ],
)
def test_ids_that_are_none(ids, words):
    matcher = Matcher(CAT_AND_DOG, "clip_l")
    expect(InputError, ["token ids are", "expected", *words], lambda: matcher.match(ids))


@pytest.mark.parametrize(
    ("states", "words"),
    [
        (np.ones((1, 4, 4), np.float32), ["states have shape [1, 4, 4], expected [B, L, 3]"]),
        (np.ones((4, 3), np.float32), ["states have shape [4, 3], expected [B, L, 3]"]),
        (np.ones((1, 3, 3), np.float32), ["matches reach beyond the states [1, 3, 3]"]),
        (np.ones((0, 4, 3), np.float32), ["matches reach beyond the states [0, 4, 3]"]),
        (np.ones((1, 4, 3), int), ["states are int64, expected floats"]),
        (np.ones((1, 4, 3), bool), ["states are bool, expected floats"]),
        (np.ones((1, 4, 3), complex), ["states are complex128, expected floats"]),
    ],
)
def test_states_that_do_not_fit(states, words):
    residual = Residual(CAT_AND_DOG, "clip_l")
    expect(InputError, words, lambda: residual.apply(states, FIRED))


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), -float("inf"), 1e39, 10**400, None, "1", [1.0]])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_strength_that_is_no_finite_number(strength, by_name):
    residual = Residual(CAT_AND_DOG, "clip_l")
    given = {"dog": strength} if by_name else strength
    words = ["strength of concept 'dog'" if by_name else "strength of concept 'cat'", "expected a finite number"]
    expect(InputError, words, lambda: residual.apply(STATES, FIRED, strength=given))


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([4, 4], ["lengths are int64 [2], expected integers [1]"]),
        (4, ["lengths are int64 [], expected integers [1]"]),
        ([4.0], ["lengths are float64 [1]"]),
        ([None], ["lengths are object [1]"]),
        ([0], ["lengths reach from 0 to 0, outside 1..4"]),
        ([-1], ["lengths reach from -1 to -1, outside 1..4"]),
        ([5], ["lengths reach from 5 to 5, outside 1..4"]),
    ],
)
def test_lengths_that_do_not_fit(lengths, words):
    residual = Residual(CAT_AND_DOG, "clip_l")
    expect(InputError, words, lambda: residual.apply(STATES, FIRED, lengths=lengths))


@pytest.mark.parametrize("use", [Matcher, Residual])
def test_a_stream_that_is_not_there(use):
    expect(InputError, ["<memory>: has no stream 't5'; it has clip_l"], lambda: use(CAT_AND_DOG, "t5"))


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (-1, ["has no concept number -1; it has 2"]),
        (2, ["has no concept number 2; it has 2"]),
        ("cow", ["has no concept 'cow'; it has 'cat', 'dog'"]),
        ("", ["has no concept ''"]),
        ("\x1b[31m", [r"has no concept '\x1b[31m'"]),
        ("dog ", ["has no concept 'dog '"]),
    ],
)
def test_a_concept_that_is_not_there(which, words):
    error = expect(ConceptNotFoundError, words, lambda: CAT_AND_DOG.concept(which))
    assert isinstance(error, KeyError)


# Merging


@pytest.fixture
def ways(tmp_path: Path) -> Callable[..., list[Callable[[], object]]]:
    """Every way to bring adapters together."""

    def build(*adapters: Adapter) -> list[Callable[[], object]]:
        paths = [tmp_path / f"{number}.safetensors" for number in range(len(adapters))]
        for adapter, path in zip(adapters, paths, strict=True):
            adapter.save(path, overwrite=True)
        target = tmp_path / "out.safetensors"
        opened = [Adapter.from_bytes(path.read_bytes(), str(path)) for path in paths]
        return [
            lambda: merge_adapters(opened),
            lambda: find_conflicts(opened),
            lambda: merge_files(paths, target),
        ]

    return build


@pytest.mark.parametrize(
    ("other", "field", "value", "changed"),
    [
        (make_manifest(backbone="sd35"), "backbone", "sd15", "sd35"),
        (make_manifest(base_model="toy/other"), "base_model", "toy/base", "toy/other"),
        (make_manifest(base_fingerprint="ef" * 32), "base_fingerprint", "cd" * 32, "ef" * 32),
        (make_manifest(base_fingerprint=None), "base_fingerprint", "cd" * 32, None),
        (make_manifest(streams={"clip_l": make_spec(4)}), "clip_l.width", 3, 4),
        (
            make_manifest(streams={"clip_l": replace(make_spec(3), site="penultimate")}),
            "clip_l.site", "last_hidden_state", "penultimate",
        ),
        (
            make_manifest(streams={"clip_l": make_spec(3, vocab_size=1001)}),
            "clip_l.tokenizer.vocab_size", 1000, 1001,
        ),
        (
            make_manifest(streams={"clip_l": make_spec(3, fingerprint="0" * 64)}),
            "clip_l.tokenizer.fingerprint", "ab" * 32, "0" * 64,
        ),
    ],
)  # fmt: skip
def test_incompatible_adapters(ways, tmp_path, other, field, value, changed):
    width = other.streams["clip_l"].width
    dog = Concept(
        record=ConceptRecord(name="dog", trigger="the dog", rule="absolute"),
        streams={"clip_l": make_stream((3, 4), width=width)},
    )
    first, second = make_adapter(make_concept("cat", (1, 2)), manifest=MANIFEST), make_adapter(dog, manifest=other)
    names = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    for one, two, a, b in ((first, second, value, changed), (second, first, changed, value)):
        words = [f"{names[0]} and {names[1]} do not merge: {field} is {a!r} in the first and {b!r} in the second"]
        for merge in ways(one, two):
            expect(IncompatibleAdaptersError, words, merge)
    assert not (tmp_path / "out.safetensors").exists()


def test_every_conflict_is_listed(ways, tmp_path):
    first = make_adapter(
        make_concept("cat", (1, 2)),
        make_concept("dog", (3, 4, 5)),
        make_concept("eel", (6, 7, 8), activation="spans"),
    )
    second = make_adapter(
        make_concept("cat", (11, 12)),
        make_concept("hound", (3, 4, 5), seed=1),
        make_concept("fish", (9, 7, 8)),
        make_concept("neutral", (21, 22)),
    )
    one, two = tmp_path / "0.safetensors", tmp_path / "1.safetensors"
    expected = [
        f"'cat' of {one} and 'cat' of {two} share the name 'cat'",
        f"'dog' of {one} and 'hound' of {two} share the trigger [3, 4, 5] of clip_l",
        f"'eel' of {one} and 'fish' of {two} share the span [7, 8] of clip_l",
    ]
    in_memory, found, on_disk = ways(first, second)
    assert [conflict.describe() for conflict in found()] == expected
    for merge in (in_memory, on_disk):
        words = ["3 conflicting pairs of concepts; choose keep-first, keep-last or both (--on-conflict)", *expected]
        error = expect(ConflictError, words, merge)
        assert len(str(error).splitlines()) == 4
        assert [(c.kind, c.first, c.second) for c in error.conflicts] == [
            ("name", "cat", "cat"),
            ("trigger", "dog", "hound"),
            ("span", "eel", "fish"),
        ]
    assert not two.with_name("out.safetensors").exists()


def test_a_name_with_no_room_for_a_mark():
    """`both` marks names that meet; one of 256 characters cannot take a mark."""
    long = "x" * 256
    adapters = [make_adapter(make_concept(long, (1, 2), seed=seed, trigger="the cat")) for seed in (1, 2)]
    words = ["concept name is 'xxx", "1..256 printable characters"]
    expect(InputError, words, lambda: merge_adapters(adapters, on_conflict="both"))


def test_a_record_with_no_room_for_a_mark():
    filler = {"notes": "x" * ((1 << 18) - 160)}
    adapters = [make_adapter(make_concept("cat", (1, 2), seed=seed, training=filler)) for seed in (1, 2)]
    words = ["has a record of", "the limit is 262144"]
    expect(InputError, words, lambda: merge_adapters(adapters, on_conflict="both"))


def test_nothing_to_merge(tmp_path):
    for call in (lambda: merge_adapters([]), lambda: merge_files([], tmp_path / "out"), lambda: find_conflicts([])):
        expect(InputError, ["nothing to merge: give at least one adapter"], call)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", [str, Path])
def test_one_path_is_no_list_of_paths(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    CAT_AND_DOG.save(path)
    words = [f"{path}: is one path; give a list of paths"]
    expect(InputError, words, lambda: merge_files(kind(path), tmp_path / "out"))


def test_an_unknown_way_to_settle_conflicts():
    words = ["on_conflict is 'keep', expected one of error, keep-first, keep-last, both"]
    expect(InputError, words, lambda: merge_adapters([CAT_AND_DOG], on_conflict="keep"))


# Extracting


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        ([], InputError, ["name at least one concept to extract"]),
        ("cat", InputError, ["the text 'cat'; give a list of names"]),
        (["cow"], ConceptNotFoundError, ["has no concept 'cow'; it has 'cat', 'dog'"]),
        (["cat", "dog", "Cat"], ConceptNotFoundError, ["has no concept 'Cat'"]),
        (["\x1b[31m"], ConceptNotFoundError, [r"has no concept '\x1b[31m'"]),
    ],
)
def test_names_that_cannot_be_extracted(tmp_path, names, kind, words):
    path, target = tmp_path / "a.safetensors", tmp_path / "out.safetensors"
    CAT_AND_DOG.save(path)
    expect(kind, ["<memory>: ", *words], lambda: extract_concepts(CAT_AND_DOG, names))
    expect(kind, [f"{path}: ", *words], lambda: extract_file(path, names, target))
    assert not target.exists()


def test_a_missing_name_is_told_with_a_few_of_those_there_are():
    adapter = make_adapter(*(make_concept(f"c{number}", (number, number + 1)) for number in range(0, 100, 10)))
    words = ["has no concept 'cat'; it has 'c0', 'c10', 'c20', 'c30', 'c40' and 5 more"]
    expect(ConceptNotFoundError, words, lambda: extract_concepts(adapter, ["cat"]))


# Triggers


@pytest.mark.parametrize(
    ("trigger", "tokenizer", "words"),
    [
        ("", word_tokenizer(), ["trigger '' gives no token with ToyTokenizer"]),
        ("  \n ", word_tokenizer(), [r"trigger '  \n ' gives no token"]),
        ("!", make_tokenizer(lambda text: []), ["trigger '!' gives no token with ToyTokenizer; use a phrase"]),
        ("cat", word_tokenizer(), ["trigger 'cat' is the single token 0 of ToyTokenizer", "allow single tokens"]),
        (
            "a b",
            make_tokenizer(lambda text: [5, 7], special=[7, 9]),
            ["trigger 'a b' contains special tokens of ToyTokenizer (ids [7]: <7>); use plain words"],
        ),
        (
            "one two three",
            word_tokenizer(max_tokens=2),
            ["trigger 'one two three' has 3 tokens with ToyTokenizer, the encoder reads 2; shorten it"],
        ),
    ],
)
def test_triggers_that_cannot_be_registered(trigger, tokenizer, words):
    error = expect(TriggerError, words, lambda: build_registry(trigger, tokenizer))
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("max_ngram", [1, 0, -7])
def test_spans_have_two_tokens_at_least(max_ngram):
    words = [f"max_ngram is {max_ngram}; spans have at least 2 tokens"]
    expect(InputError, words, lambda: build_registry("one two", word_tokenizer(), max_ngram=max_ngram))
