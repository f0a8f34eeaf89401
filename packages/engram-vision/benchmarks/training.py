"""Training: a step of an engram beside the same step without caches, textual inversion and LoRA.

All on the same model, pictures and number types; for Stable Diffusion 3.5 the caches alone are compared.

Run through `run.py`. Each measurement is a fresh process (`steps.py`); the ways take turns.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from checkpoints import write_pictures
from children import run_script
from measure import Outcome, Table
from ways import MIB, Ways, take_turns, tell_disturbed

HERE = Path(__file__).parent
OURS, MODEL = "engram", "model"
CACHES = (OURS, "engram, nothing cached")
WAYS = (
    *CACHES,
    "textual inversion",
    "textual inversion, latents cached",
    "LoRA",
    "LoRA, latents and texts cached",
)


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
            ways = _measure(folder, model, size, device, quick=quick)
            tables.append(_table(size, ways, "GPU" if device == "cuda" else f"{ways.threads} threads"))
            figures[size.name] = ways.figures(("learned", "optimised"))
            notes += tell_disturbed(size.name, ways)
    return Outcome(tables=tables, notes=notes, figures=figures)


def _write_model(folder: Path, backbone: str) -> str:
    """Write a model of a backbone's full size and return where it is."""
    print(f"writing a model of {backbone}'s size ...", file=sys.stderr, flush=True)
    target = folder / backbone
    run_script(HERE / "checkpoints.py", backbone, str(target))
    return str(target / "model")


def _measure(folder: Path, model: str, size: Size, device: str, *, quick: bool) -> Ways:
    """Return the samples of all ways."""
    rounds, steps = (1, 3) if quick else (size.rounds, size.steps)
    data = folder / f"pictures-{size.resolution}"
    if not data.exists():
        write_pictures(data, size.resolution)
    common = {
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
    turns = [
        {way: {"way": way, **common} for way in ((MODEL, *size.ways) if number == 0 else size.ways)}
        for number in range(rounds)
    ]
    samples = take_turns(HERE / "steps.py", folder, size.name, turns, repeat=not quick)
    return Ways(ours=OURS, model=MODEL, samples=samples)


def _table(size: Size, ways: Ways, where: str) -> Table:
    model = ways.model_bytes
    rows = [("(the model alone)", "", "", f"{model / MIB:,.0f} MiB", "", "", "")]
    rows += [
        (
            way,
            *ways.cells(way),
            f"{ways.peak(way) / MIB:,.0f} MiB",
            f"{(ways.peak(way, 'step_peak') - model) / MIB:+,.0f} MiB",
            f"{ways.samples[way][0]['learned']:,}",
            f"{ways.samples[way][0]['optimised']:,}",
        )
        for way in size.ways
    ]
    return Table(
        title=f"{size.name}, {where}; one step, median (10th to 90th percentile)",
        columns=("", "step", "beside engram", "peak memory", "steps against the model alone", "learned", "optimised"),
        rows=rows,
    )
