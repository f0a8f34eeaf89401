"""The warping error; its laws need OpenCV, which is optional."""

import numpy as np
import pytest
from evaluation_builders import fading, moving, still

from engram_core import InputError
from engram_video.evaluation import warping
from engram_video.evaluation.warping import check_flow, has_flow, measure_warping

needs_flow = pytest.mark.skipif(
    not has_flow(), reason="OpenCV is not installed; engram-video's extra `evaluation` brings it"
)


def compare_in_place(clip):
    """Return the mean difference of neighbouring frames."""
    return np.abs(np.diff(clip.astype(np.float64), axis=0)).mean() / 255


@needs_flow
def test_a_clip_that_stands_still_has_none():
    found = measure_warping(still())
    assert (found.error, found.motion, found.coverage) == (0, 0, 1)


@needs_flow
def test_what_moves_is_followed():
    clip = moving()
    found = measure_warping(clip)
    assert 0 < found.error < 0.4 * compare_in_place(clip)
    assert found.coverage > 0.8
    # A quarter of the picture moves by 2 pixels.
    assert found.motion == pytest.approx(2 / 4 / 64, rel=0.5)


@needs_flow
def test_twice_the_speed_is_twice_the_motion():
    slow, fast = (measure_warping(moving(step=step)).motion for step in (1, 2))
    assert fast == pytest.approx(2 * slow, rel=0.3)


@needs_flow
def test_what_flickers_has_a_greater_error_than_what_moves():
    clip = moving()
    light = clip.copy()
    light[1::2] = light[1::2] // 2
    assert measure_warping(light).error > 3 * measure_warping(clip).error


@needs_flow
def test_noise_is_hardly_compared():
    noise = np.random.default_rng(1).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    assert measure_warping(noise).coverage < 0.7 * measure_warping(moving()).coverage
    assert measure_warping(fading()).error > 0


@needs_flow
def test_the_same_clip_has_the_same_figures_twice():
    assert measure_warping(moving()) == measure_warping(moving())


@needs_flow
def test_a_single_frame_has_no_neighbours():
    assert measure_warping(still(1)) is None


@needs_flow
def test_frames_that_are_too_small_are_refused():
    with pytest.raises(InputError, match="frames are 10x8, and optical flow needs 12 pixels a side"):
        measure_warping(np.zeros((2, 8, 10, 3), np.uint8))


def test_without_the_library_the_remedy_is_told(monkeypatch):
    def fail():
        raise ImportError

    monkeypatch.setattr(warping, "_library", fail)
    assert not has_flow()
    with pytest.raises(InputError, match=r"needs OpenCV, which is not installed; .* opencv-python-headless 4\.10"):
        check_flow()
