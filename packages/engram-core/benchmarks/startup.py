"""Starting up: fresh processes of the command line and of `import engram_core`, in turn.

Run through `run.py`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from measure import Bound, Outcome, Spread, Table

FLOOR = "import typer, rich.console"  # what a command line in Typer and Rich cannot do without


def run(*, quick: bool) -> Outcome:
    """Measure everything."""
    engram = shutil.which("engram", path=str(Path(sys.executable).parent))
    notes = []
    with tempfile.TemporaryDirectory(prefix="engram-startup-") as name:
        commands = {
            "python -c pass": [sys.executable, "-c", "pass"],
            "import numpy": [sys.executable, "-c", "import numpy"],
            "import engram_core": [sys.executable, "-c", "import engram_core"],
            FLOOR: [sys.executable, "-c", FLOOR],
        }
        if engram is None or subprocess.run([engram, "--help"], capture_output=True, check=False).returncode:
            notes.append("the command `engram` is not installed here; it was left out.")
        else:
            from synthetic import write_adapters

            (path,) = write_adapters(Path(name), 1, 768)
            commands["engram --help"] = [engram, "--help"]
            commands["engram inspect FILE"] = [engram, "inspect", str(path)]
        # Modules are compiled once, as after an installation, whatever this environment says about bytecode.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment["PYTHONPYCACHEPREFIX"] = str(Path(name) / "bytecode")
        seconds = _measure(commands, environment, 5 if quick else 31)
    spreads = {what: Spread.of(values) for what, values in seconds.items()}
    rows = [(f"`{what}`", spread.show("ms"), f"{spread.least * 1e3:.0f} ms") for what, spread in spreads.items()]
    table = Table(
        title="One process, median (10th to 90th percentile)", columns=("command", "time", "least"), rows=rows
    )
    bounds = [
        Bound(what=f"`{what}` against `{FLOOR}`", value=spreads[what].median / spreads[FLOOR].median, limit=limit)
        for what, limit in (("engram --help", 1.5), ("engram inspect FILE", 2))
        if what in spreads
    ]
    bounds.append(
        Bound(
            what="`import engram_core`, whole process", value=spreads["import engram_core"].median, limit=0.3, unit="s"
        )
    )
    figures: dict[str, Any] = {
        what: {"median_s": spread.median, "least_s": spread.least} for what, spread in spreads.items()
    }
    return Outcome(tables=[table], bounds=bounds, notes=notes, figures=figures)


def _measure(commands: dict[str, list[str]], environment: dict[str, str], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {what: [] for what in commands}
    for number in range(rounds + 1):  # the first round compiles, and warms the page cache
        for what, command in commands.items():
            start = perf_counter()
            subprocess.run(command, stdout=subprocess.DEVNULL, env=environment, check=True)
            if number:
                seconds[what].append(perf_counter() - start)
    return seconds
