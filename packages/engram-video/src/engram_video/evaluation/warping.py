"""How well a clip hangs together: its frames warped onto one another by optical flow, an optional extra.

Shapes: F frames, H height, W width; frames uint8 [F, H, W, 3], flow float32 [H, W, 2] in pixels, x before y.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import InputError

__all__ = ["Warping", "check_flow", "has_flow", "measure_warping"]

_EXTRA = "evaluation"
_SMALLEST = 12  # pixels a side: the flow compares patches of 8
# Where going there and coming back ends elsewhere, something was hidden (Sundaram, Brox and Keutzer, 2010, eq. 5).
_RELATIVE, _ABSOLUTE = 0.01, 0.5

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Warping:
    """What a clip's neighbouring frames have in common.

    Attributes:
        error: mean absolute difference between each frame and the next one warped back to it, over the pixels that can
            be seen in both, in 0..1; None where there are none.
        motion: mean length of the flow, in sides of the frame's longer side a frame: tells a calm clip from a still.
        coverage: share of pixels that could be compared.
    """

    error: float | None
    motion: float
    coverage: float


def has_flow() -> bool:
    """Tell whether the library for optical flow is installed."""
    try:
        _library()
    except ImportError:
        return False
    return True


def check_flow() -> None:
    """Refuse to go on without the library.

    Raises:
        InputError: it is not installed.
    """
    if not has_flow():
        raise InputError(
            "the warping error needs OpenCV, which is not installed; in a checkout of engram's repository run "
            f"`uv sync --all-packages --extra {_EXTRA}`, or install opencv-python-headless 4.10 or later"
        )


def measure_warping(frames: Pixels) -> Warping | None:
    """Return how frames hang together; None of less than two.

    Optical flow is dense inverse search (Kroeger et al., 2016) in both directions, as OpenCV has it. Pixels that flow
    out of the picture, or that do not come back to where they were, count as hidden and are left out, so the error must
    be read together with the coverage: noise has no flow to speak of, and little of it is compared.

    Args:
        frames: uint8 [F, H, W, 3]; H and W at least 12.

    Raises:
        InputError: frames are too small, or the library is not installed.
    """
    if len(frames) < 2:
        return None
    check_flow()
    if min(frames.shape[1:3]) < _SMALLEST:
        raise InputError(
            f"frames are {frames.shape[2]}x{frames.shape[1]}, and optical flow needs {_SMALLEST} pixels a side; "
            "leave the warping error out (--no-warping)"
        )
    library = _library()
    search = library.DISOpticalFlow_create(library.DISOPTICAL_FLOW_PRESET_MEDIUM)
    greys = [library.cvtColor(np.ascontiguousarray(frame), library.COLOR_RGB2GRAY) for frame in frames]
    lost, compared, ways = 0.0, 0, 0.0
    for number in range(len(frames) - 1):
        there: Floats = search.calc(greys[number], greys[number + 1], None)
        back: Floats = search.calc(greys[number + 1], greys[number], None)
        warped, visible = _warp(frames[number + 1], there, back)
        difference = np.abs(warped - frames[number].astype(np.float32)).mean(axis=-1) / 255
        lost += float(difference[visible].sum(dtype=np.float64))
        compared += int(visible.sum())
        ways += float(np.linalg.norm(there, axis=-1).mean(dtype=np.float64))
    pairs = len(frames) - 1
    return Warping(
        error=lost / compared if compared else None,
        motion=ways / pairs / max(frames.shape[1:3]),
        coverage=compared / (pairs * frames.shape[1] * frames.shape[2]),
    )


def _warp(frame: Pixels, there: Floats, back: Floats) -> tuple[Floats, Flags]:
    """Return the next frame at the places to which a frame's pixels go, and which of these can be compared.

    Args:
        frame: the next one, uint8 [H, W, 3].
        there: from the frame to the next one.
        back: from the next one to the frame.
    """
    library = _library()
    height, width = there.shape[:2]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    to_x, to_y = x + there[..., 0], y + there[..., 1]
    warped = _sample(library, frame.astype(np.float32), to_x, to_y)
    returned = _sample(library, back, to_x, to_y)
    gap = np.square(there + returned).sum(axis=-1)
    allowed = _RELATIVE * (np.square(there).sum(axis=-1) + np.square(returned).sum(axis=-1)) + _ABSOLUTE
    inside = (to_x >= 0) & (to_x <= width - 1) & (to_y >= 0) & (to_y <= height - 1)
    return warped, inside & (gap < allowed)


def _sample(library: Any, values: Floats, x: Floats, y: Floats) -> Floats:
    found: Floats = library.remap(values, x, y, library.INTER_LINEAR, borderMode=library.BORDER_REPLICATE)
    return found


@cache
def _library() -> Any:
    return importlib.import_module("cv2")
