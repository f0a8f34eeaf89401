"""The safetensors container: memory-mapped reading with strict checks, and deterministic, atomic writing.

What is done here on top of the safetensors library, which also checks every file: bf16 in NumPy (the
library's NumPy module has none), views instead of copies, limits that keep a hostile file from costing
more memory than its own size, messages that say where a file is at fault, and writing tensors larger
than memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import math
import mmap
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from engram_core.canonical import JSON_MAX_BYTES, dump_canonical, parse_strict
from engram_core.errors import (
    AdapterFormatError,
    AdapterReadError,
    AdapterWriteError,
    EngramError,
    TargetExistsError,
    one_line,
    quote,
    show_text,
)

_PREFIX = 8  # bytes: little-endian length of the JSON header
_CHUNK = 1 << 22
_LARGE = 1 << 20  # bytes above which it matters what the system reads ahead
_TENSOR_FIELDS = {"dtype", "shape", "data_offsets"}

Stamp = tuple[int, ...]
"""Device, inode, size and time of change of an opened file."""

# Only these occur in adapters. BF16 is read as its bits.
_NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "U8": np.dtype("u1"),
    "I32": np.dtype("<i4"),
    "I64": np.dtype("<i8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}


class TensorInfo(NamedTuple):
    """Where a tensor lies: type name of the container, shape, and byte range in the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """An opened safetensors file, or one held in memory.

    Attributes:
        label: file name for messages.
        path: the file, or None when held in memory.
        metadata: the header's free text fields.
        tensors: name to place.
        buffer: all bytes of the file; memory-mapped when there is a path.
        stamp: which file was opened, and in which state; empty when held in memory.
    """

    label: str
    path: Path | None
    metadata: Mapping[str, str]
    tensors: Mapping[str, TensorInfo]
    buffer: bytes | mmap.mmap
    stamp: Stamp = ()

    def array(self, name: str) -> npt.NDArray[Any]:
        """Return a read-only view of a tensor; nothing is read before it is touched."""
        info = self.tensors[name]
        # One call, where np.frombuffer and a reshape take five times as long: merging makes many views.
        array: npt.NDArray[Any] = np.ndarray(info.shape, _NUMPY_TYPES[info.dtype], self.buffer, info.start)
        return array

    @contextlib.contextmanager
    def read_whole(self) -> Iterator[None]:
        """Tell the system that most of the file is about to be read; otherwise it reads no page unasked.

        Without this, reading one concept of thousands would read megabytes around each place it touches.
        """
        self._advise("MADV_SEQUENTIAL")
        try:
            yield
        finally:
            self._advise("MADV_RANDOM")

    def _advise(self, advice: str) -> None:
        if isinstance(self.buffer, mmap.mmap) and len(self.buffer) >= _LARGE and hasattr(mmap, advice):
            self.buffer.madvise(getattr(mmap, advice))


def open_container(path: str | os.PathLike[str]) -> Container:
    """Map a safetensors file and check its header; tensors are not read.

    Raises:
        AdapterReadError: the file is missing, not a regular file, or not permitted.
        AdapterFormatError: the header is not that of a valid safetensors file.
    """
    file = Path(path)
    label = _label(path)
    try:
        descriptor = os.open(file, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise AdapterReadError(f"{label}: cannot be opened: {_reason(error)}") from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise AdapterReadError(f"{label}: is not a regular file; give the path of a .safetensors file")
        head = os.read(descriptor, _PREFIX)
        header_stop = _check_prefix(head, status.st_size, label)
        buffer = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        stamp = read_stamp(descriptor)
    except (OSError, ValueError) as error:  # ValueError: the file was emptied meanwhile
        if isinstance(error, EngramError):
            raise
        raise AdapterReadError(f"{label}: cannot be read: {_reason(error)}") from None
    finally:
        os.close(descriptor)
    container = replace(_parse(buffer, header_stop, label, file), stamp=stamp)
    container._advise("MADV_RANDOM")
    try:
        with safe_open(str(file), framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        raise AdapterFormatError(f"{label}: is not a safetensors file: {show_text(one_line(error, 300))}") from None
    return container


def read_container(data: bytes, label: str) -> Container:
    """Check a safetensors file held in memory.

    Raises:
        AdapterFormatError: the header is not that of a valid safetensors file.
    """
    return _parse(data, _check_prefix(data[:_PREFIX], len(data), label), label, None)


def read_stamp(descriptor: int) -> Stamp:
    """Return what changes when a file is replaced or written to."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _check_prefix(head: bytes, size: int, label: str) -> int:
    """Return where the header ends."""
    if size < _PREFIX or len(head) < _PREFIX:
        raise AdapterFormatError(f"{label}: has {size} bytes, too few for a safetensors file; it may be truncated")
    length = int.from_bytes(head, "little")
    if length > size - _PREFIX:
        raise AdapterFormatError(
            f"{label}: header length is {length}, the file has only {size} bytes; it is truncated or not safetensors"
        )
    if length > JSON_MAX_BYTES:
        raise AdapterFormatError(
            f"{label}: header length is {length}, an adapter's is at most {JSON_MAX_BYTES}; not an engram adapter"
        )
    return _PREFIX + length


def _parse(buffer: bytes | mmap.mmap, header_stop: int, label: str, path: Path | None) -> Container:
    try:
        metadata, tensors, stop = _parse_header(bytes(buffer[_PREFIX:header_stop]))
    except ValueError as error:
        raise AdapterFormatError(f"{label}: {error}") from None
    if stop != len(buffer):
        raise AdapterFormatError(
            f"{label}: tensors end at byte {stop}, the file at {len(buffer)}; it is truncated or has extra bytes"
        )
    return Container(label=label, path=path, metadata=metadata, tensors=tensors, buffer=buffer)


@lru_cache(maxsize=16)  # merging opens thousands of files, and files of equal shape have equal headers
def _parse_header(text: bytes) -> tuple[Mapping[str, str], Mapping[str, TensorInfo], int]:
    """Return the free text fields, the places of the tensors, and where the last one ends.

    Raises:
        ValueError: with the reason.
    """
    try:
        header = parse_strict(text)
    except ValueError as error:
        raise ValueError(f"header {show_text(one_line(error, 300))}") from None
    if not isinstance(header, dict):
        raise ValueError(f"header is {type(header).__name__}, expected an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("header field '__metadata__' does not map text to text")
    position = _PREFIX + len(text)
    tensors = {name: _parse_tensor(name, item, position) for name, item in header.items()}
    for name, info in sorted(tensors.items(), key=lambda pair: (pair[1].start, pair[1].stop)):
        if info.start != position:
            raise ValueError(
                f"tensor {quote(name)} begins at byte {info.start}, expected {position}: a hole or an overlap"
            )
        position = info.stop
    return MappingProxyType(metadata), MappingProxyType(tensors), position


def _parse_tensor(name: str, item: Any, header_stop: int) -> TensorInfo:
    if not isinstance(item, dict) or item.keys() != _TENSOR_FIELDS:
        raise ValueError(f"tensor {quote(name)} needs exactly the fields {', '.join(sorted(_TENSOR_FIELDS))}")
    dtype, shape, span = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _NUMPY_TYPES:
        raise ValueError(f"tensor {quote(name)} has dtype {quote(dtype)}, known: {', '.join(_NUMPY_TYPES)}")
    if not _are_counts(shape) or not _are_counts(span) or len(span) != 2 or len(shape) > 8:
        raise ValueError(f"tensor {quote(name)} has shape {quote(shape)} at {quote(span)}; expected lists of counts")
    if math.prod(size or 1 for size in shape) * _NUMPY_TYPES[dtype].itemsize > sys.maxsize:
        # An empty tensor may have an axis of any length, but not in NumPy.
        raise ValueError(f"tensor {quote(name)} has shape {quote(shape)} at {quote(span)}; no file is that large")
    expected = math.prod(shape) * _NUMPY_TYPES[dtype].itemsize
    if span[1] - span[0] != expected:
        raise ValueError(
            f"tensor {quote(name)} has {span[1] - span[0]} bytes, its shape {shape} of {dtype} needs {expected}"
        )
    return TensorInfo(dtype=dtype, shape=tuple(shape), start=header_stop + span[0], stop=header_stop + span[1])


def _are_counts(value: Any) -> bool:
    # A list comprehension costs half of what `all` does on lists this short, and merging parses many.
    return isinstance(value, list) and not [item for item in value if type(item) is not int or not 0 <= item < 1 << 62]


class ContainerWriter:
    """Writes one safetensors file whose tensors may be larger than memory.

    All places are fixed by the header, so tensors can be filled in any order and in pieces.
    Tensors lie by descending element size, then by name, so every one is aligned.
    """

    def __init__(
        self,
        target: BinaryIO,
        metadata: Mapping[str, str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    ) -> None:
        """Write the header.

        Args:
            target: an empty, seekable binary file.
            metadata: free text fields.
            tensors: name to (container type name, shape).

        Raises:
            AdapterFormatError: the header would be longer than readers accept.
        """
        header: dict[str, Any] = {"__metadata__": dict(metadata)}
        places: dict[str, tuple[int, int]] = {}
        position = 0
        for name in sorted(tensors, key=lambda name: (-_NUMPY_TYPES[tensors[name][0]].itemsize, name)):
            dtype, shape = tensors[name]
            length = math.prod(shape) * _NUMPY_TYPES[dtype].itemsize
            places[name] = (position, length)
            header[name] = {
                "dtype": dtype,
                "shape": list(shape),
                "data_offsets": [position, position + length],
            }
            position += length
        text = dump_canonical(header)
        text += b" " * (-len(text) % 8)
        if len(text) > JSON_MAX_BYTES:
            raise AdapterFormatError(f"the header would have {len(text)} bytes, the limit is {JSON_MAX_BYTES}")
        self._target = target
        self._places = {name: (_PREFIX + len(text) + start, length) for name, (start, length) in places.items()}
        self.size = _PREFIX + len(text) + position
        _reserve(target, self.size)
        target.seek(self.size - 1)
        target.write(b"\0")  # what is never written reads as zero
        target.seek(0)
        write_all(target, memoryview(len(text).to_bytes(_PREFIX, "little") + text))

    def write(self, name: str, data: npt.NDArray[Any] | bytes | memoryview, offset: int = 0) -> None:
        """Write part of a tensor.

        Args:
            name: the tensor.
            data: C-contiguous array of the tensor's element type, or raw bytes.
            offset: first byte within the tensor.
        """
        view = memoryview(data.reshape(-1).view(np.uint8).data if isinstance(data, np.ndarray) else data)
        start, length = self._places[name]
        if offset + view.nbytes > length:
            raise ValueError(f"tensor {name!r} has {length} bytes, got {view.nbytes} at {offset}")
        self._target.seek(start + offset)
        write_all(self._target, view)


def write_all(target: BinaryIO, data: memoryview) -> None:
    """Write every byte: one call to an unbuffered file takes 2 GiB at most, and less on a disk that gets full."""
    while data.nbytes:
        data = data[target.write(data) :]


def _reserve(target: BinaryIO, size: int) -> None:
    """Take the disk space first, so that a full disk is noticed before any work."""
    try:
        descriptor = target.fileno()
    except OSError:  # held in memory
        return
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # others: the file system cannot reserve; writing will tell


@contextlib.contextmanager
def open_target(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path` that takes its name when the block ends well.

    Whatever happens, `path` holds either what it held before or the complete new file.

    Raises:
        TargetExistsError: the target exists and `overwrite` is false.
        AdapterWriteError: no such folder, no permission, no space.
    """
    target, label = Path(path), _label(path)
    if "\0" in str(target):
        raise AdapterWriteError(f"{label}: cannot be written: the path holds a null byte")
    if not overwrite and os.path.lexists(target):
        raise _exists(label)
    temporary = None
    try:
        if target.is_dir():
            raise AdapterWriteError(f"{label}: is a folder; give the name of a file")
        if not target.parent.is_dir():
            raise AdapterWriteError(f"{label}: there is no folder {_label(target.parent)}; create it first")
        with tempfile.NamedTemporaryFile(
            dir=target.parent, prefix=f".{target.name[:40]}.", suffix=".tmp", delete=False, buffering=0
        ) as stream:
            temporary = Path(stream.name)
            yield stream  # type: ignore[misc]
            os.fsync(stream.fileno())
        _set_default_mode(temporary)
        if overwrite:
            temporary.replace(target)
        else:
            _publish(temporary, target, label)
    except OSError as error:
        if isinstance(error, (AdapterReadError, AdapterWriteError)):
            raise
        raise AdapterWriteError(f"{label}: cannot be written: {_reason(error)}; nothing was changed") from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _publish(temporary: Path, target: Path, label: str) -> None:
    """Give a finished file its name unless the name was taken meanwhile."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        raise _exists(label) from None
    except OSError:  # a file system without hard links
        if os.path.lexists(target):
            raise _exists(label) from None
        temporary.replace(target)


def _exists(label: str) -> TargetExistsError:
    return TargetExistsError(f"{label}: exists already; choose another name or allow overwriting (--force)")


def _set_default_mode(path: Path) -> None:
    # Temporary files are private; the result should be as readable as any other new file.
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def hash_buffer(buffer: bytes | mmap.mmap) -> str:
    """Return the hex SHA-256 of a whole file, read in pieces."""
    digest = hashlib.sha256()
    view = memoryview(buffer)
    for start in range(0, len(view), _CHUNK):
        digest.update(view[start : start + _CHUNK])
    return digest.hexdigest()


def _label(path: str | os.PathLike[str]) -> str:
    return show_text(str(path))


def _reason(error: BaseException) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
