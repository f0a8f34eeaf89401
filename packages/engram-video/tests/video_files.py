"""Small clips in files: what phones, cameras and other programs write, and what is wrong with some of them."""

import struct
from fractions import Fraction

import av
import numpy as np

CORNERS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


def moving(count=12, width=64, height=48):
    """Return smooth frames that differ in brightness, with red, green and blue in three corners: [F, H, W, 3]."""
    y, x = np.mgrid[0:height, 0:width]
    frames = np.stack(
        [np.stack([x * 255 / width, y * 255 / height, x * 0 + 240 * n / count], -1) for n in range(count)]
    )
    frames[:, : height // 3, : width // 3] = CORNERS["red"]
    frames[:, : height // 3, -width // 3 :] = CORNERS["green"]
    frames[:, -height // 3 :, : width // 3] = CORNERS["blue"]
    return frames.round().astype(np.uint8)


def grey(levels, width=32, height=16):
    """Return one grey frame for each level."""
    return np.broadcast_to(np.array(levels, np.uint8)[:, None, None, None], (len(levels), height, width, 3))


def save(
    path,
    frames=None,
    *,
    codec="libx264",
    pixels="yuv420p",
    rate=24,
    times=None,
    tick=None,
    options=None,
    muxing=None,
    **context,
):
    """Write a clip as another program might; `times` are the frames' times in ticks."""
    frames = moving() if frames is None else frames
    with av.open(str(path), "w", options=muxing or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=options or {})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pixels
        for name, value in {"thread_count": 1, **context}.items():
            setattr(stream.codec_context, name, value)
        tick = tick or 1 / Fraction(rate)
        if times is not None:
            stream.codec_context.time_base = tick
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture))
            frame.pts, frame.time_base = number if times is None else times[number], tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def save_sound(path):
    """Write a second of silence."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 8000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def turn(path, matrix):
    """Set how an MP4 is to be turned for showing, as phones do: ((a, b), (c, d)), with (x, y) times it."""
    data = bytearray(path.read_bytes())
    (a, b), (c, d) = matrix
    fixed = [round(value * 65536) for value in (a, b, 0, c, d, 0, 0, 0)]
    start = data.index(b"tkhd") + 4 + 40
    data[start : start + 36] = struct.pack(">9i", *fixed, 1 << 30)
    path.write_bytes(data)
    return path


def misstate_frames(path, count):
    """Make an AVI say that it has another number of frames."""
    data = bytearray(path.read_bytes())
    for mark, offset in ((b"avih", 8 + 16), (b"strh", 8 + 32)):
        start = data.index(mark) + offset
        data[start : start + 4] = struct.pack("<I", count)
    path.write_bytes(data)
    return path
