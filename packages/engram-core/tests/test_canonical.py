"""JSON in one spelling."""

import json

import pytest
from core_builders import law
from hypothesis import given
from hypothesis import strategies as st

from engram_core.canonical import JSON_MAX_BYTES, DuplicateKeyError, dump_canonical, parse_canonical, parse_strict

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=20,
)


@law
@given(JSON)
def test_what_is_dumped_can_be_parsed(value):
    text = dump_canonical(value)
    assert parse_canonical(text) == value
    assert parse_strict(text) == value
    assert dump_canonical(parse_canonical(text)) == text


@law
@given(st.dictionaries(TEXT, st.integers(), min_size=2))
def test_the_order_of_keys_does_not_matter(value):
    backwards = dict(reversed(value.items()))
    assert dump_canonical(backwards) == dump_canonical(value)


@law
@given(JSON)
def test_other_spellings_are_strict_but_not_canonical(value):
    text = dump_canonical(value)
    for other in (b" " + text, text + b"\n", json.dumps(value, indent=1).encode()):
        assert parse_strict(other) == value
        if other != text:
            with pytest.raises(ValueError, match="is not canonical JSON"):
                parse_canonical(other)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"a":1,"b":2,"a":3}', "names the key 'a' twice"),
        (b'{"a":[{"b":1,"b":1}]}', "names the key 'b' twice"),
        (b"[NaN]", "holds NaN"),
        (b"[Infinity]", "holds Infinity"),
        (b"[-Infinity]", "holds -Infinity"),
        (b"[" * 100_000 + b"]" * 100_000, "nests its JSON too deeply"),
        (b"[" * 1000 + b"]" * 1000, "nests its JSON too deeply"),
        (b'"' + b"x" * JSON_MAX_BYTES + b'"', f"has {JSON_MAX_BYTES + 2} bytes of JSON, the limit is {JSON_MAX_BYTES}"),
    ],
)
def test_strict_means_strict(text, said):
    with pytest.raises(ValueError, match=said):
        parse_strict(text)


@pytest.mark.parametrize("text", [b"", b"{", b"nul", b"\xff\xfe", b"'a'", b"[1,]"])
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"."):
        parse_strict(text)


def test_a_key_twice_has_an_error_of_its_own():
    with pytest.raises(DuplicateKeyError):
        parse_strict(b'{"a":1,"a":1}')


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {"a": -float("inf")}])
def test_what_json_cannot_say_is_refused(value):
    with pytest.raises(ValueError, match=r"."):
        dump_canonical(value)


def test_a_lone_surrogate_has_no_canonical_form():
    with pytest.raises(ValueError, match="no canonical form"):
        parse_canonical(b'"\\ud800"')
