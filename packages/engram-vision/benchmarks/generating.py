"""Generating with concepts loaded, beside the bare pipeline: the shipped checkpoint from prompt to picture.

Run through `run.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import Outcome, Spread, Table
from paired import AGAIN, BARE, Call, relate, time_call, time_rounds
from prompts import SHOWN, Vocabulary

from engram_core import Adapter
from engram_vision.drawing import Drawing, draw, find_silent
from engram_vision.families import SD15
from engram_vision.loading import load_engram, unload_engrams
from engram_vision.models import load_pipeline

SIZES = (1, 100, 10_000)
KINDS = ("nothing fires", "a trigger fires")
STEPS, GUIDANCE = 20, 5.0
ROUNDS = 60


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    vocabulary = Vocabulary.tiny()
    pipeline = load_pipeline(SD15, "tiny", device=torch.device(device))
    words = {number: word for word, number in vocabulary.words.items()}
    triggers = [" ".join(words[number] for number in row) for row in vocabulary.draw_triggers(SHOWN).tolist()]
    quiet = [f"a picture of {' '.join(reversed(trigger.split()))}" for trigger in triggers]

    with tempfile.TemporaryDirectory(prefix="engram-generating-") as name:
        adapters = {size: vocabulary.write_adapter(Path(name) / f"{size}.safetensors", size) for size in SIZES}
        loading = {size: [_time_loading(pipeline, adapters[size], device) for _ in range(5)] for size in SIZES}

        def prepare(adapter: Adapter | None, prompts: list[str], number: int) -> Call:
            unload_engrams(pipeline)
            if adapter is not None:
                load_engram(pipeline, adapter, name="many")
            drawing = Drawing(prompt=prompts[number % len(prompts)], seed=number)
            return partial(draw, pipeline, [drawing], steps=STEPS, guidance=GUIDANCE)

        cases: dict[Any, Callable[[int], Call]] = {case: partial(prepare, None, quiet) for case in (BARE, AGAIN)}
        for size, adapter in adapters.items():
            firing = [f"a picture of {trigger}" for trigger in triggers[:size]]
            _expect_firing(pipeline, adapter, firing)
            cases |= {
                (size, kind): partial(prepare, adapter, prompts)
                for kind, prompts in zip(KINDS, (quiet, firing), strict=True)
            }
        seconds = time_rounds(cases, 3 if quick else ROUNDS, device)

    ratios = {case: relate(seconds, case) for case in seconds if case != BARE}
    bare = Spread.of(seconds[BARE])
    rows = [("0, once more", ratios[AGAIN].show(), "", "")]
    rows += [
        (f"{size:,}", *(ratios[size, kind].show() for kind in KINDS), Spread.of(loading[size]).show("ms"))
        for size in SIZES
    ]
    where = "GPU" if device == "cuda" else f"{torch.get_num_threads()} threads"
    table = Table(
        title=(
            f"One picture of 64 px in {STEPS} steps, {where}; bare {bare.show('ms')}; "
            "median of the ratios to it (95 % confidence interval)"
        ),
        columns=("concepts", *KINDS, "load_engram"),
        rows=rows,
    )
    figures: dict[str, Any] = {"threads": torch.get_num_threads(), "bare_s": bare.median}
    figures["noise"] = asdict(ratios[AGAIN])
    figures |= {f"{size} {kind}": asdict(ratios[size, kind]) for size in SIZES for kind in KINDS}
    figures |= {f"{size} load_s": Spread.of(loading[size]).median for size in SIZES}
    return Outcome(tables=[table], figures=figures)


def _time_loading(pipeline: Any, adapter: Adapter, device: str) -> float:
    unload_engrams(pipeline)
    return time_call(partial(load_engram, pipeline, str(adapter.path)), device)


def _expect_firing(pipeline: Any, adapter: Adapter, prompts: list[str]) -> None:
    silent = find_silent(pipeline, adapter, prompts)
    if silent:
        raise ValueError(silent[0])
