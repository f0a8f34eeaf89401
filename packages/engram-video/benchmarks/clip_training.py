"""Training on clips: a step with the frozen models' work kept and without, of an engram and of LoRA.

On a GPU also what gradient checkpointing and low memory cost and save. Run through `run.py`. Each measurement is a
fresh process (`clip_steps.py`); the ways take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint import Checkpoint
from children import run_script
from measure import Outcome, Table
from wan_models import LAYERS, write_clips
from ways import MIB, Ways, take_turns, tell_disturbed

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
            ways = _measure(folder, model, size, device, quick=quick)
            tables.append(_table(size, ways, "GPU" if device == "cuda" else f"{ways.threads} threads"))
            figures[size.name] = ways.figures(("learned",))
            notes += tell_disturbed(size.name, ways)
    return Outcome(tables=tables, notes=notes, figures=figures)


def _write_model(folder: Path, device: str) -> str:
    """Write a model of TI2V-5B's widths, unless it is there, and return where it is."""
    if not folder.exists():
        print("writing a model of TI2V-5B's widths ...", file=sys.stderr, flush=True)
        run_script(HERE / "wan_models.py", device, str(folder))
    return str(folder)


def _measure(folder: Path, model: str, size: Size, device: str, *, quick: bool) -> Ways:
    """Return the samples of all ways."""
    rounds, warm_up, steps = (1, 1, 2) if quick else (size.rounds, size.warm_up, size.steps)
    data = folder / f"clips-{size.width}-{size.height}"
    if not data.exists():
        write_clips(data, size.width, size.height, size.frames)
    common = {
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
    first: Mapping[str, Mapping[str, Any]] = {MODEL: {"kind": "model"}}
    turns = [
        {
            way: {"way": way, **options, **common}
            for way, options in {**(first if number == 0 else {}), **size.ways}.items()
        }
        for number in range(rounds)
    ]
    samples = take_turns(HERE / "clip_steps.py", folder, size.name, turns, repeat=not quick)
    return Ways(ours=OURS, model=MODEL, samples=samples)


def _table(size: Size, ways: Ways, where: str) -> Table:
    rows = [(MODEL, "", "", f"{ways.model_bytes / MIB:,.0f} MiB", "", "")]
    rows += [
        (
            way,
            *ways.cells(way),
            f"{ways.peak(way, 'step_peak') / MIB:,.0f} MiB",
            f"{ways.peak(way) / MIB:,.0f} MiB",
            f"{ways.samples[way][0]['learned']:,}",
        )
        for way in size.ways
    ]
    return Table(
        title=f"{size.name}, {size.frames} frames, {where}; one step, median (10th to 90th percentile)",
        columns=("", "step", "beside engram", "most memory in the steps", "before them too", "learned"),
        rows=rows,
    )
