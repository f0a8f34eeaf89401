"""Learning rates over the steps of a run."""

from __future__ import annotations

import math
from typing import Literal

__all__ = ["rate_factor"]


def rate_factor(step: int, *, steps: int, warm_up: int, schedule: Literal["linear", "cosine", "constant"]) -> float:
    """Return the share of the peak rate for a step, 0 < f <= 1, as schedules of these names in diffusers.

    Args:
        step: from 0.
        steps: in all.
        warm_up: steps of linear rise; at most `steps` count.
        schedule: what follows.
    """
    warm_up = min(warm_up, steps)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    if schedule == "constant":
        return 1.0
    left = (steps - step) / max(1, steps - warm_up)
    return left if schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))
