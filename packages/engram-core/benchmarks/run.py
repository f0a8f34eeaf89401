"""Measure engram-core: `python packages/engram-core/benchmarks/run.py [NAME ...] [--quick] [--write]`.

Every comparison is made side by side in one run, its cases in turn. `--write` keeps the outcome in `results.json`
and puts the tables into `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
from measure import Outcome

NAMES = ("matching", "merging", "opening", "startup")
RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"


def main() -> int:
    """Run the chosen benchmarks; the exit status is 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description="Measure engram-core.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(NAMES)}; all when left out")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats, for a first look")
    parser.add_argument("--write", action="store_true", help="keep the outcome in results.json and docs/benchmarks.md")
    options = parser.parse_args()
    unknown = set(options.names) - set(NAMES)
    if unknown:
        parser.error(f"no benchmark {min(unknown)!r}; there are {', '.join(NAMES)}")
    if options.quick and options.write:
        parser.error("--quick measures too little to be written down")

    kept = True
    for name in options.names or NAMES:
        print(f"== {name}", flush=True)
        outcome: Outcome = importlib.import_module(name).run(quick=options.quick)
        for table in outcome.all_tables():
            print(f"\n{table.plain()}")
        for note in outcome.notes:
            print(f"\nNote: {note}")
        print(flush=True)
        kept &= all(bound.met for bound in outcome.bounds)
        if options.write:
            write_results(name, outcome)
            write_page(name, outcome)
    return 0 if kept else 1


def describe_machine() -> dict[str, str]:
    """Return the machine in general words."""
    return {
        "cores": str(os.cpu_count()),
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def write_results(name: str, outcome: Outcome) -> None:
    """Replace one benchmark's figures in `results.json`."""
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    results[name] = {"machine": describe_machine(), **outcome.to_json()}
    RESULTS.write_text(json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(name: str, outcome: Outcome) -> None:
    """Replace one benchmark's tables in the documentation, between their marks."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- figures: {name} -->", f"<!-- end of figures: {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE} lacks the marks {begin} and {end}")
    blocks = [table.markdown() for table in outcome.all_tables()] + [f"Note: {note}" for note in outcome.notes]
    PAGE.write_text(before + begin + "\n\n" + "\n\n".join(blocks) + "\n\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
