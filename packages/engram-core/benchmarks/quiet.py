"""Whether other programs computed meanwhile: threads that wait for each other take many times as long beside them."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from time import perf_counter, sleep

LIMIT = 0.05  # processors' worth of other work that a measurement bears
_TICK = 0.01  # seconds, the unit of /proc/stat on Linux


class Others:
    """Measures the processor time that other programs took since `restart`."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin anew."""
        self._start, self._all, self._own = perf_counter(), _read_busy(), _read_own()

    def share(self) -> float:
        """Return how many processors others kept busy on average; 0 where the system does not tell."""
        elapsed = perf_counter() - self._start
        others = (_read_busy() - self._all) - (_read_own() - self._own)
        # The counters advance by ticks, one for each processor.
        return max(0.0, others - 2 * _TICK * (os.cpu_count() or 1)) / elapsed

    def disturbed(self) -> bool:
        """Tell whether a measurement is worth nothing."""
        return self.share() > LIMIT


def wait_for_quiet(seconds: float = 600) -> bool:
    """Wait until nothing computes for a few seconds; return whether that came within some time."""
    end, others = perf_counter() + seconds, Others()
    while perf_counter() < end:
        sleep(3)
        if not others.disturbed():
            return True
        print("waiting: other programs are computing ...", file=sys.stderr, flush=True)
        others.restart()
    return False


def _read_busy() -> float:
    """Return the seconds in which processors worked, or were taken away from this machine, since it started."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return 0.0
    user, nice, system, _, _, irq, soft_irq, steal = map(int, fields[:8])
    return (user + nice + system + irq + soft_irq + steal) * _TICK


def _read_own() -> float:
    times = os.times()
    return times.user + times.system
