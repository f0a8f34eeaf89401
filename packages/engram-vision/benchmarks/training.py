"""Training: a step of an engram beside the same step without caches, textual inversion and LoRA.

All on the same model, pictures and number types; for Stable Diffusion 3.5 the caches alone are compared.

Run through `run.py`. Each measurement is a fresh process (`steps.py`); the ways take turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import write_pictures
from children import run_script
from measure import Outcome, Spread, Table
from quiet import LIMIT, wait_for_quiet

HERE = Path(__file__).parent
OURS = "engram"
CACHES = (OURS, "engram, nothing cached")
WAYS = (
    *CACHES,
    "textual inversion",
    "textual inversion, latents cached",
    "LoRA",
    "LoRA, latents and texts cached",
)
MIB = 1 << 20
REPEATS = 10  # of a measurement that others disturbed

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model and a batch.

    Attributes:
        name: for the table's title.
        backbone: `sd15` or `sd35`.
        model: `tiny`, or `full` for random weights of Stable Diffusion 1.5's size.
        resolution, batch_size, precision: of the steps.
        rounds: processes for each way.
        warm_up, steps: steps in a process that are not timed, and that are.
    """

    name: str
    backbone: str = "sd15"
    model: str
    resolution: int
    batch_size: int
    precision: str
    rounds: int
    warm_up: int
    steps: int

    @property
    def ways(self) -> tuple[str, ...]:
        """What is compared."""
        return WAYS if self.backbone == "sd15" else CACHES


TINY = {"model": "tiny", "resolution": 64, "precision": "fp32", "rounds": 2, "warm_up": 3, "steps": 20}
FULL = {"model": "full", "batch_size": 1, "precision": "bf16", "rounds": 1, "warm_up": 1, "steps": 2}
SIZES = {
    "cpu": (
        Size(name="Tiny model, 64 px, batch of 4, fp32", batch_size=4, **TINY),
        Size(name="Tiny model, 64 px, batch of 10, fp32", batch_size=10, **TINY),
        Size(name="SD1.5's size, 512 px, batch of 1, bf16", resolution=512, **FULL),
        Size(name="Tiny SD3.5, 64 px, batch of 1, fp32", backbone="sd35", batch_size=1, **TINY),
        Size(name="Tiny SD3.5, 64 px, batch of 10, fp32", backbone="sd35", batch_size=10, **TINY),
    ),
    "cuda": (
        Size(name="Tiny model, 64 px, batch of 4, fp32", batch_size=4, **TINY),
        Size(
            name="SD1.5's size, 512 px, batch of 4, bf16",
            **FULL | {"resolution": 512, "batch_size": 4, "rounds": 3, "warm_up": 3, "steps": 15},
        ),
        Size(
            name="SD3.5-medium's size, 1024 px, batch of 1, bf16",
            backbone="sd35",
            **FULL | {"resolution": 1024, "rounds": 2, "warm_up": 3, "steps": 10},
        ),
    ),
}


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    tables, notes, figures = [], [], {}
    sizes = SIZES[device][:1] if quick else SIZES[device]
    with tempfile.TemporaryDirectory(prefix="engram-training-") as name:
        folder = Path(name)
        models: dict[str, str] = {}
        for size in sizes:
            if size.model != "tiny" and size.backbone not in models:
                models[size.backbone] = _write_model(folder, size.backbone)
            model = "tiny" if size.model == "tiny" else models[size.backbone]
            samples = _measure(folder, model, size, device, quick=quick)
            threads = samples["model"][0]["threads"]
            tables.append(_table(size, samples, "GPU" if device == "cuda" else f"{threads} threads"))
            figures[size.name] = _figures(samples)
            disturbed = sum(sample["others"] > LIMIT for found in samples.values() for sample in found)
            if disturbed:
                notes.append(f"{size.name}: other programs computed during {disturbed} of the measurements.")
    return Outcome(tables=tables, notes=notes, figures=figures)


def _write_model(folder: Path, backbone: str) -> str:
    """Write a model of a backbone's full size and return where it is."""
    print(f"writing a model of {backbone}'s size ...", file=sys.stderr, flush=True)
    target = folder / backbone
    run_script(HERE / "checkpoints.py", backbone, str(target))
    return str(target / "model")


def _measure(folder: Path, model: str, size: Size, device: str, *, quick: bool) -> dict[str, list[Sample]]:
    """Return the samples of all ways, one process each in turn."""
    rounds, steps, repeats = (1, 3, 0) if quick else (size.rounds, size.steps, REPEATS)
    data = folder / f"pictures-{size.resolution}"
    if not data.exists():
        write_pictures(data, size.resolution)
    samples: dict[str, list[Sample]] = {}
    for number in range(rounds):
        for way in ("model", *size.ways) if number == 0 else size.ways:
            print(f"{size.name}, round {number + 1} of {rounds}: {way} ...", file=sys.stderr, flush=True)
            task = {
                "way": way,
                "backbone": size.backbone,
                "model": model,
                "data": str(data),
                "resolution": size.resolution,
                "batch_size": size.batch_size,
                "precision": size.precision,
                "device": device,
                "warm_up": size.warm_up,
                "steps": steps,
            }
            samples.setdefault(way, []).append(_run_undisturbed(folder, task, repeats=repeats))
    return samples


def _run_undisturbed(folder: Path, task: Mapping[str, Any], *, repeats: int) -> Sample:
    """Return a sample; does it again while other programs computed meanwhile."""
    for _ in range(repeats):
        wait_for_quiet()
        sample = _run_child(folder, task)
        if sample["others"] <= LIMIT:
            return sample
    return _run_child(folder, task)


def _run_child(folder: Path, task: Mapping[str, Any]) -> Sample:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        printed = run_script(HERE / "steps.py", json.dumps({**task, "scratch": scratch}))
    sample: Sample = json.loads(printed.splitlines()[-1])
    return sample


def _table(size: Size, samples: Mapping[str, Sequence[Sample]], threads: str) -> Table:
    model = samples["model"][0]["step_peak"]
    rows = [("(the model alone)", "", "", f"{model / MIB:,.0f} MiB", "", "", "")]
    for way in size.ways:
        found = samples[way]
        spread = _spread(found)
        ratio = "" if way == OURS else f"{_ratio(found, samples[OURS]):.2f} times"
        peak, step_peak = (max(sample[name] for sample in found) for name in ("peak", "step_peak"))
        rows.append(
            (
                way,
                spread.show("s" if spread.median > 1 else "ms"),
                ratio,
                f"{peak / MIB:,.0f} MiB",
                f"{(step_peak - model) / MIB:+,.0f} MiB",
                f"{found[0]['learned']:,}",
                f"{found[0]['optimised']:,}",
            )
        )
    return Table(
        title=f"{size.name}, {threads}; one step, median (10th to 90th percentile)",
        columns=("", "step", "beside engram", "peak memory", "steps against the model alone", "learned", "optimised"),
        rows=rows,
    )


def _spread(samples: Sequence[Sample]) -> Spread:
    return Spread.of([seconds for sample in samples for seconds in sample["seconds"]])


def _ratio(samples: Sequence[Sample], ours: Sequence[Sample]) -> float:
    """Return the median over the rounds of one way's median step in relation to ours of the same round."""
    pairs = zip(samples, ours, strict=True)
    return statistics.median(
        statistics.median(theirs["seconds"]) / statistics.median(own["seconds"]) for theirs, own in pairs
    )


def _figures(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    model = samples["model"][0]
    figures: dict[str, Any] = {"threads": model["threads"], "model_bytes": model["step_peak"]}
    for way, found in samples.items():
        if way == "model":
            continue
        figures[way] = {
            "median_s": _spread(found).median,
            "ratio": _ratio(found, samples[OURS]),
            "peak_bytes": max(sample["peak"] for sample in found),
            "step_peak_bytes": max(sample["step_peak"] for sample in found),
            "learned": found[0]["learned"],
            "optimised": found[0]["optimised"],
        }
    return figures
