"""How long work goes on, shown to whoever sits there: a live bar in a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from engram_cli.console import plain, terminal
from engram_cli.messages import format_duration, format_size, printable, printable_block, show_note, show_progress
from engram_core import Watcher

_WINDOW = 30.0  # seconds over which the speed is measured
_SHORTEST = 0.1  # seconds after which a speed means something
_PER_SECOND = "_per_second"
_PAUSE = 10.0  # least seconds between two lines of a log


@contextlib.contextmanager
def watching(*, as_json: bool) -> Iterator[NotingWatcher]:
    """Yield a watcher that shows what suits the place; with --json no lines, but notes and, in a terminal, the bar."""
    console = terminal()
    if console is not None:
        with draw_bar(console) as bar:
            yield LiveWatcher(bar, texts=sys.stdout.isatty() and not as_json)
    elif as_json:
        yield NotingWatcher()
    else:
        log = LogWatcher()
        yield log
        log.end()


def draw_bar(console: Console) -> Bar:
    """Return a bar for a `LiveWatcher`; as a context manager it is drawn while the block runs, then taken away."""
    return Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}", markup=False),
        console=console,
        transient=True,
        # A stream that goes elsewhere must not come out on the terminal.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    )


class Bar(Progress):
    """A progress bar with a line of figures below it."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the bar, then the figures."""
        yield from super().get_renderables()
        yield plain(self.figures, "dim")


class NotingWatcher(Watcher):
    """Shows notes alone.

    Attributes:
        has_shown_texts: whether texts were shown while they were generated.
    """

    has_shown_texts = False

    def note(self, message: str) -> None:
        """Show a note."""
        show_note(message)


class LogWatcher(NotingWatcher):
    """Writes plain lines: when work of a new title begins and when it is complete, else at most one in 10 seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Take the time from `clock`, in seconds."""
        self._clock = clock
        self._announced: set[str] = set()
        self._work: _Work | None = None
        self._written, self._last = "", clock()

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Write what begins, unless it was heard of before."""
        self.end()
        self._work = _Work(title, total, done, self._clock())
        if title not in self._announced:
            self._announced.add(title)
            self._write(title if total is None else f"{title}: {self._work.position()}")

    def advance(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Write how far it is, when it is time to."""
        if self._work is None:
            return
        now = self._clock()
        self._work.advance(done, figures, now)
        if now - self._last >= _PAUSE:
            self._write(self._work.describe())

    def end(self) -> None:
        """Write where it ended, when that is where it should."""
        if self._work is not None and self._work.complete:
            self._write(self._work.describe())
        self._work = None

    def _write(self, line: str) -> None:
        if line != self._written:
            show_progress(line)
        self._written, self._last = line, self._clock()


class LiveWatcher(NotingWatcher):
    """Moves a bar and shows the figures below it; in place of the bar it can show texts while they are generated."""

    def __init__(self, bar: Bar, clock: Callable[[], float] = time.monotonic, *, texts: bool = False) -> None:
        """Move `bar`, taking the time from `clock`, in seconds.

        Args:
            bar: is drawn already.
            clock: for the speed.
            texts: show texts as well, on the bar's console.
        """
        self._bar, self._clock, self._texts = bar, clock, texts
        self._title: str | None = None
        self._task: TaskID | None = None
        self._work = _Work("", None, 0, 0.0)

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        """Draw a new bar in place of the old."""
        self.end()
        self._work = _Work(title, total, done, self._clock())
        self._task = self._bar.add_task(printable(title), total=total, completed=done, pace="")

    def advance(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        """Move the bar and show the figures."""
        if self._task is None:
            return
        self._work.advance(done, figures, self._clock())
        self._bar.figures = "  ".join(format_figures(self._work.figures))
        self._bar.update(self._task, completed=done, pace="  ".join(self._work.pace()))

    def end(self) -> None:
        """Take the bar and the figures away."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task, self._bar.figures = None, ""

    def text(self, title: str, piece: str) -> None:
        """Write the next piece of a text under its title."""
        if not self._texts:
            return
        console = self._bar.console
        if not self.has_shown_texts:
            self._bar.stop()  # a bar would be drawn over the text
            self.has_shown_texts = True
        if title != self._title:
            console.print(plain(title, "bold"), soft_wrap=True)
            self._title = title
        if piece:
            console.file.write(printable_block(piece))
            console.file.flush()
        else:
            console.print("\n")
            self._title = None


class _Work:
    """A piece of work: how far it is, its latest figures, its speed of the last half minute."""

    def __init__(self, title: str, total: int | None, done: int, now: float) -> None:
        self.title, self.total = title, total
        self.figures: dict[str, float] = {}
        self._marks = deque([(now, done)])

    @property
    def complete(self) -> bool:
        return len(self._marks) > 1 and self._marks[-1][1] == self.total

    def advance(self, done: int, figures: Mapping[str, float] | None, now: float) -> None:
        self.figures.update(figures or {})  # not every step brings all of them
        self._marks.append((now, done))
        while len(self._marks) > 2 and now - self._marks[1][0] >= _WINDOW:
            self._marks.popleft()

    def position(self) -> str:
        done = self._marks[-1][1]
        return str(done) if self.total is None else f"{done}/{self.total}"

    def pace(self) -> list[str]:
        """Return speed and time left in words, as far as they are known."""
        (start, first), (now, done) = self._marks[0], self._marks[-1]
        if now - start < _SHORTEST or done <= first:
            return []
        speed = (done - first) / (now - start)
        words = []
        if not any(name.endswith(_PER_SECOND) for name in self.figures):
            words.append(f"{speed:.3g}/s" if speed >= 1 else f"{format_duration(1 / speed)} each")
        if self.total is not None and done < self.total:
            words.append(f"{format_duration((self.total - done) / speed)} left")
        return words

    def describe(self) -> str:
        return f"{self.title}: {', '.join([self.position(), *format_figures(self.figures), *self.pace()])}"


def format_figures(figures: Mapping[str, float]) -> list[str]:
    """Return figures as text: `steps_per_second` as steps/s, what ends in `_mb` as a size, others by their names."""
    return [_format_figure(name, value) for name, value in figures.items()]


def _format_figure(name: str, value: float) -> str:
    title = name.replace("_", " ")
    if name.endswith(_PER_SECOND):
        return f"{value:.3g} {title.removesuffix(_PER_SECOND.replace('_', ' '))}/s"
    if name.endswith("_mb"):
        return f"{title.removesuffix(' mb')} {format_size(int(value * 1e6))}"
    return f"{title} {value:.4g}"
