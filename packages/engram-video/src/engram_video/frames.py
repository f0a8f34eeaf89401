"""Which frames of a clip are learned from, and which sizes and lengths a model takes. Importing this imports no torch.

Shapes: F frames, H height, W width; frames uint8 [F, H, W, 3], RGB.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from engram_core import InputError

__all__ = ["check_frame_count", "check_size", "fit_frames", "sample_indices"]

Pixels = npt.NDArray[np.uint8]


def sample_indices(total: int, count: int) -> list[int]:
    """Return which frames stand for a clip: evenly spread, the first and the last among them.

    TinyEngram learns Wan from 9 frames that are uniformly sampled from clips of 81 (its report): 0, 10, 20 to 80.
    Where the even place is half-way between two frames, the earlier one is taken.

    Args:
        total: frames of the clip.
        count: frames to take; of one frame, the first.

    Raises:
        InputError: the clip has fewer frames than are to be taken, or none is to be taken.
    """
    if count < 1:
        raise InputError(f"frames is {count}, expected at least 1 frame of each clip")
    if total < count:
        raise InputError(f"the clip has {total} frames, and {count} are to be taken; use longer clips or fewer frames")
    if count == 1:
        return [0]
    # The nearest whole number in integers: one half up in floats would depend on their rounding.
    return [(2 * number * (total - 1) + count - 2) // (2 * (count - 1)) for number in range(count)]


def fit_frames(frames: Pixels, width: int, height: int) -> Pixels:
    """Return frames of a size, uint8 [F, height, width, 3].

    Each is resized with the Lanczos filter until it just covers the size, and its centre is cut out: what
    `engram_vision.images.fit_square` does for squares. Smaller frames are enlarged.

    Args:
        frames: uint8 [F, H, W, 3].
        width: pixels.
        height: pixels.

    Raises:
        InputError: a size below 1.
    """
    if min(width, height) < 1:
        raise InputError(f"size is {width}x{height}, expected at least 1 pixel a side")
    if frames.shape[1:3] == (height, width):
        return frames
    box = _find_box(frames.shape[2], frames.shape[1], width, height)
    images = (Image.fromarray(np.ascontiguousarray(frame)) for frame in frames)
    return np.stack([np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box)) for image in images])


def check_frame_count(count: int, factor: int) -> None:
    """Refuse a number of frames that an autoencoder cannot encode without loss.

    It keeps the first frame and packs the others in groups, so it takes one more than a multiple of their size.

    Args:
        count: frames.
        factor: frames of a group, e.g. 4 for Wan.

    Raises:
        InputError: the message names the nearest numbers that are allowed.
    """
    if count >= 1 and count % factor == 1 % factor:
        return
    below = (count - 1) // factor * factor + 1
    nearest = f"{below} or {below + factor}" if below >= 1 else "1 or more"
    raise InputError(
        f"frames is {count}, and the model takes one more than a multiple of {factor} (the first frame, then groups "
        f"of {factor}); use {nearest}"
    )


def check_size(width: int, height: int, multiple: int) -> None:
    """Refuse a size that a model cannot draw.

    Args:
        width: pixels.
        height: pixels.
        multiple: what each must be a multiple of: pixels of a latent times latents of a token.

    Raises:
        InputError: the message names the nearest sizes that are allowed.
    """
    wrong = {name: side for name, side in (("width", width), ("height", height)) if side < 1 or side % multiple}
    if not wrong:
        return
    facts = " and ".join(f"{name} is {side}" for name, side in wrong.items())
    uses = " and ".join(f"{name} {_near(side, multiple)}" for name, side in wrong.items())
    raise InputError(f"{facts}, and the model takes multiples of {multiple}; use {uses}")


def _near(side: int, multiple: int) -> str:
    below = side // multiple * multiple
    return f"{below} or {below + multiple}" if below >= multiple else f"{multiple}"


def _find_box(old_width: int, old_height: int, width: int, height: int) -> tuple[float, float, float, float]:
    """Return the part of a frame that is kept: (left, top, right, bottom)."""
    # The sizes and offsets are those of torchvision's Resize and CenterCrop, as for pictures.
    if width * old_height >= height * old_width:
        resized = (width, max(height, int(width * old_height / old_width)))
    else:
        resized = (max(width, int(height * old_width / old_height)), height)
    left, top = round(0.5 * (resized[0] - width)), round(0.5 * (resized[1] - height))
    across, down = old_width / resized[0], old_height / resized[1]
    return left * across, top * down, (left + width) * across, (top + height) * down
