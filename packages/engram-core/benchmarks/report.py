"""What the packages' benchmarks share beside measuring: the command line, the tables shown, the outcome kept."""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path

from measure import Outcome

PAGE = Path(__file__).resolve().parents[3] / "docs" / "benchmarks.md"


def main(
    package: str,
    names: Sequence[str],
    results: Path,
    *,
    libraries: Sequence[str],
    devices: Sequence[str] = (),
) -> int:
    """Run the benchmarks chosen on the command line; return the exit status, 1 when a bound is missed.

    Args:
        package: what is measured.
        names: the benchmarks: modules with a function `run`.
        results: JSON file for what `--write` keeps.
        libraries: distributions whose versions are kept with the results.
        devices: what `--device` may be, the default first; none for code that knows no devices.
    """
    parser = argparse.ArgumentParser(description=f"Measure {package}.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(names)}; all when left out")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats, for a first look")
    parser.add_argument("--write", action="store_true", help=f"keep the outcome in {results.name} and docs/{PAGE.name}")
    if devices:
        parser.add_argument("--device", choices=devices, default=devices[0], help="where to compute")
    options = parser.parse_args()
    unknown = set(options.names) - set(names)
    if unknown:
        parser.error(f"no benchmark {min(unknown)!r}; there are {', '.join(names)}")
    if options.quick and options.write:
        parser.error("--quick measures too little to be written down")
    where = {"device": options.device} if devices else {}
    # Figures of another device have marks of their own in the documentation.
    suffix = f", {options.device}" if devices and options.device != devices[0] else ""
    if options.write:
        for name in options.names or names:
            split_page(name + suffix)  # fails early when there is no place for them

    kept = True
    for name in options.names or names:
        print(f"== {name}{suffix}", flush=True)
        outcome: Outcome = importlib.import_module(name).run(quick=options.quick, **where)
        for table in outcome.all_tables():
            print(f"\n{table.plain()}")
        for note in outcome.notes:
            print(f"\nNote: {note}")
        print(flush=True)
        kept &= all(bound.met for bound in outcome.bounds)
        if options.write:
            write_results(results, name + suffix, outcome, describe_machine(libraries))
            write_page(name + suffix, outcome)
    return 0 if kept else 1


def describe_machine(libraries: Sequence[str]) -> dict[str, str]:
    """Return the machine in general words, and what runs on it."""
    return {
        "cores": str(os.cpu_count()),
        "machine": f"{platform.machine()} {platform.system()}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in libraries},
    }


def write_results(path: Path, name: str, outcome: Outcome, machine: Mapping[str, str]) -> None:
    """Replace one benchmark's figures in a JSON file."""
    results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results[name] = {"machine": dict(machine), **outcome.to_json()}
    path.write_text(json.dumps(results, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def write_page(name: str, outcome: Outcome) -> None:
    """Replace one benchmark's tables in the documentation, between their marks."""
    before, after = split_page(name)
    blocks = [table.markdown() for table in outcome.all_tables()] + [f"Note: {note}" for note in outcome.notes]
    PAGE.write_text("\n\n".join([before, *blocks, after]), encoding="utf-8")


def split_page(name: str) -> tuple[str, str]:
    """Return the documentation up to the mark that begins a benchmark's tables, and from the one that ends them."""
    text = PAGE.read_text(encoding="utf-8")
    begin, end = f"<!-- figures: {name} -->", f"<!-- end of figures: {name} -->"
    before, found, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{PAGE} lacks the marks {begin} and {end}")
    return before + begin, end + after
