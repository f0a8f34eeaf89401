"""Characters learned by engram, textual inversion, LoRA and DreamBooth, from the same pictures in as many steps.

Run through `run.py`. Each row is made in a process of its own and kept in `build/vision-comparison`, so that a stopped
benchmark goes on; with the rows lies a picture for each character, methods from top to bottom.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2] / "engram-core" / "benchmarks"))

from comparison_tables import Row, make_tables, shares
from lessons import read_cast
from measure import Outcome
from PIL import Image
from questions import (
    BESIDE,
    CLASS,
    FORMS,
    NEW,
    QUIET,
    SHOWN,
    SINGLE,
    Amount,
    Question,
    ask_alone,
    ask_pair,
)
from rows import Drawn, Job, fill_caches, list_columns, make_rows, take_row
from verdicts import Verdicts
from ways_to_learn import BASE, WORDS, Method, list_methods

from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.judge import Judge
from engram_vision.grid import draw_grid
from engram_vision.sd15 import SD15
from engram_vision.shipped import judge_folder, tiny_fingerprint

WORK = Path("build/vision-comparison")
LOOK: Mapping[str, Any] = {"steps": 20, "guidance": 4.0, "batch_size": 10}
COLUMNS = {  # of the pictures
    SHOWN: "a scene shown",
    NEW: "a new scene",
    FORMS: "other wording",
    BESIDE: "beside a fox",
    QUIET: "a fox",
    CLASS: "a monster",
    SINGLE: "one word of it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is learned and drawn.

    Attributes:
        seeds: of learning and of drawing.
        methods: parts of the names of those to compare; empty means all.
        characters: at most.
        steps: of learning, at most; None means as many as each method says.
        amount: of pictures.
        look: how pictures are drawn.
        prior: pictures of the class in each scene, for DreamBooth; None means the usual number.
        backbone: whose `tiny` learns and draws; of others than sd15 the short list of methods is compared.
    """

    seeds: Sequence[int] = (0, 1, 2)
    methods: Sequence[str] = ()
    characters: int = 3
    steps: int | None = None
    amount: Amount = field(default_factory=Amount)
    look: Mapping[str, Any] = field(default_factory=lambda: LOOK)
    prior: int | None = None
    backbone: Any = SD15

    @property
    def work(self) -> Path:
        """The folder for all that is kept."""
        return WORK / tiny_fingerprint(self.backbone.name)[:12]

    @classmethod
    def quick(cls) -> Plan:
        """Return one that takes a minute and tells nothing."""
        return cls(
            seeds=(0,),
            methods=("one residual, 20", "textual inversion, 8", "rank 4", "prior"),
            characters=2,
            steps=2,
            amount=Amount(shown=1, new=1, prompts=2, scenes=1),
            look={**LOOK, "steps": 2},
            prior=1,
        )

    def choose(self, phrases: Mapping[str, str]) -> list[Method]:
        """Return the methods to compare."""
        found = [
            method
            for method in list_methods(list(phrases.values()), short=self.backbone.name != SD15.name)
            if not self.methods or any(part in method.name for part in self.methods)
        ]
        if self.prior is None:
            return found
        small = {"each": self.prior}
        return [
            replace(method, options={**method.options, **small}) if "each" in method.options else method
            for method in found
        ]


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    if not quick:
        return Comparison(Plan(), Plan().work, device).run()
    with tempfile.TemporaryDirectory(prefix="engram-comparison-") as folder:
        return Comparison(Plan.quick(), Path(folder), device).run()


class Comparison:
    """One call of `run`."""

    def __init__(self, plan: Plan, work: Path, device: str) -> None:
        """Take what is to be done, a folder to keep it in, and where to compute."""
        self._plan, self._work, self._device = plan, work, device
        self._verdicts = Verdicts(Judge.load(judge_folder()))
        cast, self._development, self._phrases = read_cast()
        self._cast = cast[: plan.characters]
        self._methods = plan.choose(self._phrases)

    def run(self) -> Outcome:
        """Make every row that is missing, and sum up."""
        methods = (BASE, WORDS, *self._methods)
        fill_caches(self._first_jobs())
        make_rows([self._job_alone(method, one, seed) for method in methods for one, seed in self._runs()])
        make_rows([self._job_pair(method, pair, seed) for method in methods for pair, seed in self._pairs(method)])
        rows = []
        for method in methods:
            alone = [self._compare_alone(method, one, seed) for one, seed in self._runs()]
            pairs = [self._compare_pair(method, pair, seed) for pair, seed in self._pairs(method)]
            rows += [*alone, *pairs]
            found = shares(alone, method.name, [f"{NEW}: identity"])
            print(f"{method.name}: identity in new scenes {', '.join(f'{share:.2f}' for share in found)}", flush=True)
        for one in self._cast:
            self._write_grid(one)
        return self._sum_up(rows)

    def _first_jobs(self) -> list[Job]:
        """Return a job for each character, the first with pictures of the class where a method learns from them."""
        method = max(self._methods, key=lambda method: bool(method.options.get("prior")))
        first, *others = self._cast
        plain = replace(method, options={**method.options, "prior": False})
        seed = self._plan.seeds[0]
        return [self._job_alone(method, first, seed), *(self._job_alone(plain, one, seed) for one in others)]

    def _compare_alone(self, method: Method, character: DemoCharacter, seed: int) -> Row:
        job = self._job_alone(method, character, seed)
        drawn, base = take_row(job), self._draw_base(character, seed)
        counts = self._verdicts.judge_alone(character, job.questions, drawn.pixels, base.pixels)
        return Row(method=method.name, character=character.name, seed=seed, counts=counts, costs=drawn.costs)

    def _compare_pair(self, method: Method, pair: tuple[DemoCharacter, ...], seed: int) -> Row:
        job = self._job_pair(method, pair, seed)
        counts = self._verdicts.judge_pair(pair, job.questions, take_row(job).pixels)
        return Row(method=method.name, character=" and ".join(one.name for one in pair), seed=seed, counts=counts)

    def _draw_base(self, character: DemoCharacter, seed: int) -> Drawn:
        """Return the base model's pictures of the same questions."""
        return take_row(self._job_alone(BASE, character, seed))

    def _runs(self) -> list[tuple[DemoCharacter, int]]:
        return [(one, seed) for seed in self._plan.seeds for one in self._cast]

    def _pairs(self, method: Method) -> list[tuple[tuple[DemoCharacter, ...], int]]:
        pairs = list(combinations(self._cast, 2)) if method.composes else []
        return [(pair, seed) for seed in self._plan.seeds for pair in pairs]

    def _job_alone(self, method: Method, character: DemoCharacter, seed: int) -> Job:
        return self._job(method, (character,), self._ask(character, seed), seed)

    def _job_pair(self, method: Method, pair: tuple[DemoCharacter, ...], seed: int) -> Job:
        return self._job(method, pair, ask_pair(self._phrases, seed, self._plan.amount), seed)

    def _ask(self, character: DemoCharacter, seed: int) -> list[Question]:
        return ask_alone(character, self._phrases, seed, self._plan.amount)

    def _job(
        self, method: Method, characters: tuple[DemoCharacter, ...], questions: Sequence[Question], seed: int
    ) -> Job:
        return Job(
            method=method,
            characters=characters,
            questions=tuple(questions),
            look=self._plan.look,
            seed=seed,
            steps=self._plan.steps,
            work=self._work,
            device=self._device,
            backbone=self._plan.backbone,
        )

    def _write_grid(self, character: DemoCharacter) -> None:
        """Write a picture: a row for each method, a column for each kind of prompt."""
        seed = self._plan.seeds[0]
        questions = self._ask(character, seed)
        columns = list_columns(questions, list(COLUMNS))
        rows = []
        for method in (BASE, WORDS, *self._methods):
            pixels = take_row(self._job_alone(method, character, seed)).pixels
            rows.append((method.name, [Image.fromarray(pixels[at]) for at in columns]))
        sheet = draw_grid([COLUMNS[questions[at].group] for at in columns], rows)
        sheet.save(self._work / f"{self._plan.backbone.name}-{character.slug}.png", optimize=True)

    def _sum_up(self, rows: Sequence[Row]) -> Outcome:
        return Outcome(
            tables=make_tables(rows, self._cast[-1].name),
            figures={
                "seeds": list(self._plan.seeds),
                "rows": [row.to_json() for row in rows],
            },
        )
