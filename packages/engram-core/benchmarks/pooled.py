"""Runs of a comparison, each in a process of its own, so that its memory is its own as well."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Job = TypeVar("Job")


def make_all(make: Callable[[Job], str], jobs: Sequence[Job], *, device: str) -> None:
    """Make some runs and tell of each that is done.

    On a CPU as many at a time as there are cores, with a thread each: small models gain little from a second one. On a
    GPU one after the other.

    Args:
        make: makes and keeps a run; returns its name. A function of a module, as its argument goes to other processes.
        jobs: what to make.
        device: where it computes.
    """
    if not jobs:
        return
    at_once = 1 if device == "cuda" else os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    with context.Pool(at_once, torch.set_num_threads, (1,), maxtasksperchild=1) as pool:
        for done, name in enumerate(pool.imap_unordered(make, jobs), start=1):
            print(f"{done} of {len(jobs)}: {name}", file=sys.stderr, flush=True)
