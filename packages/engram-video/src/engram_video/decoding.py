"""Opening clips with FFmpeg, through PyAV, and decoding their frames one by one.

Shapes: H height, W width; frames uint8 [H, W, 3], RGB.
"""

from __future__ import annotations

import contextlib
import math
import shlex
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, ColorTrc, VideoReformatter
from av.video.stream import VideoStream

from engram_core import InputError
from engram_core.errors import one_line
from engram_video.containers import find_format
from engram_vision.images import show_path

__all__ = ["CONVERSION", "MAX_SIDE", "Source", "open_clip", "tell_reason"]

MAX_SIDE = 8192
"""Most pixels a side of a clip that is read or written: more than 8K video has."""

# libswscale's bicubic, full_chroma_int, full_chroma_inp, accurate_rnd and bitexact, not all of which PyAV 17 names. The
# faster ways depend on the processor, and lose colour at edges.
CONVERSION = 0x4 | 0x2000 | 0x4000 | 0x40000 | 0x80000
"""How colours are converted: interpolation of PyAV."""

_EVEN = 0.25  # of the usual step from frame to frame: what it may vary, as the clocks of phones do
_MISSING = 0.1  # of the length that a file states: what it may overstate
_HDR = {ColorTrc.SMPTE2084: "PQ", ColorTrc.ARIB_STD_B67: "HLG"}
_TO_SDR = (
    "zscale=t=linear:npl=203,format=gbrpf32le,zscale=p=bt709,tonemap=hable,zscale=t=bt709:m=bt709:r=tv,format=yuv420p"
)
# Old programs write titles in other encodings than UTF-8. PyAV 19 no longer asks, and takes them.
_METADATA: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.partition(".")[0]) < 19 else {}

Pixels = npt.NDArray[np.uint8]


class _Clock:
    """Counts frames, and watches whether their times are evenly spaced."""

    def __init__(self, tick: Fraction | None, *, is_even: bool) -> None:
        """Take the seconds of a unit of time, and whether the format cannot but have even times."""
        self.frames = 0
        self._tick, self._is_even = tick, is_even or not tick
        self._first = self._last = self._shortest = self._longest = 0

    def note(self, frame: VideoFrame) -> None:
        self.frames += 1
        if self._is_even:
            return
        if frame.pts is None:  # then the stated rate is all there is
            self._is_even = True
        elif self.frames == 1:
            self._first = self._last = frame.pts
        else:
            step = frame.pts - self._last
            self._shortest = step if self.frames == 2 else min(step, self._shortest)
            self._longest = max(step, self._longest)
            self._last = frame.pts

    def check(self, where: str, name: str) -> None:
        """Refuse uneven times."""
        if self._is_even or self.frames < 3 or self._tick is None:
            return
        usual = (self._last - self._first) / (self.frames - 1)
        leeway = max(_EVEN * usual, 1)  # times are rounded to whole ticks
        if usual - leeway <= self._shortest and self._longest <= usual + leeway and self._shortest > 0:
            return
        seconds = (self._shortest * float(self._tick), self._longest * float(self._tick))
        rate = max(1, round(1 / (usual * self._tick))) if usual > 0 else 24
        raise InputError(
            f"{where}: has a variable frame rate: its {self.frames} frames are {seconds[0] * 1000:.1f} to "
            f"{seconds[1] * 1000:.1f} ms apart; make it constant: ffmpeg -i {name} -vf fps={rate} constant.mp4"
        )

    def measure_fps(self, stream: VideoStream) -> float:
        """Return frames a second: what the file says, unless its times say otherwise."""
        stated = float(stream.average_rate or stream.guessed_rate or 0)
        ticks = self._last - self._first
        if self._is_even or ticks <= 0 or self._tick is None:
            return stated or 1.0
        measured = (self.frames - 1) / (ticks * float(self._tick))
        # Times rounded to milliseconds measure 24 as 24.002.
        is_near = abs(measured - stated) * ticks <= measured
        return stated if is_near else measured


class Source:
    """A file that is being decoded."""

    def __init__(self, container: InputContainer, stream: VideoStream, path: Path) -> None:
        self.container, self.stream, self.where = container, stream, show_path(path)
        self._name = shlex.quote(path.name)
        self._converter = VideoReformatter()  # one for all frames: it prepares tables
        # AVI has no times, and what FFmpeg makes up is wrong where frames are stored out of order.
        self.clock = _Clock(stream.time_base, is_even=container.format.name == "avi")

    def decode(self) -> Iterator[VideoFrame]:
        """Yield every frame in the order of showing."""
        where, stream = self.where, self.stream
        # Else the decoder would fill what it cannot read with what was there before.
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_SIDE**2)}
        stream.thread_type = "AUTO"
        shape = None
        for packet in self.container.demux(stream):
            if packet.has_sidedata("encryption_info"):
                raise InputError(f"{where}: is encrypted; replace it by a copy that is not")
            for frame in packet.decode():
                if frame.is_corrupt:
                    raise InputError(f"{where}: is damaged at frame {self.clock.frames}; copy or make it again")
                _check_side(where, frame.width, frame.height)
                if frame.color_trc in _HDR:  # taken for plain video it would be pale
                    raise InputError(
                        f"{where}: has high dynamic range ({_HDR[ColorTrc(frame.color_trc)]}); convert it: ffmpeg -i "
                        f"{self._name} -vf {_TO_SDR} sdr.mp4"
                    )
                shape = shape or (frame.width, frame.height)
                if shape != (frame.width, frame.height):
                    raise InputError(
                        f"{where}: changes its size at frame {self.clock.frames}, from {shape[0]}x{shape[1]} to "
                        f"{frame.width}x{frame.height}; cut it there"
                    )
                self.clock.note(frame)
                yield frame
        if not self.clock.frames:
            raise InputError(f"{where}: holds no frames; copy or make it again")
        self.clock.check(where, self._name)
        self._check_length()

    def shown_size(self, frame: VideoFrame) -> tuple[int, int]:
        """Return (width, height) upright, in square pixels."""
        width, height = self._square_width(frame), frame.height
        matrix = _matrix(frame)
        return (height, width) if matrix is not None and matrix[0, 1] else (width, height)

    def to_pixels(self, frame: VideoFrame) -> Pixels:
        """Return a frame as it is shown, uint8 [H, W, 3]."""
        converted = self._converter.reformat(
            frame,
            width=self._square_width(frame),
            format="rgb24",
            interpolation=CONVERSION,
            dst_color_range=ColorRange.JPEG,
        )
        pixels = np.asarray(converted.to_ndarray(), np.uint8)
        matrix = _matrix(frame)
        if matrix is None:
            return pixels
        (a, b), (c, d) = matrix
        if b == c == 0 and a and d:
            across, down = a, d
        elif a == d == 0 and b and c:
            pixels, across, down = pixels.transpose(1, 0, 2), c, b
        else:
            raise InputError(
                f"{self.where}: is to be shown turned by {math.degrees(math.atan2(b, a)):.0f} degrees, not a multiple "
                "of 90; convert it with ffmpeg"
            )
        # Each sign that is negative mirrors: a half turn is both.
        return pixels[:: 1 if down > 0 else -1, :: 1 if across > 0 else -1]

    def _square_width(self, frame: VideoFrame) -> int:
        ratio = self.stream.sample_aspect_ratio or Fraction(1)
        return max(1, min(MAX_SIDE, round(frame.width * ratio))) if ratio > 0 else frame.width

    @property
    def fps(self) -> float:
        """Frames a second, once all frames are decoded."""
        return self.clock.measure_fps(self.stream)

    def _check_length(self) -> None:
        """Refuse a clip that ends too early: the reader of Matroska skips what it does not understand."""
        hours, _, rest = self.stream.metadata.get("DURATION", "").partition(":")
        minutes, _, seconds = rest.partition(":")
        try:
            stated = int(hours) * 3600 + int(minutes) * 60 + float(seconds)
        except ValueError:
            return
        found = self.clock.frames / self.fps
        if found < stated * (1 - _MISSING):
            raise InputError(
                f"{self.where}: is damaged: {found:.2f} of its {stated:.2f} seconds can be decoded; copy or make it "
                "again"
            )


@contextlib.contextmanager
def open_clip(path: Path) -> Iterator[Source]:
    """Open a clip's file; what goes wrong in the block becomes an `InputError`."""
    where = show_path(path)
    try:
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise InputError(f"{where}: is no file; give the file of a clip")
        file = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: cannot be read: {tell_reason(error)}; check the path and its permissions") from None
    with file:
        try:
            with av.open(file, "r", format=find_format(file, where), **_METADATA) as container:
                yield Source(container, _find_video(container, where), path)
        except av.FFmpegError as error:
            raise InputError(
                f"{where}: is damaged, or of a kind that cannot be decoded: {tell_reason(error)}; copy or make it "
                "again, or convert it to MP4 with H.264"
            ) from None
        except OSError as error:
            raise InputError(f"{where}: cannot be read: {tell_reason(error)}; copy it again") from None


def _find_video(container: InputContainer, where: str) -> VideoStream:
    # Music has its cover as a video stream.
    videos = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
    if not videos:
        kinds = sorted({stream.type for stream in container.streams})
        raise InputError(f"{where}: holds no video, only {', '.join(kinds) or 'nothing'}; replace it")
    stream = videos[0]
    context: VideoCodecContext | None = stream.codec_context
    if context is None:
        raise InputError(f"{where}: its video is of a kind that FFmpeg does not know; convert it to MP4 with H.264")
    _check_side(where, context.width, context.height)
    return stream


def _check_side(where: str, width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise InputError(f"{where}: is {width}x{height}, larger than {MAX_SIDE} pixels a side; scale it down")


def _matrix(frame: VideoFrame) -> npt.NDArray[np.int32] | None:
    """Return how a frame is turned for showing, [2, 2], in 16.16 fixed point: (x, y) of the file times it."""
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32)[[0, 1, 3, 4]].reshape(2, 2)


def tell_reason(error: BaseException) -> str:
    """Return what an error of FFmpeg or of the system says, on one line."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(getattr(error, "strerror", error))
    return one_line(text) or type(error).__name__
