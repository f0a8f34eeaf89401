"""The two ways of hashing: the published one, and engram-peft's, with ids beyond the compressed vocabulary."""

import numpy as np
import pytest

from engram_core import (
    AdapterFormatError,
    HashedMemory,
    InputError,
    Manifest,
    MemoryRecord,
    MemorySettings,
    NgramHash,
    StreamSpec,
    TokenizerSpec,
)

COMMON = {
    "engram_vocab_size": (31, 23),
    "max_ngram_size": 3,
    "n_head_per_ngram": 2,
    "layer_ids": (1, 4),
    "compressed_vocab_size": 20,
    "compressed_pad_id": 3,
}
SHAPE = {
    "engram_vocab_size": (11, 7),
    "max_ngram_size": 3,
    "n_embed_per_ngram": 2,
    "n_head_per_ngram": 1,
    "layer_ids": (1,),
    "kernel_size": 1,
    "dilation": 1,
    "pad_id": 0,
}


def build(settings, lookup):
    primes = settings.hash(1, 0).primes
    tensors = {
        layer: {name: ("f32", np.ones(shape, np.float32)) for name, shape in settings.shapes(4, int(p.sum())).items()}
        for layer, p in primes.items()
    }
    tokenizer = TokenizerSpec(class_name="T", vocab_size=len(lookup), fingerprint="ab" * 32)
    stream = StreamSpec(width=4, site="decoder_layer_input", tokenizer=tokenizer)
    manifest = Manifest(backbone="qwen3", base_model="x", streams={"text": stream})
    return HashedMemory.build(manifest, MemoryRecord(name="m", settings=settings), np.array(lookup), tensors)


def test_the_oldest_token_may_come_first():
    """By hand: multipliers go to the three newest tokens from the oldest on, and 2-grams take the first two."""
    hashed = NgramHash(**COMMON, oldest_first=True)
    ids = [5, 19, 0, 7]
    padded = [3, 3, *ids]
    for layer in (1, 4):
        a, b, c = (int(value) for value in hashed.multipliers[layer])
        (two, three), found = hashed.primes[layer], hashed.addresses([ids], layer)[0]
        for place in range(len(ids)):
            window = padded[place : place + 3]
            pair = window[0] * a ^ window[1] * b
            triple = pair ^ window[2] * c
            expected = [pair % int(p) for p in two] + [triple % int(p) for p in three]
            assert found[place].tolist() == expected
    assert not np.array_equal(hashed.addresses([ids], 1), NgramHash(**COMMON).addresses([ids], 1))


def test_ids_may_lie_beyond_the_compressed_vocabulary():
    wide = NgramHash(**COMMON | {"compressed_pad_id": 24}, n_ids=25)
    assert all(np.array_equal(wide.multipliers[n], NgramHash(**COMMON).multipliers[n]) for n in (1, 4))
    assert wide.addresses([[24, 0]], 1).shape == (1, 2, 4)
    with pytest.raises(InputError, match=r"outside 0\.\.24"):
        wide.addresses([[25]], 1)
    with pytest.raises(InputError, match=r"compressed_pad_id 25 is outside 0\.\.24"):
        NgramHash(**COMMON | {"compressed_pad_id": 25}, n_ids=25)


def test_a_memory_keeps_its_way_of_hashing():
    lookup = [0, 1, 1, 2, 6, 5, 4]
    memory = HashedMemory.from_bytes(build(MemorySettings(**SHAPE, hashing="engram-peft"), lookup).to_bytes())
    assert memory.settings.hashing == "engram-peft"
    assert memory.lookup.tolist() == lookup
    hashed = memory.hash
    assert (hashed.compressed_vocab_size, hashed.n_ids, hashed.oldest_first) == (3, 7, True)
    assert b'"hashing":"engram-peft"' in memory.to_bytes().replace(b"\\", b"")


def test_the_published_way_is_not_spelled_out():
    memory = build(MemorySettings(**SHAPE), [0, 1, 2])
    assert b"hashing" not in memory.to_bytes()
    assert (memory.hash.oldest_first, memory.hash.n_ids) == (False, None)
    with pytest.raises(InputError, match="hashing"):
        MemorySettings.from_json(memory.settings.to_json() | {"hashing": "published"})
    with pytest.raises(InputError, match="hashing is 'other', expected one of published, engram-peft"):
        MemorySettings(**SHAPE, hashing="other")
    with pytest.raises(AdapterFormatError, match="is not a map onto 0, 1, 2"):
        _ = build(MemorySettings(**SHAPE), [0, 1, 3, 3]).lookup


def test_ids_are_never_beyond_the_vocabulary():
    for lookup in ([0, 1, 4], [1, 2, 1]):
        with pytest.raises(AdapterFormatError, match=r"lookup: does not map to 0 \.\. 2, 0 among them"):
            _ = build(MemorySettings(**SHAPE, hashing="engram-peft"), lookup).lookup
