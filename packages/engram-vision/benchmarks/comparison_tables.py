"""The comparison's rows as tables: mean over seeds, with the lowest and the highest seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import add
from statistics import mean
from typing import Any

from measure import Table
from questions import BESIDE, CLASS, FORMS, NEW, PAIR, QUIET, SHOWN, SINGLE
from verdicts import Count, Counts

NAMED = (SHOWN, NEW, FORMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What one method made of one character, or of a pair, with one seed.

    Attributes:
        method: its name.
        character: name of the character; of a pair both, with `and`.
        seed: of learning and of drawing.
        counts: of verdicts.
        costs: what learning took and gave; empty where nothing was learned.
    """

    method: str
    character: str
    seed: int
    counts: Counts
    costs: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return {
            "method": self.method,
            "character": self.character,
            "seed": self.seed,
            "counts": {name: str(count) for name, count in sorted(self.counts.items())},
            "costs": self.costs,
        }


def make_tables(rows: Sequence[Row], apart: str) -> list[Table]:
    """Return every table, a line for each method in the order of the rows.

    Args:
        rows: of all methods.
        apart: a character that nothing was chosen on, whose identity is told alone as well.
    """
    seeds = sorted({row.seed for row in rows})
    of_seeds = f"mean (lowest to highest) of {len(seeds)} seed{'s' if len(seeds) > 1 else ''}"
    names = list(dict.fromkeys(row.method for row in rows))

    def table(title: str, columns: Sequence[tuple[str, Callable[[str], str]]], among: Sequence[str] = names) -> Table:
        return Table(
            title=title,
            columns=("method", *(label for label, _ in columns)),
            rows=[(name, *(show(name) for _, show in columns)) for name in among],
        )

    def share(*counts: str, digits: int = 2) -> Callable[[str], str]:
        return lambda name: show_spread(shares(rows, name, counts), digits)

    def cost(name_of: str, write: Callable[[float], str]) -> Callable[[str], str]:
        def show(name: str) -> str:
            values = [row.costs[name_of] for row in rows if row.method == name and row.costs]
            return show_range(values, write)

        return show

    alone = [row for row in rows if row.character == apart]
    learns = [name for name in names if any(row.costs for row in rows if row.method == name)]
    return [
        table(
            f"The character by its name, {of_seeds}",
            [
                ("identity, scenes shown", share(f"{SHOWN}: identity")),
                ("identity, new scenes", share(f"{NEW}: identity")),
                (f"{apart} alone", lambda name: show_spread(shares(alone, name, [f"{NEW}: identity"]))),
                ("identity, other wordings", share(f"{FORMS}: identity")),
                ("attributes", share(*(f"{group}: attributes" for group in NAMED))),
                ("scene", share(*(f"{group}: scene" for group in NAMED))),
            ],
        ),
        table(
            f"Prompts without the name, {of_seeds}",
            [
                (f"{label}{what}", share(f"{group}: {count}", digits=3 if count in ("distance", "difference") else 2))
                for group, label in ((QUIET, "other subjects: "), (CLASS, "a monster: "), (SINGLE, "single words: "))
                for count, what in (
                    ("identical", "identical"),
                    ("difference", "difference"),
                    ("distance", "distance"),
                    *((("obeyed", "obeyed"),) if group == QUIET else (("shows the character", "the character"),)),
                )
            ],
        ),
        table(
            f"Two in one prompt, {of_seeds}",
            [
                ("beside another: identity", share(f"{BESIDE}: identity")),
                ("the thing right", share(f"{BESIDE}: thing right")),
                ("the monster right", share(f"{BESIDE}: monster right")),
                ("borrowed by the monster", share(f"{BESIDE}: borrowed")),
                ("two characters, both right", share(f"{PAIR}: both")),
                ("each of the two", share(f"{PAIR}: each")),
            ],
        ),
        table(
            "What it takes, mean (lowest to highest) of all characters and seeds",
            [
                ("values", cost("values", lambda value: f"{value:,.0f}")),
                ("file", cost("size", show_bytes)),
                ("training", cost("seconds", lambda value: f"{value:,.1f} s")),
                ("from pictures to file", cost("whole_seconds", lambda value: f"{value:,.1f} s")),
                ("peak memory", cost("peak", lambda value: f"{value / 2**20:,.0f} MiB")),
                ("loading", cost("load_seconds", lambda value: f"{1000 * value:,.0f} ms")),
            ],
            learns,
        ),
    ]


def shares(rows: Sequence[Row], method: str, names: Sequence[str]) -> list[float]:
    """Return the share of some counts together, one for each seed; the characters are added up."""
    found = []
    for seed in sorted({row.seed for row in rows}):
        counts = [
            row.counts[name]
            for row in rows
            for name in names
            if row.method == method and row.seed == seed and name in row.counts
        ]
        total = reduce(add, counts, Count()).share
        if total is not None:
            found.append(total)
    return found


def show_spread(values: Sequence[float], digits: int = 2) -> str:
    """Return mean, lowest and highest as one cell; empty where there is nothing."""
    return show_range(values, lambda value: f"{value:.{digits}f}")


def show_range(values: Sequence[float], write: Callable[[float], str]) -> str:
    """Return mean, lowest and highest in words of one's own; the mean alone where all read the same."""
    if not values:
        return ""
    middle, low, high = (write(value) for value in (mean(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def show_bytes(value: float) -> str:
    """Return a number of bytes."""
    return f"{value / 1e6:,.1f} MB" if value >= 1e6 else f"{value / 1e3:,.1f} kB"
