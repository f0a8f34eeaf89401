"""What an adapter belongs to."""

from dataclasses import replace

import pytest
from core_builders import make_manifest, make_spec

from engram_core import InputError, Manifest


def test_a_manifest_survives_being_written():
    for manifest in (make_manifest(), make_manifest(base_fingerprint=None)):
        assert Manifest.from_json(manifest.to_json()) == manifest


def test_streams_come_in_name_order():
    manifest = make_manifest({"t5": 5, "clip_l": 3, "clip_g": 4})
    assert list(manifest.streams) == ["clip_g", "clip_l", "t5"]
    with pytest.raises(TypeError):
        manifest.streams["t5"] = manifest.streams["clip_l"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"backbone": "SD15"}, "backbone is 'SD15', expected a lower-case name"),
        ({"backbone": ""}, "backbone is ''"),
        ({"backbone": "sd15\n"}, "backbone is"),
        ({"base_model": ""}, r"base_model\.id is ''"),
        ({"base_model": "a\nb"}, r"base_model\.id is"),
        ({"base_fingerprint": "12"}, r"base_model\.fingerprint is '12', expected null or 64 hexadecimal digits"),
        ({"base_fingerprint": "AB" * 32}, r"base_model\.fingerprint is"),
        ({"streams": {}}, "streams is {}, expected at least one stream"),
        ({"streams": {"Clip": make_spec(3)}}, "streams is 'Clip', expected lower-case stream names"),
        ({"streams": {"a.b": make_spec(3)}}, r"streams is 'a\.b'"),
        ({"streams": {"t5": make_spec(0)}}, r"streams\.t5\.width is 0, expected 1\.\.1048576"),
        ({"streams": {"t5": make_spec(2**20 + 1)}}, r"streams\.t5\.width is 1048577"),
        ({"streams": {"t5": replace(make_spec(3), site="Last")}}, r"streams\.t5\.site is 'Last'"),
        ({"streams": {"t5": make_spec(3, class_name="")}}, r"streams\.t5\.tokenizer\.class is ''"),
        ({"streams": {"t5": make_spec(3, vocab_size=0)}}, r"streams\.t5\.tokenizer\.vocab_size is 0"),
        ({"streams": {"t5": make_spec(3, vocab_size=2**31 + 1)}}, r"tokenizer\.vocab_size is 2147483649"),
        ({"streams": {"t5": make_spec(3, fingerprint="xy" * 32)}}, r"tokenizer\.fingerprint is"),
    ],
)
def test_faults_are_named(fields, said):
    with pytest.raises(InputError, match=said):
        make_manifest(**fields)


def without(value, key):
    return {name: item for name, item in value.items() if name != key}


def test_json_must_have_exactly_the_known_fields():
    good = make_manifest({"t5": 5}).to_json()
    stream = good["streams"]["t5"]
    for broken, said in (
        ([], "manifest is list, expected an object"),
        (without(good, "backbone"), "manifest lacks the field 'backbone'"),
        (good | {"extra": 1}, "manifest has an unknown field 'extra'; known: backbone, base_model, streams"),
        (good | {"backbone": 3}, r"manifest\.backbone has the type int"),
        (good | {"base_model": {"id": "x"}}, "base_model lacks the field 'fingerprint'"),
        (good | {"streams": {"t5": without(stream, "site")}}, r"streams\.t5 lacks the field 'site'"),
        (good | {"streams": {"t5": stream | {"width": True}}}, r"streams\.t5\.width has the type bool"),
        (good | {"streams": {"t5": stream | {"width": 5.0}}}, r"streams\.t5\.width has the type float"),
        (good | {"streams": {"t5": stream | {"tokenizer": {}}}}, r"streams\.t5\.tokenizer lacks the field 'class'"),
    ):
        with pytest.raises(InputError, match=said):
            Manifest.from_json(broken)
