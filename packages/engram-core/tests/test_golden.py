"""One small adapter, byte for byte: whoever changes these bytes changes the file format.

The file was written by `build` below and is never written again.
"""

import hashlib
from pathlib import Path

import numpy as np
from core_builders import stored

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    Matcher,
    StreamSpec,
    TokenizerSpec,
    merge_adapters,
    open_adapter,
)

GOLDEN = Path(__file__).parent / "golden" / "two_concepts.safetensors"
SHA256 = "65e6faedacd594fb866536bf9c2370b33dd9084d4d52c77c86d1e8583ba78c19"


def concepts():
    """Two concepts made of small integers, which every type holds exactly."""
    cat = Concept(
        record=ConceptRecord(
            name="cat",
            trigger="Zorp the cat",
            rule="relative",
            overlap="mean",
            training={"steps": 7, "tags": ["a", "é"]},
            license="CC0-1.0",
        ),
        streams={
            "clip_l": ConceptStream(
                triggers=((11, 12, 13), (21, 12, 13)),
                entries=((11, 12), (12, 13), (21, 12), (11, 12, 13), (21, 12, 13)),
                vectors=np.arange(20, dtype=np.float32).reshape(5, 4) - 10,
                scales=np.array([1, 2, -3, 0], np.float32),
            )
        },
    )
    dog = Concept(
        record=ConceptRecord(
            name="dog", trigger="日本の犬", rule="absolute-tanh", activation="spans", max_ngram=2, dtype="bf16"
        ),
        streams={
            "clip_l": ConceptStream(
                triggers=((5, 6),),
                entries=((5, 6),),
                vectors=np.array([[3, -4, 0, 128]], np.float32),
                scales=np.array([1, 1, 1, 1], np.float32),
            ),
            "t5": ConceptStream(
                triggers=((32000, 7, 8),),
                entries=((32000, 7), (7, 8), (32000, 7, 8)),
                vectors=np.arange(6, dtype=np.float32).reshape(3, 2),
                scales=np.array([-1, 8], np.float32),
            ),
        },
    )
    return [cat, dog]


def manifest():
    tokenizers = {
        "clip_l": TokenizerSpec(class_name="CLIPTokenizer", vocab_size=49408, fingerprint="0123456789abcdef" * 4),
        "t5": TokenizerSpec(class_name="T5Tokenizer", vocab_size=32100, fingerprint="fedcba9876543210" * 4),
    }
    widths = {"clip_l": 4, "t5": 2}
    sites = {"clip_l": "penultimate_hidden_state", "t5": "last_hidden_state"}
    return Manifest(
        backbone="sd35",
        base_model="example/base-model",
        base_fingerprint="00ff" * 16,
        streams={n: StreamSpec(width=widths[n], site=sites[n], tokenizer=tokenizers[n]) for n in widths},
    )


def build():
    return Adapter.build(manifest(), concepts())


def test_the_golden_file_is_the_one_meant():
    assert hashlib.sha256(GOLDEN.read_bytes()).hexdigest() == SHA256


def test_building_gives_exactly_the_golden_bytes():
    assert build().to_bytes() == GOLDEN.read_bytes()
    assert build().identity() == SHA256


def test_merging_gives_exactly_the_golden_bytes():
    cat, dog = (Adapter.build(manifest(), [concept]) for concept in concepts())
    assert merge_adapters([dog, cat]).to_bytes() == GOLDEN.read_bytes()


def test_reading_gives_exactly_what_was_written():
    adapter = open_adapter(GOLDEN)
    adapter.check()
    assert adapter.manifest == manifest()
    assert [stored(concept) for concept in adapter.concepts()] == [stored(concept) for concept in concepts()]
    assert adapter.identity() == SHA256


def test_the_columns_lie_where_the_format_says():
    adapter = open_adapter(GOLDEN)
    clip, t5 = adapter.streams["clip_l"], adapter.streams["t5"]
    assert clip.ids.tolist() == [11, 12, 12, 13, 21, 12, 11, 12, 13, 21, 12, 13, 5, 6]
    assert clip.offsets.tolist() == [0, 2, 4, 6, 9, 12, 14]
    assert clip.concept.tolist() == [0, 0, 0, 0, 0, 1]
    assert clip.trigger_ids.tolist() == [11, 12, 13, 21, 12, 13, 5, 6]
    assert clip.trigger_offsets.tolist() == [0, 3, 6, 8]
    assert clip.trigger_concept.tolist() == [0, 0, 1]
    assert clip.dtype == "f32"
    assert clip.vectors.tolist() == [*(np.arange(20).reshape(5, 4) - 10).tolist(), [3, -4, 0, 128]]
    assert clip.scales.tolist() == [[1, 2, -3, 0], [1, 1, 1, 1]]
    assert t5.dtype == "bf16"
    assert t5.ids.tolist() == [7, 8, 32000, 7, 32000, 7, 8]
    assert t5.vectors.tolist() == [[0x4000, 0x4040], [0x0000, 0x3F80], [0x4080, 0x40A0]]  # 2 3, 0 1, 4 5
    assert t5.scales.tolist() == [[0, 0], [-1, 8]]
    assert t5.concept.tolist() == [1, 1, 1]


def test_the_header_and_records_are_these_texts():
    data = GOLDEN.read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert data[8 : 8 + length].startswith(
        b'{"__metadata__":{"format":"engram","format_version":"1","kind":"concept-table"'
    )
    adapter = open_adapter(GOLDEN)
    assert adapter.record_text(0).decode() == (
        '{"activation":"anchored","dtype":"f32","license":"CC0-1.0","max_ngram":7,"name":"cat","overlap":"mean",'
        '"rule":"relative","training":{"steps":7,"tags":["a","é"]},"trigger":"Zorp the cat"}'
    )
    assert adapter.record_text(1).decode() == (
        '{"activation":"spans","dtype":"bf16","license":null,"max_ngram":2,"name":"dog","overlap":"sum",'
        '"rule":"absolute-tanh","training":{},"trigger":"日本の犬"}'
    )


def test_the_golden_concepts_fire():
    adapter = open_adapter(GOLDEN)
    names = adapter.names()
    fired = Matcher(adapter, "clip_l").match([[0, 21, 12, 13], [11, 12, 0, 5], [0, 5, 6, 0]])
    assert [(row, names[concept]) for row, concept in zip(fired.row, fired.concept, strict=True)] == [
        (0, "cat"),
        (0, "cat"),
        (0, "cat"),
        (2, "dog"),
    ]
    assert Matcher(adapter, "t5").match([7, 8]).concepts() == [1]
