"""Which frames are taken, how they are cut, and which sizes a model takes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from video_files import moving

from engram_core import InputError
from engram_video.frames import check_frame_count, check_size, fit_frames, sample_indices
from engram_vision.images import fit_square

sides = st.integers(1, 40)


def refusal(function, *args):
    with pytest.raises(InputError) as caught:
        function(*args)
    return str(caught.value)


def test_nine_of_81_as_in_tinyengram():
    assert sample_indices(81, 9) == [0, 10, 20, 30, 40, 50, 60, 70, 80]


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (9, 9, list(range(9))),
        (5, 1, [0]),
        (1, 1, [0]),
        (2, 2, [0, 1]),
        (4, 3, [0, 1, 3]),
        (121, 5, [0, 30, 60, 90, 120]),
    ],
)
def test_frames_are_spread(total, count, expected):
    assert sample_indices(total, count) == expected


@given(total=st.integers(2, 10_000), count=st.integers(2, 200))
def test_frames_are_spread_evenly(total, count):
    count = min(total, count)
    indices = sample_indices(total, count)
    assert (indices[0], indices[-1], len(set(indices))) == (0, total - 1, count)
    steps = np.diff(indices)
    assert steps.max() - steps.min() <= 1
    assert np.abs(np.array(indices) - np.linspace(0, total - 1, count)).max() <= 0.5 + 1e-9


def test_too_few_frames():
    assert refusal(sample_indices, 8, 9) == (
        "the clip has 8 frames, and 9 are to be taken; use longer clips or fewer frames"
    )
    assert refusal(sample_indices, 8, 0) == "frames is 0, expected at least 1 frame of each clip"


@given(width=sides, height=sides, side=sides)
def test_squares_are_cut_as_from_pictures(width, height, side):
    frames = np.random.default_rng(0).integers(0, 256, (2, height, width, 3)).astype(np.uint8)
    expected = np.stack([np.asarray(fit_square(Image.fromarray(frame), side)) for frame in frames])
    assert np.array_equal(fit_frames(frames, side, side), expected)


@given(old_width=sides, old_height=sides, width=sides, height=sides)
def test_any_size_becomes_any_other(old_width, old_height, width, height):
    frames = np.full((2, old_height, old_width, 3), (200, 100, 50), np.uint8)
    found = fit_frames(frames, width, height)
    assert found.shape == (2, height, width, 3)
    assert (found == (200, 100, 50)).all()


def test_the_centre_is_cut_out():
    frames = moving(1, 100, 40)
    for width, height, cut in ((40, 40, np.s_[:, :, 30:70]), (100, 20, np.s_[:, 10:30]), (60, 40, np.s_[:, :, 20:80])):
        assert np.array_equal(fit_frames(frames, width, height), frames[cut])
    assert fit_frames(frames, 100, 40) is frames


def test_frames_in_any_memory_layout():
    frames = moving(2, 60, 40)
    turned = frames.transpose(0, 2, 1, 3)[:, ::-1]
    assert np.array_equal(fit_frames(turned, 10, 20), fit_frames(np.ascontiguousarray(turned), 10, 20))


def test_sizes_below_one():
    assert refusal(fit_frames, moving(1), 0, 4) == "size is 0x4, expected at least 1 pixel a side"


@pytest.mark.parametrize(("count", "factor"), [(1, 4), (5, 4), (81, 4), (121, 4), (3, 2), (1, 1), (2, 1), (9, 8)])
def test_frame_counts_that_are_allowed(count, factor):
    check_frame_count(count, factor)


@pytest.mark.parametrize(
    ("count", "factor", "use"),
    [(10, 4, "9 or 13"), (80, 4, "77 or 81"), (4, 4, "1 or 5"), (2, 2, "1 or 3"), (0, 4, "1 or more"), (-3, 4, "1 or")],
)
def test_frame_counts_that_are_refused(count, factor, use):
    message = refusal(check_frame_count, count, factor)
    assert message.startswith(f"frames is {count}, and the model takes one more than a multiple of {factor} ")
    assert f"; use {use}" in message


@given(count=st.integers(-5, 500), factor=st.integers(1, 16))
def test_advised_frame_counts_are_allowed(count, factor):
    try:
        check_frame_count(count, factor)
    except InputError as error:
        advised = [int(word) for word in str(error).rpartition("use ")[2].split() if word.isdigit()]
        assert advised
        for number in advised:
            check_frame_count(number, factor)


def test_sizes_that_are_allowed():
    check_size(1280, 704, 32)
    check_size(32, 32, 32)


@pytest.mark.parametrize(
    ("width", "height", "expected"),
    [
        (1280, 720, "height is 720, and the model takes multiples of 32; use height 704 or 736"),
        (
            85,
            40,
            "width is 85 and height is 40, and the model takes multiples of 32; use width 64 or 96 and height 32 or 64",
        ),
        (0, 32, "width is 0, and the model takes multiples of 32; use width 32"),
        (31, -32, "width is 31 and height is -32, and the model takes multiples of 32; use width 32 and height 32"),
    ],
)
def test_sizes_that_are_refused(width, height, expected):
    assert refusal(check_size, width, height, 32) == expected
