"""Reading and writing clips with FFmpeg, through PyAV. Importing this imports no torch.

Shapes: F frames, H height, W width; frames uint8 [F, H, W, 3], RGB.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from engram_core import InputError
from engram_core.container import open_target, write_all
from engram_video.containers import SUFFIXES
from engram_video.decoding import CONVERSION, MAX_SIDE, open_clip, tell_reason
from engram_video.frames import fit_frames
from engram_vision.images import show_path

__all__ = ["MAX_SIDE", "SUFFIXES", "Clip", "ClipInfo", "probe_clip", "read_clip", "read_facts", "write_clip"]

_MOST_BYTES = 1 << 32  # of frames held at once: thirteen times 121 frames of 1280x704
_QUALITY = "12"  # x264's constant rate factor: differences cannot be seen, and a memory may be trained from the file
_COMMENT = "comment"

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipInfo:
    """What a clip is; every frame was decoded to find it.

    Attributes:
        frames: F.
        fps: frames a second.
        width: W, in pixels as shown, so after turning upright.
        height: H.
        duration: seconds.
    """

    frames: int
    fps: float
    width: int
    height: int
    duration: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """Frames of a clip.

    Attributes:
        frames: uint8 [F, H, W, 3], RGB.
        fps: frames a second of the file, whichever frames of it these are.
    """

    frames: Pixels
    fps: float


def probe_clip(path: Path) -> ClipInfo:
    """Decode a clip in full, keeping no frame, and tell what it is.

    Frames are counted, since what files say of their number is sometimes wrong.

    Args:
        path: the file; see `SUFFIXES` for the formats, and the content alone decides.

    Raises:
        InputError: the file cannot be read, is no clip, holds no video, is cut off, damaged or encrypted, has high
            dynamic range, is larger than `MAX_SIDE`, or shows its frames at uneven times.
    """
    with open_clip(path) as source:
        width = height = 0
        for frame in source.decode():
            width, height = source.shown_size(frame)
        frames, fps = source.clock.frames, source.fps
    return ClipInfo(frames=frames, fps=fps, width=width, height=height, duration=frames / fps)


def read_clip(path: Path, *, frames: Sequence[int] | None = None, size: tuple[int, int] | None = None) -> Clip:
    """Decode a clip and return its frames, or some of them.

    They are turned upright, and pixels that are not square are made so. Transparency is dropped, not shown on a
    colour.

    The file is decoded to its end, so damage anywhere is noticed, but only what is returned is held in memory.

    Args:
        path: the file; see `SUFFIXES` for the formats, and the content alone decides.
        frames: indices of the wanted frames, from 0, in any order; all by default.
        size: (width, height) to which each frame is resized and cut, see `engram_video.frames.fit_frames`.

    Raises:
        InputError: as for `probe_clip`; also an index that the clip does not have, or more than 4 GiB of frames.
    """
    wanted = None if frames is None else set(frames)
    if wanted is not None and (not wanted or min(wanted) < 0):
        raise InputError(f"{show_path(path)}: frames are {list(frames or ())}, expected indices from 0, at least one")
    kept: dict[int, Pixels] = {}
    with open_clip(path) as source:
        for number, frame in enumerate(source.decode()):
            if wanted is None or number in wanted:
                pixels = source.to_pixels(frame)
                kept[number] = pixels if size is None else fit_frames(pixels[None], *size)[0]
                if kept[number].nbytes * len(kept) > _MOST_BYTES:
                    raise InputError(
                        f"{source.where}: its frames of {pixels.shape[1]}x{pixels.shape[0]} need more than "
                        f"{_MOST_BYTES >> 30} GiB of memory; cut or scale the clip down"
                    )
        count, fps = source.clock.frames, source.fps
    if frames is None:
        frames = range(count)
    elif max(frames) >= count:
        raise InputError(f"{show_path(path)}: has {count} frames, and frame {max(frames)} was asked for, from 0")
    return Clip(frames=np.stack([kept[number] for number in frames]), fps=fps)


def write_clip(
    path: Path,
    frames: Pixels,
    fps: float | Fraction,
    *,
    overwrite: bool = False,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a clip as MP4; it appears whole or not at all.

    H.264 in 4:2:0, BT.709, with its index at the front: what browsers and QuickTime play while they load. The same
    frames and facts give the same bytes, as long as PyAV brings the same x264. What is lost cannot be seen.

    Odd sizes are refused, not padded: the frames read back would have another size than those written.

    Args:
        path: the file.
        frames: uint8 [F, H, W, 3], RGB; H and W even.
        fps: frames a second.
        overwrite: replace a file of that name.
        facts: texts by name that are kept in the file, as a JSON object in its comment; see `read_facts`.

    Raises:
        InputError: frames or their rate cannot be written.
        TargetExistsError: the file exists and `overwrite` is false.
        AdapterWriteError: the file cannot be written.
    """
    rate = _check_frames(frames, fps)
    comment = json.dumps(dict(facts), ensure_ascii=False) if facts else ""
    try:
        comment.encode()
    except UnicodeEncodeError:
        raise InputError(f"{show_path(path)}: its facts hold half a character: {comment!r:.120}; remove it") from None
    # FFmpeg puts the index to the front by opening its output by name again, hence a file of its own.
    with open_target(path, overwrite=overwrite) as target, tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "clip.mp4"
        try:
            _encode(file, frames, rate, comment)
        except av.FFmpegError as error:
            if isinstance(error, OSError):
                raise
            raise InputError(f"{show_path(path)}: the clip cannot be encoded: {tell_reason(error)}") from None
        write_all(target, memoryview(file.read_bytes()))


def read_facts(path: Path) -> dict[str, str]:
    """Return what `write_clip` was told about a clip; empty for clips of other origin.

    Raises:
        InputError: the file cannot be read, or is no clip.
    """
    with open_clip(path) as source:
        comment = source.container.metadata.get(_COMMENT, "")
    try:
        facts = json.loads(comment)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(facts, dict):
        return {}
    return {name: text for name, text in facts.items() if isinstance(text, str)}


def _check_frames(frames: Pixels, fps: float | Fraction) -> Fraction:
    """Return the rate of a clip that can be written."""
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise InputError(f"frames are {frames.dtype} {list(frames.shape)}, expected uint8 [F, H, W, 3]")
    count, height, width, _ = frames.shape
    if not count:
        raise InputError("frames are none, expected at least 1")
    if width % 2 or height % 2 or not width or not height:
        raise InputError(
            f"frames are {width}x{height}, and H.264 in 4:2:0 takes even sizes from 2x2 only; "
            f"cut them to {width - width % 2 or 2}x{height - height % 2 or 2}"
        )
    if max(width, height) > MAX_SIDE:
        raise InputError(f"frames are {width}x{height}, at most {MAX_SIDE} pixels a side can be written")
    if not 0.1 <= fps <= 1000:
        raise InputError(f"fps is {fps}, expected 0.1 to 1000 frames a second")
    return Fraction(fps).limit_denominator(1001)  # of 30000/1001, the rate of television in America


def _encode(file: Path, frames: Pixels, rate: Fraction, comment: str) -> None:
    # `bitexact` leaves out the versions of libraries; one thread, since x264 does other work with several.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(file), "w", format="mp4", options=options) as container:
        if comment:
            container.metadata[_COMMENT] = comment
        # Macroblock trees of small frames depend on what the memory held before.
        wanted = {"crf": _QUALITY, "preset": "medium", "x264-params": "mbtree=0"}
        stream = container.add_stream("libx264", rate=rate, options=wanted)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        context = stream.codec_context
        context.thread_count = 1
        # Said, because players guess from the size what is not said.
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for number, pixels in enumerate(frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                interpolation=CONVERSION,
            )
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
