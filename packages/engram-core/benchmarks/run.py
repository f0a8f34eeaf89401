"""Measure engram-core: `python packages/engram-core/benchmarks/run.py [NAME ...] [--quick] [--write]`.

Every comparison is made side by side in one run, its cases in turn. `--write` keeps the outcome in `results.json`
and puts the tables into `docs/benchmarks.md`.
"""

from __future__ import annotations

import sys
from pathlib import Path

from report import main

NAMES = ("matching", "merging", "opening", "startup")
RESULTS = Path(__file__).with_name("results.json")

if __name__ == "__main__":
    sys.exit(main("engram-core", NAMES, RESULTS, libraries=("numpy",)))
