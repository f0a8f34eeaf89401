"""Paired timing: every case is timed beside the bare one, round by round, and the ratios are what counts."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TypeVar

import torch
from quiet import Others, wait_for_quiet

Case = TypeVar("Case", bound=Hashable)
Call = Callable[[], object]

BARE, AGAIN = "bare", "bare again"
_WARM_UP = 3  # rounds
_BLOCK = 2.0  # seconds of rounds that count, or that do not because other programs disturbed them
_REPEATS = 200  # of blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """What a case takes in relation to the bare one.

    Attributes:
        median: of the rounds' ratios.
        low, high: between these the true median lies, with 95 % confidence.
        p10, p90: 10th and 90th percentile of the rounds' ratios.
    """

    median: float
    low: float
    high: float
    p10: float
    p90: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """Summarise ratios; the interval is that of order statistics, which assumes no distribution."""
        ordered, count = sorted(values), len(values)
        reach = 0.98 * count**0.5
        return cls(
            median=statistics.median(ordered),
            low=ordered[max(0, int(count / 2 - reach))],
            high=ordered[min(count - 1, int(count / 2 + reach))],
            p10=ordered[count // 10],
            p90=ordered[min(count - 1, count * 9 // 10)],
        )

    def show(self) -> str:
        """Return the median and its confidence interval as one cell."""
        return f"{self.median:.4f} ({self.low:.4f} to {self.high:.4f})"


def time_rounds(cases: Mapping[Case, Callable[[int], Call]], rounds: int, device: str) -> dict[Case, list[float]]:
    """Return the seconds of each case in each round.

    Args:
        cases: name to what prepares, out of the round's number, the call that is timed.
        rounds: how often each case comes, each time at another place of the round.
        device: its queue is emptied before a clock is read.
    """
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    order, shuffle = list(cases), random.Random(0).shuffle
    for number in range(_WARM_UP):
        for case in order:
            cases[case](number)()
    others, repeats, done = Others(), 0, 0
    while done < rounds:
        others.restart()
        end = perf_counter() + _BLOCK
        block = []
        while len(block) < rounds - done and (not block or perf_counter() < end):
            shuffle(order)
            block.append({case: time_call(cases[case](done + len(block)), device) for case in order})
        if others.disturbed() and repeats < _REPEATS:
            repeats += 1
            wait_for_quiet()
            continue
        done += len(block)
        for timed in block:
            for case, elapsed in timed.items():
                seconds[case].append(elapsed)
    return seconds


def time_call(call: Call, device: str) -> float:
    """Return how long a call takes, in seconds."""
    wait = torch.cuda.synchronize if device == "cuda" else _do_nothing
    wait()
    start = perf_counter()
    call()
    wait()
    return perf_counter() - start


def relate(seconds: Mapping[Case, Sequence[float]], case: Case) -> Ratio:
    """Return a case in relation to the bare one of the same rounds, which is timed twice but for its own noise."""
    once, twice = seconds[BARE], seconds[AGAIN]  # type: ignore[index]
    if case == AGAIN:
        return Ratio.of([b / a for a, b in zip(once, twice, strict=True)])
    return Ratio.of([2 * own / (a + b) for own, a, b in zip(seconds[case], once, twice, strict=True)])


def _do_nothing() -> None:
    pass
