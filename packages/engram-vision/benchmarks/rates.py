"""Which learning rate suits each of the other methods: tried on a character that is used for choosing alone.

Run through `run.py`; rows are kept as those of `comparison`. The rule is `pick`; what it picked stands in
`ways_to_learn.RATES`. Engrams have the rates of their `tiny` settings.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean
from typing import Any

from comparison import LOOK, WORK
from comparison_tables import Row, shares, show_spread
from lessons import read_cast
from measure import Outcome, Table
from questions import CLASS, FORMS, NEW, QUIET, Amount, ask_alone
from rows import Job, fill_caches, make_rows, take_row
from verdicts import Verdicts
from ways_to_learn import BASE, Method, list_methods

from engram_vision.demo.judge import Judge
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35
from engram_vision.shipped import judge_folder, tiny_fingerprint

RATES_TRIED = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
MARGIN = 0.04  # about one picture of thirty
ASKED = (NEW, FORMS, QUIET, CLASS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is tried.

    Attributes:
        backbones: whose `tiny` learn.
        rates: that are tried.
        seeds: of learning and of drawing.
        methods: parts of the names of those to try; empty means all.
        steps: of learning, at most.
        amount: of pictures.
        look: how they are drawn.
    """

    backbones: Sequence[Any] = (SD15, SD35)
    rates: Sequence[float] = RATES_TRIED
    seeds: Sequence[int] = (0, 1)
    methods: Sequence[str] = ()
    steps: int | None = None
    amount: Amount = field(default_factory=Amount)
    look: Mapping[str, Any] = field(default_factory=lambda: LOOK)

    @classmethod
    def quick(cls) -> Plan:
        """Return one that takes a minute and tells nothing."""
        return cls(
            backbones=(SD35,),
            rates=RATES_TRIED[:2],
            seeds=(0,),
            methods=("rank 4",),
            steps=2,
            amount=Amount(shown=1, new=1, prompts=2, scenes=1),
            look={**LOOK, "steps": 2},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one rate of a method gave, by seed.

    Attributes:
        method: its name.
        rate: of AdamW, at its peak.
        identity: in new scenes.
        scene: of prompts worded otherwise.
        distance: of pictures without the name from the base model's.
        shown: pictures of a monster without the name that show the character.
    """

    method: str
    rate: float
    identity: list[float]
    scene: list[float]
    distance: list[float]
    shown: list[float]


def run(*, quick: bool, device: str) -> Outcome:
    """Try everything."""
    if not quick:
        return measure(Plan(), WORK, device)
    with tempfile.TemporaryDirectory(prefix="engram-rates-") as folder:
        return measure(Plan.quick(), Path(folder), device)


def measure(plan: Plan, work: Path, device: str) -> Outcome:
    """Make every row that is missing, and pick."""
    trials = [trial for backbone in plan.backbones for trial in _try(plan, backbone, work, device)]
    names = list(dict.fromkeys(trial.method for trial in trials))
    chosen = {name: pick([trial for trial in trials if trial.method == name]).rate for name in names}
    return Outcome(
        tables=[_table(trials, chosen, plan.seeds)],
        figures={"seeds": list(plan.seeds), "chosen": chosen, "trials": [asdict(trial) for trial in trials]},
    )


def pick(trials: Sequence[Trial]) -> Trial:
    """Return the trial of the highest identity; of those that are about as high, the one that leaks least."""
    highest = max(mean(trial.identity) for trial in trials)
    near = [trial for trial in trials if mean(trial.identity) >= highest - MARGIN]
    return min(near, key=lambda trial: mean(trial.distance))


def _try(plan: Plan, backbone: Any, work: Path, device: str) -> list[Trial]:
    _, character, phrases = read_cast()
    verdicts = Verdicts(Judge.load(judge_folder()))
    folder = work / tiny_fingerprint(backbone.name)[:12]
    asked = {
        seed: tuple(each for each in ask_alone(character, phrases, seed, plan.amount) if each.group in ASKED)
        for seed in plan.seeds
    }

    def job(method: Method, seed: int) -> Job:
        return Job(
            method=method,
            characters=(character,),
            questions=asked[seed],
            look=plan.look,
            seed=seed,
            steps=plan.steps,
            work=folder,
            device=device,
            backbone=backbone,
        )

    methods = [
        method
        for method in list_methods(list(phrases.values()), short=backbone is not SD15)
        if method.has_rate and (not plan.methods or any(part in method.name for part in plan.methods))
    ]
    tried = [
        (method.name, rate, replace(method.with_rate(rate), name=f"{method.name}, rate {rate:g}"))
        for method in methods
        for rate in plan.rates
    ]
    fill_caches([job(max(methods, key=lambda method: bool(method.options.get("prior"))), plan.seeds[0])])
    base = replace(BASE, name="the base model, to choose rates")  # another row than that of all questions
    make_rows([job(method, seed) for method in (base, *(rated for *_, rated in tried)) for seed in plan.seeds])
    trials = []
    for name, rate, rated in tried:
        rows = []
        for seed in plan.seeds:
            pixels, before = (take_row(job(method, seed)).pixels for method in (rated, base))
            counts = verdicts.judge_alone(character, asked[seed], pixels, before)
            rows.append(Row(method=rated.name, character=character.name, seed=seed, counts=counts))
        figures = [
            shares(rows, rated.name, [count])
            for count in (
                f"{NEW}: identity",
                f"{FORMS}: scene",
                f"{QUIET}: distance",
                f"{CLASS}: shows the character",
            )
        ]
        identity, scene, distance, shown = figures
        trials.append(Trial(method=name, rate=rate, identity=identity, scene=scene, distance=distance, shown=shown))
    return trials


def _table(trials: Sequence[Trial], chosen: Mapping[str, float], seeds: Sequence[int]) -> Table:
    rows = [
        (
            trial.method,
            f"{trial.rate:g}",
            show_spread(trial.identity),
            show_spread(trial.scene),
            show_spread(trial.distance, 3),
            show_spread(trial.shown),
            "chosen" if chosen[trial.method] == trial.rate else "",
        )
        for trial in trials
    ]
    columns = ("method", "rate", "identity, new scenes", "scene", "distance without the name", "in a monster", "")
    return Table(title=f"Rates, mean (lowest to highest) of {len(seeds)} seeds", columns=columns, rows=rows)
