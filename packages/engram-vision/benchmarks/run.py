"""Measure engram-vision: `python packages/engram-vision/benchmarks/run.py [NAME ...] [--quick] [--write]`.

Every comparison is made side by side in one run, its cases in turn. `--write` keeps the outcome in `results.json`
and puts the tables into `docs/benchmarks.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The measuring code is engram-core's, and scripts rather than a package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "engram-core" / "benchmarks"))

from report import main

NAMES = (
    "training",
    "concepts",
    "encoding",
    "generating",
    "rates",
    "comparison",
    "comparison_sd35",
    "strengths",
    "accumulation",
    "scale",
)
RESULTS = Path(__file__).with_name("results.json")
LIBRARIES = ("numpy", "torch", "diffusers", "transformers", "peft")

if __name__ == "__main__":
    sys.exit(main("engram-vision", NAMES, RESULTS, libraries=LIBRARIES, devices=("cpu", "cuda")))
