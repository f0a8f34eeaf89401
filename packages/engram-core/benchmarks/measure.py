"""What the benchmarks share: interleaved timing, tables, bounds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from time import perf_counter_ns
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Figures for people: one row a case."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def plain(self) -> str:
        """Return the table for a terminal."""
        lines = [list(self.columns), *map(list, self.rows)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
        text.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([self.title, "", *(line.rstrip() for line in text)])

    def markdown(self) -> str:
        """Return the table for the documentation."""
        lines = ["| " + " | ".join(line) + " |" for line in (self.columns, *self.rows)]
        lines.insert(1, "| " + " | ".join("---" for _ in self.columns) + " |")
        return "\n".join([f"{self.title}:", "", *lines])


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """A promise: `value` is at most `limit`."""

    what: str
    value: float
    limit: float
    unit: str = "times"

    @property
    def met(self) -> bool:
        """Whether the promise is kept."""
        return self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Everything one benchmark found."""

    tables: Sequence[Table]
    bounds: Sequence[Bound] = ()
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)

    def all_tables(self) -> list[Table]:
        """Return the tables, the bounds as the last of them."""
        rows = [
            (bound.what, f"{bound.value:.4g}", f"{bound.limit:g} {bound.unit}", "yes" if bound.met else "**no**")
            for bound in self.bounds
        ]
        bounds = Table(title="Bounds", columns=("bound", "measured", "at most", "met"), rows=rows)
        return [*self.tables, bounds] if rows else list(self.tables)

    def to_json(self) -> dict[str, Any]:
        """Return the figures and bounds as plain JSON values."""
        bounds = [asdict(bound) | {"met": bound.met} for bound in self.bounds]
        return {"figures": dict(self.figures), "bounds": bounds, "notes": list(self.notes)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Median, and the tenth and ninetieth percentile, of repeated measurements in seconds."""

    median: float
    low: float
    high: float
    least: float
    count: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread:
        """Summarise measurements."""
        ordered = sorted(seconds)
        return cls(
            median=statistics.median(ordered),
            low=ordered[len(ordered) // 10],
            high=ordered[len(ordered) * 9 // 10 if len(ordered) > 1 else 0],
            least=ordered[0],
            count=len(ordered),
        )

    def show(self, unit: str = "µs") -> str:
        """Return the median and the spread as one cell."""
        factor = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
        digits = 1 if self.median * factor < 100 else 0
        median, low, high = (f"{value * factor:,.{digits}f}" for value in (self.median, self.low, self.high))
        return f"{median} {unit} ({low} to {high})"


def interleave(cases: Mapping[str, Sequence[Callable[[], object]]], rounds: int) -> dict[str, Spread]:
    """Time every case in turn, call by call, so that a noisy moment touches all of them.

    Args:
        cases: name to equally many calls; a round goes through all of them, after one round that is not timed.
        rounds: how often.
    """
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    steps = [list(zip(cases, calls, strict=True)) for calls in zip(*cases.values(), strict=True)]
    for number in range(rounds + 1):
        for step in steps:
            for name, call in step:
                start = perf_counter_ns()
                call()
                elapsed = perf_counter_ns() - start
                if number:
                    seconds[name].append(elapsed / 1e9)
    return {name: Spread.of(values) for name, values in seconds.items()}
