"""Do blocks, or noise levels, deserve other strengths than they learned?

An engram with a residual for each block, drawn with its residuals scaled by block or by noise, on the character that is
used for choosing alone. Run through `run.py`; what was learned is kept with what `comparison` learned.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from comparison import LOOK, WORK
from comparison_tables import Row, shares, show_spread
from lessons import open_model, read_cast
from measure import Outcome, Table
from questions import FORMS, NEW, Amount, ask_alone
from rows import Job, draw_questions, take_row
from torch import Tensor, nn
from verdicts import Verdicts
from ways_to_learn import STEPS, Method

from engram_vision.demo.judge import Judge
from engram_vision.families import family_of
from engram_vision.shipped import judge_folder, tiny_fingerprint
from engram_vision.site_hooks import attached_sites
from engram_vision.sites import name_sites

BLOCKS = Method(
    name=f"engram, a residual for each block, {STEPS} steps", kind="engram", steps=STEPS, options={"sites": "blocks"}
)
_WEAKER, _STRONGER = 0.75, 1.25

Weight = Callable[[float, float], float]
"""Strength by the place of a block, from 0 for the first to 1 for the last, and the share of noise, in 0..1."""


def _list_weights() -> dict[str, Weight]:
    found: dict[str, Weight] = {"as learned": lambda _place, _noise: 1.0}
    for factor in (_WEAKER, _STRONGER):
        found |= {
            f"{factor:g} everywhere": lambda _place, _noise, f=factor: f,
            f"{factor:g} in the first half of the blocks": lambda place, _noise, f=factor: f if place < 0.5 else 1.0,
            f"{factor:g} in the second half of the blocks": lambda place, _noise, f=factor: f if place >= 0.5 else 1.0,
            f"{factor:g} while there is more noise": lambda _place, noise, f=factor: f if noise >= 0.5 else 1.0,
            f"{factor:g} while there is less noise": lambda _place, noise, f=factor: f if noise < 0.5 else 1.0,
        }
    return found


WEIGHTS: Mapping[str, Weight] = _list_weights()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is learned and drawn.

    Attributes:
        weights: names of those that are tried.
        seeds: of learning and of drawing.
        steps: of learning, at most.
        amount: of pictures.
        look: how they are drawn.
    """

    weights: Sequence[str] = tuple(WEIGHTS)
    seeds: Sequence[int] = (0, 1, 2)
    steps: int | None = None
    amount: Amount = field(default_factory=Amount)
    look: Mapping[str, Any] = field(default_factory=lambda: LOOK)

    @classmethod
    def quick(cls) -> Plan:
        """Return one that takes a minute and tells nothing."""
        return cls(
            weights=("as learned", f"{_WEAKER:g} while there is more noise"),
            seeds=(0,),
            steps=2,
            amount=Amount(shown=1, new=1, prompts=2, scenes=1),
            look={**LOOK, "steps": 2},
        )


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    if not quick:
        return measure(Plan(), WORK / tiny_fingerprint("sd15")[:12], device)
    with tempfile.TemporaryDirectory(prefix="engram-strengths-") as folder:
        return measure(Plan.quick(), Path(folder), device)


def measure(plan: Plan, work: Path, device: str) -> Outcome:
    """Learn what is missing, draw with every weight, and sum up."""
    verdicts = Verdicts(Judge.load(judge_folder()))
    _, character, phrases = read_cast()
    rows = []
    for seed in plan.seeds:
        questions = ask_alone(character, phrases, seed, plan.amount)
        job = Job(
            method=BLOCKS,
            characters=(character,),
            questions=tuple(questions),
            look=plan.look,
            seed=seed,
            steps=plan.steps,
            work=work,
            device=device,
        )
        take_row(job)
        asked = [question for question in questions if question.group in (NEW, FORMS)]
        for name in plan.weights:
            print(f"{name}, seed {seed} ...", file=sys.stderr, flush=True)
            pipeline = open_model(device)
            BLOCKS.load(pipeline, character.name, job.task(character).output)
            _weigh(pipeline, WEIGHTS[name])
            pixels = draw_questions(pipeline, replace(job, questions=tuple(asked)))
            counts = verdicts.judge_alone(character, asked, pixels, pixels)
            rows.append(Row(method=name, character=character.name, seed=seed, counts=counts))
    return Outcome(
        tables=[_make_table(rows, plan)],
        figures={
            "threads": torch.get_num_threads(),
            "seeds": list(plan.seeds),
            "rows": [row.to_json() for row in rows],
        },
    )


def _weigh(pipeline: Any, weight: Weight) -> None:
    """Scale what the blocks of a pipeline read beyond the frozen states."""
    reader = attached_sites(pipeline.unet)
    if reader is None:
        raise RuntimeError("nothing is attached to the denoiser's blocks")
    last = max(1, len(name_sites(family_of(pipeline), pipeline)) - 1)
    n_times, read, noise = pipeline.scheduler.config.num_train_timesteps, reader.read, 1.0

    def note_time(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal noise
        noise = float(kwargs["timestep"] if "timestep" in kwargs else args[1]) / n_times

    def read_weighed(states: Tensor, site: int) -> Tensor:
        edited = read(states, site)
        return edited if edited is states else torch.lerp(states, edited, weight(site / last, noise))

    pipeline.unet.register_forward_pre_hook(note_time, with_kwargs=True)
    reader.read = read_weighed  # type: ignore[method-assign]


def _make_table(rows: Sequence[Row], plan: Plan) -> Table:
    lines = [
        (
            name,
            show_spread(shares(rows, name, [f"{NEW}: identity"])),
            show_spread(shares(rows, name, [f"{FORMS}: identity"])),
            show_spread(shares(rows, name, [f"{NEW}: scene", f"{FORMS}: scene"])),
        )
        for name in plan.weights
    ]
    return Table(
        title=f"Strengths of {BLOCKS.name}, mean (lowest to highest) of {len(plan.seeds)} seeds",
        columns=("strength", "identity, new scenes", "identity, other wordings", "scene"),
        rows=lines,
    )
