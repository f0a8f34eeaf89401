"""Many concepts: how many an hour are learned when they share passes through the frozen model.

Run through `run.py`. Whole runs, from opening the model to the written adapters, take turns in one process; one after
the other is the same command with one concept at once, which opens the model for each.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import torch
from checkpoints import write_pictures
from measure import Outcome, Table
from quiet import Others

from engram_core.training.concepts import train_concepts
from engram_vision.sd15 import SD15
from engram_vision.settings import SD15TrainSettings

CONCEPTS, STEPS, ROUNDS = 16, 100, 3
AT_ONCE = (1, 2, 4, 8, 16)
BATCHES = (1, 4)


def run(*, quick: bool, device: str) -> Outcome:
    """Measure every size of group in turn, once to warm up, then some rounds."""
    concepts, steps, rounds = (4, 10, 1) if quick else (CONCEPTS, STEPS, ROUNDS)
    sizes = [size for size in AT_ONCE if size <= concepts]
    tables, figures, others = [], {}, Others()
    with tempfile.TemporaryDirectory(prefix="engram-concepts-") as name:
        settings = _list_settings(Path(name), concepts, steps, device)
        for batch in BATCHES:
            chosen = [replace(each, batch_size=batch) for each in settings]
            seconds: dict[int, list[float]] = {size: [] for size in sizes}
            train_concepts(SD15, chosen, at_once=max(sizes), overwrite=True)  # latents and text states are kept then
            for number in range(rounds):
                print(f"batch of {batch}: round {number + 1} of {rounds} ...", file=sys.stderr, flush=True)
                for size in sizes:
                    begun = perf_counter()
                    train_concepts(SD15, chosen, at_once=size, overwrite=True)
                    seconds[size].append(perf_counter() - begun)
            where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
            tables.append(_table(f"{concepts} concepts of {steps} steps, batch of {batch}, {where}", concepts, seconds))
            figures[f"batch of {batch}"] = {str(size): found for size, found in seconds.items()}
    notes = ["Other programs computed meanwhile."] if others.disturbed() else []
    return Outcome(tables=tables, notes=notes, figures={"concepts": concepts, "steps": steps, "seconds": figures})


def _list_settings(folder: Path, concepts: int, steps: int, device: str) -> list[SD15TrainSettings]:
    """Return the settings of each concept: pictures of its own, in the same scenes."""
    settings = []
    for number in range(concepts):
        trigger = f"zorbit quell {chr(ord('a') + number)}x"
        data = folder / f"pictures-{number}"
        write_pictures(data, 64, trigger=trigger, seed=number)
        settings.append(
            SD15TrainSettings(
                data=data,
                trigger=trigger,
                output=folder / f"{number}.safetensors",
                model="tiny",
                resolution=64,
                steps=steps,
                precision="fp32",
                device=device,  # type: ignore[arg-type]
                validate_every=0,
                save_every=steps,
            )
        )
    return settings


def _table(title: str, concepts: int, seconds: Mapping[int, Sequence[float]]) -> Table:
    rows = []
    for size, found in seconds.items():
        ratios = sorted(alone / each for alone, each in zip(seconds[1], found, strict=True))
        middle = statistics.median(found)
        rows.append(
            (
                "one after the other" if size == 1 else f"{size} at once",
                f"{middle:.1f} s",
                f"{concepts / middle * 3600:,.0f}",
                "" if size == 1 else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
            )
        )
    columns = ("", "all of them", "concepts an hour", "times as many (lowest to highest)")
    return Table(title=title, columns=columns, rows=rows)
