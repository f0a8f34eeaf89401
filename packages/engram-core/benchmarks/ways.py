"""Ways of doing the same, each measured in processes of its own that take turns: what the samples come to."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from children import run_script
from measure import Spread
from quiet import LIMIT, wait_for_quiet

MIB = 1 << 20
_REPEATS = 10  # of a measurement that others disturbed

Sample = dict[str, Any]
"""What `timed.main` prints."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ways:
    """The samples of one size.

    Attributes:
        ours: the way that others are compared with.
        model: the way that only loads the model.
        samples: by way.
    """

    ours: str
    model: str
    samples: Mapping[str, Sequence[Sample]]

    @property
    def threads(self) -> int:
        """How many threads computed."""
        return int(self.samples[self.model][0]["threads"])

    @property
    def model_bytes(self) -> int:
        """Memory of the model alone."""
        return int(self.samples[self.model][0]["step_peak"])

    @property
    def compared(self) -> list[str]:
        """The ways that do steps."""
        return [way for way in self.samples if way != self.model]

    @property
    def disturbed(self) -> int:
        """How many measurements other programs disturbed."""
        return sum(sample["others"] > LIMIT for found in self.samples.values() for sample in found)

    def spread(self, way: str) -> Spread:
        """Return the spread of a way's steps."""
        return Spread.of([seconds for sample in self.samples[way] for seconds in sample["seconds"]])

    def ratio(self, way: str) -> float:
        """Return the median over the rounds of a way's median step in relation to ours of the same round."""
        pairs = zip(self.samples[way], self.samples[self.ours], strict=True)
        ratios = [statistics.median(theirs["seconds"]) / statistics.median(own["seconds"]) for theirs, own in pairs]
        return float(statistics.median(ratios))

    def peak(self, way: str, which: str = "peak") -> int:
        """Return the most memory of a way: `peak`, or in the steps `step_peak`."""
        return max(int(sample[which]) for sample in self.samples[way])

    def cells(self, way: str) -> tuple[str, str]:
        """Return a way's step, and how much longer it takes than ours."""
        spread = self.spread(way)
        ratio = "" if way == self.ours else f"{self.ratio(way):.2f} times"
        return spread.show("s" if spread.median > 1 else "ms"), ratio

    def figures(self, counts: Sequence[str]) -> dict[str, Any]:
        """Return the figures to keep.

        Args:
            counts: further values of a sample.
        """
        figures: dict[str, Any] = {"threads": self.threads, "model_bytes": self.model_bytes}
        for way in self.compared:
            figures[way] = {
                "median_s": self.spread(way).median,
                "ratio": self.ratio(way),
                "peak_bytes": self.peak(way),
                "step_peak_bytes": self.peak(way, "step_peak"),
                **{name: self.samples[way][0][name] for name in counts},
            }
        return figures


def take_turns(
    script: Path, folder: Path, title: str, rounds: Sequence[Mapping[str, Mapping[str, Any]]], *, repeat: bool
) -> dict[str, list[Sample]]:
    """Return the samples of all ways, one process each in turn.

    Args:
        script: does the steps of one way, see `timed`.
        folder: for what it writes.
        title: of the size, for messages.
        rounds: for each the tasks by way.
        repeat: whether a measurement that others disturbed is made again.
    """
    samples: dict[str, list[Sample]] = {}
    for number, tasks in enumerate(rounds, start=1):
        for way, task in tasks.items():
            print(f"{title}, round {number} of {len(rounds)}: {way} ...", file=sys.stderr, flush=True)
            samples.setdefault(way, []).append(_run_undisturbed(script, folder, task, _REPEATS if repeat else 0))
    return samples


def tell_disturbed(name: str, ways: Ways) -> Iterator[str]:
    """Yield a note where other programs disturbed measurements."""
    if ways.disturbed:
        yield f"{name}: other programs computed during {ways.disturbed} of the measurements."


def _run_undisturbed(script: Path, folder: Path, task: Mapping[str, Any], repeats: int) -> Sample:
    for _ in range(repeats):
        wait_for_quiet()
        sample = _run_once(script, folder, task)
        if sample["others"] <= LIMIT:
            return sample
    return _run_once(script, folder, task)


def _run_once(script: Path, folder: Path, task: Mapping[str, Any]) -> Sample:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        printed = run_script(script, json.dumps({**task, "scratch": scratch}))
    sample: Sample = json.loads(printed.splitlines()[-1])
    return sample
