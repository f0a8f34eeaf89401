"""What a concept says of itself, and the identity of what it holds."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from core_builders import ACTIVATIONS, DTYPES, OVERLAPS, RULES, concepts, law, make_concept, with_record
from hypothesis import given
from hypothesis import strategies as st

from engram_core import ConceptRecord, InputError

NAMES = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text('aé\n"\\🙂'),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
RECORDS = st.builds(
    ConceptRecord,
    name=NAMES,
    trigger=NAMES,
    rule=st.sampled_from(RULES),
    overlap=st.sampled_from(OVERLAPS),
    activation=st.sampled_from(ACTIVATIONS),
    max_ngram=st.integers(2, 100),
    dtype=st.sampled_from(DTYPES),
    training=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), JSON, max_size=3),
    license=st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
)


@law
@given(RECORDS)
def test_a_record_survives_being_written(record):
    text = record.to_bytes()
    read = ConceptRecord.from_bytes(text)
    assert read == record
    assert read.to_bytes() == text


@law
@given(RECORDS)
def test_records_begin_with_the_activation(record):
    # Readers look at one byte of each record to tell the two activations apart.
    assert record.to_bytes()[: len('{"activation":"') + 1] == f'{{"activation":"{record.activation[0]}'.encode()


def record(**fields):
    return ConceptRecord(**{"name": "cat", "trigger": "the cat", "rule": "absolute"} | fields)


def test_defaults_are_the_documented_ones():
    plain = record()
    assert (plain.activation, plain.overlap, plain.max_ngram, plain.dtype) == ("anchored", "sum", 7, "f32")
    assert (plain.training, plain.license) == ({}, None)


@pytest.mark.parametrize("field", ["name", "trigger"])
@pytest.mark.parametrize("value", ["", " cat", "cat ", "a\nb", "a\tb", "a\x1b[31m", "x" * 257, "\u202ecat", "\ud800"])
def test_names_and_triggers_are_printable(field, value):
    with pytest.raises(InputError, match=f"concept {field} is .*, expected 1..256 printable characters"):
        record(**{field: value})


@pytest.mark.parametrize("value", ["x" * 256, "the cat", "日本の犬", "é", "🙂", "a~1", "'\"\\"])
def test_any_script_is_a_name(value):
    assert ConceptRecord.from_bytes(record(name=value, trigger=value).to_bytes()).name == value


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("rule", "absolute, absolute-tanh, relative"),
        ("overlap", "sum, mean"),
        ("activation", "anchored, spans"),
        ("dtype", "f32, f16, bf16"),
    ],
)
def test_choices_are_listed_when_missed(field, known):
    with pytest.raises(InputError, match=f"concept 'cat': {field} is 'other', expected one of {known}$"):
        record(**{field: "other"})


@pytest.mark.parametrize("value", [1, 0, -7])
def test_spans_have_at_least_two_tokens(value):
    with pytest.raises(InputError, match=f"concept 'cat': max_ngram is {value}, expected at least 2"):
        record(max_ngram=value)


@pytest.mark.parametrize(
    "training", [{"x": float("nan")}, {"x": float("inf")}, {"x": object()}, {"x": b"x"}, {1: 2, "a": 3}]
)
def test_training_must_be_json(training):
    with pytest.raises(InputError, match="concept 'cat' cannot be written as JSON"):
        record(training=training).to_bytes()


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b'{"name":"cat"}',
        record().to_bytes() + b" ",
        record().to_bytes().replace(b'"license":null', b'"license":3'),
        record().to_bytes().replace(b'"max_ngram":7', b'"max_ngram":true'),
        record().to_bytes().replace(b'"max_ngram":7', b'"max_ngram":7.0'),
        record().to_bytes().replace(b'"name"', b'"nome"'),
        record().to_bytes().replace(b'"training":{}', b'"training":[]'),
        record().to_bytes().replace(b'"rule":"absolute"', b'"rule":"other"'),
        record().to_bytes().replace(b'"overlap":"sum"', b'"overlap":"sum","overlap":"sum"'),
        b"\xff" + record().to_bytes(),
    ],
)
def test_malformed_records_are_value_errors(text):
    with pytest.raises(ValueError, match=r"."):
        ConceptRecord.from_bytes(text)


def test_records_are_frozen():
    with pytest.raises(FrozenInstanceError):
        record().name = "dog"


# Digests


@law
@given(concepts("cat"))
def test_the_name_is_no_part_of_the_digest(concept):
    assert concept.renamed("dog").digest() == concept.digest()
    assert concept.renamed("dog").name == "dog"
    assert concept.renamed("cat").record == concept.record


@pytest.mark.parametrize(
    "fields",
    [
        {"trigger": "another cat"},
        {"rule": "relative"},
        {"overlap": "mean"},
        {"activation": "spans"},
        {"max_ngram": 3},
        {"dtype": "f16"},
        {"training": {"steps": 1}},
        {"license": "MIT"},
    ],
)
def test_everything_else_in_the_record_is(fields):
    concept = make_concept("cat", (1, 2, 3))
    assert with_record(concept, **fields).digest() != concept.digest()


def change(concept, **fields):
    return replace(concept, streams={"clip_l": replace(concept.streams["clip_l"], **fields)})


def test_every_number_in_the_streams_is():
    concept = make_concept("cat", (1, 2, 3), vectors=np.zeros((3, 3)), scales=np.zeros(3))
    stream = concept.streams["clip_l"]
    vectors, scales = stream.vectors.copy(), stream.scales.copy()
    vectors[2, 2] = scales[1] = -0.0
    others = [
        change(concept, vectors=vectors),
        change(concept, scales=scales),
        change(concept, triggers=((1, 2, 4),)),
        change(concept, entries=((1, 2), (1, 2, 3), (2, 4))),
        replace(concept, streams={"t5": stream}),
        replace(concept, streams={"clip_l": stream, "t5": stream}),
    ]
    digests = {each.digest() for each in [concept, *others]}
    assert len(digests) == 1 + len(others)


def test_the_digest_sees_vectors_as_they_are_stored():
    concept = make_concept("cat", (1, 2), vectors=[[1, 2, 3]], dtype="bf16")
    nudged = change(concept, vectors=concept.streams["clip_l"].vectors + np.float32(1e-5))
    assert nudged.digest() == concept.digest()
    assert with_record(nudged, dtype="f32").digest() != with_record(concept, dtype="f32").digest()
