"""What commands write to the terminal with: two consoles, safe text, sizes, and a progress bar over bytes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

out = Console(highlight=False, markup=False, emoji=False)
"""For results. Neither markup nor emoji codes are read in what is printed: it may come from files."""

err = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""For progress, notes and errors."""


def plain(text: str, style: str = "") -> Text:
    """Return text as it is: no markup, no control characters."""
    return Text("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text), style=style)


def show_error(message: str) -> None:
    """Show an error; its first line says it all, further lines list details."""
    head, *details = message.split("\n")
    err.print(Text.assemble(("error: ", "bold red"), plain(head)), soft_wrap=True)
    for line in details:
        err.print(plain(line), soft_wrap=True)


def show_note(message: str) -> None:
    """Show a remark that is not part of the result."""
    err.print(Text.assemble(("note: ", "bold yellow"), plain(message)), soft_wrap=True)


def show_json(value: Any) -> None:
    """Print a result for scripts."""
    print(json.dumps(value, indent=2, ensure_ascii=False))  # noqa: T201 - not through Rich, which wraps lines


def format_size(n_bytes: int) -> str:
    """Return a size in the unit that reads best."""
    size = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError("unreachable")


def terminal() -> Console | None:
    """Return the console to animate on, or None when neither output is a terminal.

    Results and animation must share a console, or they overwrite each other.
    """
    if sys.stdout.isatty():
        return out
    return err if sys.stderr.isatty() else None


@contextlib.contextmanager
def byte_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar over bytes while the block runs; yields the function to report (done, total) with."""
    console = terminal()
    if console is None:
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextlib.contextmanager
def working(title: str) -> Iterator[None]:
    """Show that something runs whose length is not known."""
    console = terminal()
    if console is None:
        yield
        return
    with console.status(title):
        yield
