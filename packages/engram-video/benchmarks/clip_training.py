"""Training on clips: a step with the frozen models' work kept and without, of an engram and of LoRA.

On a GPU also what gradient checkpointing and low memory cost and save. Run through `run.py`. Each measurement is a
fresh process (`clip_steps.py`); the ways take turns.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from children import run_script
from measure import Outcome, Spread, Table
from quiet import LIMIT, wait_for_quiet
from wan_models import LAYERS, write_clips

from engram_video.wan22 import WAN22

HERE = Path(__file__).parent
OURS, MODEL = "engram", "(the whole model, loaded)"
WAYS: Mapping[str, Mapping[str, Any]] = {
    OURS: {"kind": "engram"},
    "engram, nothing cached": {"kind": "engram", "cached": False},
    "LoRA, the same caches": {"kind": "LoRA"},
    "LoRA, nothing cached": {"kind": "LoRA", "cached": False},
}
SAVING: Mapping[str, Mapping[str, Any]] = {
    "engram, gradient checkpointing": {"kind": "engram", "gradient_checkpointing": True},
    "engram, low memory": {"kind": "engram", "low_memory": True},
    "LoRA, the same caches, gradient checkpointing": {"kind": "LoRA", "gradient_checkpointing": True},
}
MIB = 1 << 20
REPEATS = 10  # of a measurement that others disturbed

Sample = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """A model, clips and a batch.

    Attributes:
        name: for the table's title.
        model: `tiny`, or `full` for random weights of TI2V-5B's widths.
        width, height, frames, batch_size, precision: of the steps.
        ways: what is compared.
        rounds: processes for each way.
        warm_up, steps: steps in a process that are not timed, and that are.
    """

    name: str
    model: str
    width: int
    height: int
    frames: int = 9
    batch_size: int
    precision: str
    ways: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: WAYS)
    rounds: int
    warm_up: int
    steps: int


def tiny(batch_size: int) -> Size:
    """Return the steps on the tiny checkpoint."""
    return Size(
        name=f"Tiny model, 64 × 64, batch of {batch_size}, fp32",
        model="tiny",
        width=64,
        height=64,
        batch_size=batch_size,
        precision="fp32",
        rounds=2,
        warm_up=3,
        steps=20,
    )


BATCH = int(WAN22.tiny_train["batch_size"])
SIZES = {
    "cpu": (
        tiny(BATCH),
        tiny(1),
        Size(
            name=f"TI2V-5B's widths, {LAYERS['cpu'][0]} of 30 layers, {LAYERS['cpu'][1]} of UMT5's 24, 256 × 256, bf16",
            model="full",
            width=256,
            height=256,
            batch_size=1,
            precision="bf16",
            rounds=1,
            warm_up=1,
            steps=2,
        ),
    ),
    "cuda": (
        tiny(BATCH),
        Size(
            name="TI2V-5B's size, 1280 × 704, batch of 1, bf16",
            model="full",
            width=1280,
            height=704,
            batch_size=1,
            precision="bf16",
            ways={**WAYS, **SAVING},
            rounds=1,
            warm_up=2,
            steps=6,
        ),
    ),
}


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    tables, notes, figures = [], [], {}
    sizes = SIZES[device][:1] if quick else SIZES[device]
    checkpoint = Checkpoint.find()
    with tempfile.TemporaryDirectory(prefix="engram-clip-training-") as name:
        folder = Path(name)
        for size in sizes:
            model = checkpoint.model if size.model == "tiny" else _write_model(folder / "model", device)
            samples = _measure(folder, model, size, device, quick=quick)
            threads = samples[MODEL][0]["threads"]
            tables.append(_table(size, samples, "GPU" if device == "cuda" else f"{threads} threads"))
            figures[size.name] = _figures(samples)
            disturbed = sum(sample["others"] > LIMIT for found in samples.values() for sample in found)
            if disturbed:
                notes.append(f"{size.name}: other programs computed during {disturbed} of the measurements.")
    return Outcome(tables=tables, notes=notes, figures=figures)


def _write_model(folder: Path, device: str) -> str:
    """Write a model of TI2V-5B's widths, unless it is there, and return where it is."""
    if not folder.exists():
        print("writing a model of TI2V-5B's widths ...", file=sys.stderr, flush=True)
        run_script(HERE / "wan_models.py", device, str(folder))
    return str(folder)


def _measure(folder: Path, model: str, size: Size, device: str, *, quick: bool) -> dict[str, list[Sample]]:
    """Return the samples of all ways, one process each in turn."""
    rounds, warm_up, steps, repeats = (1, 1, 2, 0) if quick else (size.rounds, size.warm_up, size.steps, REPEATS)
    data = folder / f"clips-{size.width}-{size.height}"
    if not data.exists():
        write_clips(data, size.width, size.height, size.frames)
    samples: dict[str, list[Sample]] = {}
    for number in range(rounds):
        ways: Mapping[str, Mapping[str, Any]] = {MODEL: {"kind": "model"}} if number == 0 else {}
        for way, options in {**ways, **size.ways}.items():
            print(f"{size.name}, round {number + 1} of {rounds}: {way} ...", file=sys.stderr, flush=True)
            task = {
                "way": way,
                **options,
                "model": model,
                "data": str(data),
                "width": size.width,
                "height": size.height,
                "frames": size.frames,
                "batch_size": size.batch_size,
                "precision": size.precision,
                "device": device,
                "warm_up": warm_up,
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
        printed = run_script(HERE / "clip_steps.py", json.dumps({**task, "scratch": scratch}))
    sample: Sample = json.loads(printed.splitlines()[-1])
    return sample


def _table(size: Size, samples: Mapping[str, Sequence[Sample]], where: str) -> Table:
    model = samples[MODEL][0]["step_peak"]
    rows = [(MODEL, "", "", f"{model / MIB:,.0f} MiB", "", "")]
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
                f"{step_peak / MIB:,.0f} MiB",
                f"{peak / MIB:,.0f} MiB",
                f"{found[0]['learned']:,}",
            )
        )
    return Table(
        title=f"{size.name}, {size.frames} frames, {where}; one step, median (10th to 90th percentile)",
        columns=("", "step", "beside engram", "most memory in the steps", "before them too", "learned"),
        rows=rows,
    )


def _spread(samples: Sequence[Sample]) -> Spread:
    return Spread.of([seconds for sample in samples for seconds in sample["seconds"]])


def _ratio(samples: Sequence[Sample], ours: Sequence[Sample]) -> float:
    """Return the median over the rounds of one way's median step in relation to ours of the same round."""
    pairs = zip(samples, ours, strict=True)
    ratios = [statistics.median(theirs["seconds"]) / statistics.median(own["seconds"]) for theirs, own in pairs]
    return float(statistics.median(ratios))


def _figures(samples: Mapping[str, Sequence[Sample]]) -> dict[str, Any]:
    model = samples[MODEL][0]
    figures: dict[str, Any] = {"threads": model["threads"], "model_bytes": model["step_peak"]}
    for way, found in samples.items():
        if way != MODEL:
            figures[way] = {
                "median_s": _spread(found).median,
                "ratio": _ratio(found, samples[OURS]),
                "peak_bytes": max(sample["peak"] for sample in found),
                "step_peak_bytes": max(sample["step_peak"] for sample in found),
                "learned": found[0]["learned"],
            }
    return figures
