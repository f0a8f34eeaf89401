"""The comparison in short form for Stable Diffusion 3.5: engrams and LoRA of the transformer.

Run through `run.py`; rows are kept as those of `comparison`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from comparison import Comparison, Plan
from measure import Outcome

from engram_vision.sd35 import SD35


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    if not quick:
        plan = Plan(methods=("300 steps", "LoRA"), backbone=SD35)
        return Comparison(plan, plan.work, device).run()
    plan = replace(Plan.quick(), methods=("one residual, 300", "rank 4"), characters=1, backbone=SD35)
    with tempfile.TemporaryDirectory(prefix="engram-comparison-") as folder:
        return Comparison(plan, Path(folder), device).run()
