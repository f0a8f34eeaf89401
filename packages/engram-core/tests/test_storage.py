"""Vectors as bits: float32, float16, and bfloat16, which NumPy does not have."""

import numpy as np
import pytest
from core_builders import bits, law
from hypothesis import given
from hypothesis import strategies as st

from engram_core.storage import STORED_TYPES, are_finite, decode_vectors, encode_vectors, widest

WORDS = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


def floats(*words):
    return np.array(words, np.uint32).view(np.float32)


def to_bf16(*words):
    return [int(word) for word in encode_vectors(floats(*words), "bf16")]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        (0x3F800000, 0x3F80),  # 1
        (0x3F808000, 0x3F80),  # halfway to the next, which is odd: down
        (0x3F818000, 0x3F82),  # halfway, this one is odd: up
        (0x3F808001, 0x3F81),  # just above halfway
        (0x3F807FFF, 0x3F80),  # just below
        (0x3FFFFFFF, 0x4000),  # carries into the exponent
        (0x00000000, 0x0000),
        (0x80000000, 0x8000),  # -0
        (0x00000001, 0x0000),  # the smallest subnormal
        (0x00008000, 0x0000),  # halfway between 0 and the smallest bfloat16 subnormal
        (0x00008001, 0x0001),
        (0x00018000, 0x0002),
        (0x7F7F7FFF, 0x7F7F),  # rounds to the largest
        (0x7F7F8000, 0x7F80),  # rounds to infinity
        (0x7F7FFFFF, 0x7F80),
        (0xFF7FFFFF, 0xFF80),
        (0x7F800000, 0x7F80),  # infinity
        (0xFF800000, 0xFF80),
        (0xC0490FDB, 0xC049),  # -pi
    ],
)
def test_bf16_rounds_to_nearest_even(word, expected):
    assert to_bf16(word) == [expected]


@pytest.mark.parametrize("word", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFC00000, 0x7FFF8000])
def test_nan_stays_nan(word):
    for dtype in STORED_TYPES:
        with np.errstate(invalid="ignore"):
            stored = encode_vectors(floats(word), dtype)
        assert not are_finite(stored, dtype)
        assert np.isnan(decode_vectors(stored, dtype)).all()


@law
@given(WORDS)
def test_bf16_rounds_as_torch_does(words):
    torch = pytest.importorskip("torch")
    numbers = floats(*words)
    expected = torch.from_numpy(numbers).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = encode_vectors(numbers, "bf16")
    number = ~np.isnan(numbers)
    assert found[number].tolist() == expected[number].tolist()
    assert np.isnan(decode_vectors(found, "bf16")).tolist() == np.isnan(numbers).tolist()


@law
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_every_bf16_survives_the_way_through_float32(words):
    stored = np.array(words, np.uint16)
    stored = stored[~np.isnan(decode_vectors(stored, "bf16"))]
    assert encode_vectors(decode_vectors(stored, "bf16"), "bf16").tolist() == stored.tolist()


def test_every_float16_survives_the_way_through_float32():
    stored = np.arange(2**16, dtype=np.uint16).view(np.float16)
    stored = stored[~np.isnan(stored)]
    assert bits(encode_vectors(decode_vectors(stored, "f16"), "f16")) == bits(stored)


@law
@given(WORDS)
def test_float32_is_stored_as_it_is(words):
    assert bits(encode_vectors(floats(*words), "f32")) == bits(floats(*words))
    assert bits(decode_vectors(floats(*words), "f32")) == bits(floats(*words))


@law
@given(WORDS, st.sampled_from(sorted(STORED_TYPES)))
def test_finite_is_what_numpy_calls_finite(words, dtype):
    with np.errstate(all="ignore"):
        stored = encode_vectors(floats(*words), dtype)
    assert are_finite(stored, dtype) == bool(np.isfinite(decode_vectors(stored, dtype)).all())


@pytest.mark.parametrize("dtype", sorted(STORED_TYPES))
def test_what_is_stored_is_contiguous_and_of_the_same_shape(dtype):
    matrix = np.asfortranarray(np.arange(12, dtype=np.float32).reshape(3, 4))
    for source in (matrix, matrix.T, matrix[:, ::2], matrix[::-1]):
        stored = encode_vectors(source, dtype)
        assert stored.dtype == STORED_TYPES[dtype]
        assert stored.flags.c_contiguous
        assert decode_vectors(stored, dtype).tolist() == source.tolist()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [({"f32"}, "f32"), ({"f16"}, "f16"), ({"bf16"}, "bf16"), ({"f16", "bf16"}, "f32"), ({"f16", "f32"}, "f32")],
)
def test_the_widest_type_holds_all_exactly(dtypes, expected):
    assert widest(dtypes) == expected
