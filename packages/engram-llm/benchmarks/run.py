"""Measure engram-llm: `python packages/engram-llm/benchmarks/run.py [NAME ...] [--quick] [--write]`.

Every comparison is made side by side in one run, its cases in turn. `--write` keeps the outcome in `results.json`
and puts the tables into `docs/benchmarks.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The measuring code is engram-core's, and scripts rather than a package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "engram-core" / "benchmarks"))

from report import main

NAMES = ("adaptation", "forward", "hashing", "step")
RESULTS = Path(__file__).with_name("results.json")
LIBRARIES = ("numpy", "torch", "transformers", "peft")

if __name__ == "__main__":
    sys.exit(main("engram-llm", NAMES, RESULTS, libraries=LIBRARIES, devices=("cpu", "cuda")))
