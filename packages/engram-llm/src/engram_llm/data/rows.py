"""The rows of JSONL, Parquet and text files, one after the other, each with its place.

JSONL is read line by line here, so that a corrupt line is known by its number and does not hide the others.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]

from engram_core import InputError
from engram_core.errors import one_line

__all__ = ["SUFFIXES", "Row", "read_rows"]

SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt")
"""Kinds of files."""

_BATCH = 1024  # rows of a Parquet file at once
_SHOWN = 3  # files that a message names

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One row of a data set.

    Attributes:
        place: file and line, for messages.
        values: column to value; empty where the row could not be read.
        fault: why it could not be read.
    """

    place: str
    values: Mapping[str, Any]
    fault: str | None = None


def read_rows(path: Path, *, text_column: str = "text", note: Note | None = None) -> Iterator[Row]:
    """Yield the rows of a file, or of all files in a folder in the order of their names.

    Args:
        path: a file of one of `SUFFIXES`, or a folder with such files. A `.txt` file is one row.
        text_column: the column that a `.txt` file's content is called.
        note: told which files of a folder are not read.

    Raises:
        InputError: there is no such file, none that can be read, or one is damaged as a whole.
    """
    if path.is_dir():
        names = sorted(file.name for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
        files = [path / name for name in names if name.endswith(SUFFIXES)]
        others = [name for name in names if not name.endswith(SUFFIXES)]
        if not files:
            raise InputError(f"{path}: holds no data; expected files that end in {', '.join(SUFFIXES)}")
        if others and note is not None:
            shown = ", ".join(others[:_SHOWN]) + (" and others" if len(others) > _SHOWN else "")
            note(f"{path}: files of other kinds are not read: {shown}")
    elif path.is_file():
        files = [path]
        if not path.name.endswith(SUFFIXES):
            hint = "; write one object a line into a .jsonl" if path.suffix == ".json" else ""
            raise InputError(f"{path}: is of no known kind, expected {', '.join(SUFFIXES)}{hint}")
    else:
        raise InputError(f"{path}: does not exist; give a file, or a folder with files, of training data")
    for file in files:
        try:
            yield from _read_file(file, text_column)
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            reason = one_line(getattr(error, "strerror", None) or error)
            raise InputError(f"{file}: cannot be read: {reason}") from None


def _read_file(file: Path, text_column: str) -> Iterator[Row]:
    if file.name.endswith(".parquet"):
        yield from _read_parquet(file)
    elif file.name.endswith(".txt"):
        yield _read_text(file, text_column)
    else:
        with gzip.open(file) if file.name.endswith(".gz") else file.open("rb") as stream:
            yield from _read_lines(file, stream)  # type: ignore[arg-type]


def _read_lines(file: Path, stream: BinaryIO) -> Iterator[Row]:
    for number, line in enumerate(stream, start=1):
        place = f"{file}:{number}"
        data = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line  # Windows programs put a mark in front
        if not data.strip():
            continue
        try:
            value = json.loads(data.rstrip().decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Row(place=place, values={}, fault=f"byte {error.start + 1}, 0x{data[error.start]:02x}, is not UTF-8")
        except json.JSONDecodeError as error:
            yield Row(place=place, values={}, fault=f"is not JSON: {error.msg} at column {error.colno}")
        except RecursionError:
            yield Row(place=place, values={}, fault="is not usable JSON: it nests too deeply")
        else:
            if isinstance(value, dict):
                yield Row(place=place, values=value)
            else:
                yield Row(place=place, values={}, fault=f"is {type(value).__name__}, expected an object")


def _read_parquet(file: Path) -> Iterator[Row]:
    number = 0
    with pyarrow.parquet.ParquetFile(file) as parquet:
        for batch in parquet.iter_batches(batch_size=_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield Row(place=f"{file}, row {number}", values=values)


def _read_text(file: Path, text_column: str) -> Row:
    data = file.read_bytes()
    try:
        return Row(place=str(file), values={text_column: data.decode("utf-8-sig")})
    except UnicodeDecodeError as error:
        return Row(place=str(file), values={}, fault=f"byte {error.start + 1}, 0x{data[error.start]:02x}, is not UTF-8")
