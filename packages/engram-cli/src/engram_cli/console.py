"""What needs Rich: coloured text, progress bars and spinners."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.text import Text

from engram_cli.messages import printable

out = Console(highlight=False, markup=False, emoji=False)
"""For results. Neither markup nor emoji codes are read in what is printed: it may come from files."""

err = Console(stderr=True, highlight=False, markup=False, emoji=False)
"""For progress."""


def plain(text: str, style: str = "") -> Text:
    """Return text as it is: no markup, no control characters."""
    return Text(printable(text), style=style)


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
