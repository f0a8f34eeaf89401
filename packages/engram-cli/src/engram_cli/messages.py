"""Plain output: messages, JSON, sizes and columns. Imports no Rich, so that short commands answer at once."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import typer

_LONGEST_CELL = 60


def printable(text: str) -> str:
    """Return text that is safe on one line of a terminal: what does not print becomes a replacement character."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def printable_block(text: str) -> str:
    """Return text of several lines that is safe in a terminal."""
    return "".join(sign if sign in "\n\t" else printable(sign) for sign in text)


def show(text: str = "", **style: Any) -> None:
    """Print a line of a result.

    Args:
        text: the line.
        style: as for `typer.style`; dropped where there is no terminal, and where NO_COLOR is set.
    """
    typer.echo(_style(text, **style))


def show_error(message: str) -> None:
    """Show an error; its first line says it all, further lines list details."""
    head, *details = message.split("\n")
    typer.echo(_style("error: ", fg="red", bold=True) + printable(head), err=True)
    for line in details:
        typer.echo(printable(line), err=True)


def show_note(message: str) -> None:
    """Show a remark that is not part of the result."""
    typer.echo(_style("note: ", fg="yellow", bold=True) + printable(message), err=True)


def show_progress(message: str) -> None:
    """Tell how long work goes on, where no bar can be drawn."""
    typer.echo(printable(message), err=True)


def show_json(value: Any) -> None:
    """Print a result for scripts."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def show_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; a column whose title begins with > is right-aligned, and long cells are cut."""
    right = [title.startswith(">") for title in header]
    lines = [[title.removeprefix(">") for title in header], *([_cell(text) for text in row] for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    for number, line in enumerate(lines):
        cells = []
        for text, width, to_the_right in zip(line, widths, right, strict=True):
            blank = " " * (width - _width(text))
            cells.append(blank + text if to_the_right else text + blank)
        show("  ".join(cells).rstrip(), **({"bold": True} if number == 0 else {}))


def show_written(path: object, what: str, n_bytes: int, identity: str) -> None:
    """Tell that an adapter was written."""
    show(printable(f"wrote {path}: {what}, {format_size(n_bytes)}"))
    show(f"identity {identity}")


def format_size(n_bytes: int) -> str:
    """Return a size in the unit that reads best."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def format_duration(seconds: float) -> str:
    """Return a time in the units that read best."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s" if whole >= 10 else f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_entries(entries: Mapping[str, int]) -> str:
    """Return the numbers of entries by stream in words."""
    return ", ".join(f"{number} {'entry' if number == 1 else 'entries'} in {name}" for name, number in entries.items())


def count(number: int, one: str) -> str:
    """Return a number with its noun, in the plural where it needs to be."""
    return f"{number} {one}" if number == 1 else f"{number} {one}s"


def _style(text: str, **style: Any) -> str:
    return text if "NO_COLOR" in os.environ or not style else typer.style(text, **style)


def _cell(text: str) -> str:
    text = printable(text)
    return text if len(text) <= _LONGEST_CELL else text[: _LONGEST_CELL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _width(text: str) -> int:
    """Return how many places of a terminal a text takes."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)
