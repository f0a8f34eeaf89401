"""What the benchmarks kept in `results.json`, ready to be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

NOT_YET = "*Not measured yet.*"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """A figure of several seeds.

    Attributes:
        seeds: the value of each.
    """

    seeds: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Of all seeds."""
        return mean(self.seeds)

    @property
    def low(self) -> float:
        """The least of them."""
        return min(self.seeds)

    @property
    def high(self) -> float:
        """The most of them."""
        return max(self.seeds)

    def overlaps(self, other: Spread) -> bool:
        """Tell whether the seeds of both lie among one another."""
        return self.low <= other.high and other.low <= self.high

    def show(self, digits: int = 2) -> str:
        """Return mean, lowest and highest."""
        if self.low == self.high:
            return f"{self.mean:.{digits}f}"
        return f"{self.mean:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


@dataclass(frozen=True)
class Comparison:
    """The rows of a benchmark: what each method made of each character and seed.

    Attributes:
        content: of one benchmark in a `results.json`.
    """

    content: Mapping[str, Any]

    @cached_property
    def rows(self) -> list[Mapping[str, Any]]:
        """All rows."""
        return list(self.content["figures"]["rows"])

    @cached_property
    def methods(self) -> list[str]:
        """Their methods, in order."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    def share(self, method: str, *names: str) -> Spread | None:
        """Return the share that some counts have together, by seed; None where nothing was counted.

        Args:
            method: whose rows.
            names: of the counts, of which characters and names are added up.
        """
        found: dict[int, list[float]] = {}
        for row in self.rows:
            for name in names:
                if row["method"] == method and name in row["counts"]:
                    right, count = row["counts"][name].split(" of ")
                    total = found.setdefault(row["seed"], [0.0, 0.0])
                    total[0] += float(right)
                    total[1] += float(count)
        seeds = tuple(right / count for _, (right, count) in sorted(found.items()) if count)
        return Spread(seeds=seeds) if seeds else None

    def cost(self, method: str, name: str) -> float | None:
        """Return the mean of a cost; None where there is none."""
        values = [row["costs"][name] for row in self.rows if row["method"] == method and name in row["costs"]]
        return mean(values) if values else None


def read_results(path: Path, name: str) -> Mapping[str, Any] | None:
    """Return what a benchmark kept, or None when it was not run."""
    if not path.exists():
        return None
    results: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return results.get(name)


def show_machine(machine: Mapping[str, str], libraries: Sequence[str] = ("torch", "diffusers", "peft")) -> str:
    """Return the machine and the libraries in a few words."""
    versions = ", ".join(f"{name} {machine[name]}" for name in libraries if name in machine)
    return f"{machine['cores']} cores, {machine['machine']}, Python {machine['python']}, {versions}"
