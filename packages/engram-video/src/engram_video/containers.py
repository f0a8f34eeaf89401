"""What kind of file a clip is in, told by its first bytes, and whether the file is whole.

FFmpeg would try every format it knows, and some of those (playlists, say) name other files to open, so it is told the
format. It also reads a cut-off file without complaint, as a shorter clip, so the sizes that a file states are compared
with its own.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

from engram_core import InputError
from engram_core.errors import quote

__all__ = ["SUFFIXES", "find_format"]

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".gif")
"""Names that clips end in, in any case; the content alone decides how one is decoded."""

_HEAD = 64  # bytes: enough to tell every format, and the sizes at the front of Matroska
_QUICKTIME = (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot")
_PICTURES = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")
_SEGMENT = b"\x18\x53\x80\x67"  # the element of Matroska that holds all others


def find_format(stream: BinaryIO, where: str) -> str:
    """Return FFmpeg's name of the format that a file is in, and go back to the file's beginning.

    Args:
        stream: the file, open for reading.
        where: its name for messages.

    Raises:
        InputError: the file is empty, is of no format that is supported, or is cut off.
    """
    size = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(_HEAD)
    if not head:
        raise InputError(f"{where}: is empty (0 bytes); copy or make it again")
    name, measure = _identify(head, where)
    stated = measure(stream, head, size)
    stream.seek(0)
    if stated is None or stated > size:
        whole = f"{size} of at least {stated}" if stated else str(size)
        raise InputError(f"{where}: is cut off: it has {whole} bytes and lacks its end; copy or make it again")
    return name


Measure = Callable[[BinaryIO, bytes, int], "int | None"]


def _identify(head: bytes, where: str) -> tuple[str, Measure]:
    """Return a format's name, and what finds how many bytes a file must have: None for more than it has."""
    if head[4:8] in _QUICKTIME:
        return "mov", _measure_quicktime
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska", _measure_matroska
    if head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        return "avi", _measure_riff
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif", _measure_gif
    if head.startswith(_PICTURES) or (head.startswith(b"RIFF") and head[8:12] == b"WEBP"):
        raise InputError(f"{where}: is a picture, expected a clip ({', '.join(SUFFIXES)}); make a clip of it first")
    raise InputError(
        f"{where}: begins with {quote(head[:8])}, as no {', '.join(SUFFIXES)} file does; replace it, or convert it to "
        "MP4"
    )


def _measure_quicktime(stream: BinaryIO, head: bytes, size: int) -> int:  # noqa: ARG001
    """Follow the boxes, each of which begins with its size and its kind."""
    place = 0
    while place + 8 <= size:
        stream.seek(place)
        start = stream.read(16)
        length = int.from_bytes(start[:4], "big")
        if length == 1 and len(start) == 16:
            length = int.from_bytes(start[8:], "big")
        if length == 0:  # up to the end, wherever that is
            return size
        if length < 8:  # not a box: some programs add bytes of their own
            return size
        place += length
    return max(place, size)


def _measure_matroska(stream: BinaryIO, head: bytes, size: int) -> int:
    """Add up the two elements that a file consists of: a short head and the segment."""
    place = 4
    header, place = _read_length(head, place)
    place += header or 0
    if header is None or place > size:
        return size
    stream.seek(place)
    start = stream.read(12)
    length, width = _read_length(start, 4)
    if not start.startswith(_SEGMENT) or length is None:  # a recording that was not finished has no length
        return size
    return place + width + length


def _read_length(data: bytes, place: int) -> tuple[int | None, int]:
    """Return a length as EBML writes it (RFC 8794, section 4), None where it is unknown, and the place behind it."""
    if place >= len(data) or not data[place]:
        return None, place
    width = 9 - data[place].bit_length()
    value = int.from_bytes(data[place : place + width], "big") & ((1 << 7 * width) - 1)
    is_unknown = value == (1 << 7 * width) - 1 or place + width > len(data)
    return (None if is_unknown else value), place + width


def _measure_riff(stream: BinaryIO, head: bytes, size: int) -> int:  # noqa: ARG001
    return 8 + int.from_bytes(head[4:8], "little")


def _measure_gif(stream: BinaryIO, head: bytes, size: int) -> int | None:  # noqa: ARG001
    """Look for the mark at the end, behind which some programs leave zeros."""
    stream.seek(max(0, size - _HEAD))
    return size if stream.read().rstrip(b"\0").endswith(b";") else None
