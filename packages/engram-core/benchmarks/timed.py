"""Steps that are timed, with the memory they need: what scripts started by `ways` do and print."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from memory import Memory
from quiet import Others

from engram_core import Watcher, open_adapter

Step = Callable[[], object]


@dataclass(slots=True, kw_only=True)
class Sample:
    """What was measured.

    Attributes:
        seconds: of each timed step.
        step_peak: most memory during the steps, in bytes.
        peak: most memory of the process.
        learned: how many values are learned and kept.
        optimised: how many values the optimizer changes.
        others: processors that other programs kept busy during the steps.
    """

    seconds: Sequence[float] = ()
    step_peak: int = 0
    peak: int = 0
    learned: int = 0
    optimised: int = 0
    others: float = 0.0


class Stopwatch(Watcher):
    """Times a trainer's steps: all that happens from the end of one to the end of the next."""

    def __init__(self, device: str) -> None:
        self.seconds: list[float] = []
        self.memory, self.others = Memory(device), Others()
        self._peak_before = 0
        self._device, self._last = device, 0.0

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:  # noqa: ARG002
        """Start with the first step."""
        if title == "training":
            self._peak_before = self.memory.peak()
            self.memory.forget()
            self.others.restart()
            self._last = perf_counter()

    def advance(self, done: int, figures: Mapping[str, float] | None = None) -> None:  # noqa: ARG002
        """Note when a step ended; earlier work, which also reports here, is dropped."""
        if self._last:
            wait(self._device)
            now = perf_counter()
            self.seconds.append(now - self._last)
            self._last = now

    def sample(self, timed: slice) -> Sample:
        """Return what was measured up to now, of the steps that count."""
        step_peak = self.memory.peak()
        return Sample(
            seconds=self.seconds[timed],
            step_peak=step_peak,
            peak=max(self._peak_before, step_peak),
            others=self.others.share(),
        )


def time_steps(build: Callable[[Sample], Step], device: str, *, warm_up: int, steps: int) -> Sample:
    """Return how long steps take.

    Args:
        build: prepares, notes in the sample what is learned, and returns a step.
        device: where they compute.
        warm_up: steps that are not timed.
        steps: steps that are.
    """
    sample, memory = Sample(), Memory(device)
    step = build(sample)
    sample.peak = memory.peak()
    memory.forget()
    seconds, others = [], Others()
    for _ in range(warm_up + steps):
        start = perf_counter()
        step()
        wait(device)
        seconds.append(perf_counter() - start)
    sample.seconds, sample.others = seconds[warm_up:], others.share()
    sample.step_peak = memory.peak()
    sample.peak = max(sample.peak, sample.step_peak)
    return sample


def measure_model(load: Callable[[], Any], modules: Sequence[str], device: str) -> Sample:
    """Return the memory of a model that is only loaded.

    Args:
        load: returns the pipeline.
        modules: what it calls its parts, which it may lack.
        device: where it is.
    """
    memory = Memory(device)
    pipeline = load()
    for part in filter(None, (getattr(pipeline, name) for name in modules)):
        for parameter in part.parameters():
            parameter.detach().sum()  # weights of a file come into memory when they are first read
    return Sample(step_peak=memory.now(), peak=memory.peak())


def count_values(file: Path) -> int:
    """Return how many values an adapter has learned; entries that share a vector count once."""
    tables = open_adapter(file).streams.values()
    return sum(len(np.unique(table.vectors, axis=0)) * table.vectors[0].size + table.scales.size for table in tables)


def wait(device: str) -> None:
    """Wait until a device has done its work."""
    if device == "cuda":
        torch.cuda.synchronize()


def main(measure: Callable[[Mapping[str, Any]], Sample]) -> None:
    """Do the task that the command line tells, and print what was measured."""
    logging.disable(logging.WARNING)
    found = measure(json.loads(sys.argv[1]))
    print(json.dumps(asdict(found) | {"threads": torch.get_num_threads()}))
