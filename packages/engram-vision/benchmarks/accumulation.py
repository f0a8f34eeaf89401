"""Does a character still work when many others are merged with it? Engrams in one file, and LoRAs merged by PEFT.

Run through `run.py`. What was learned is that of `comparison`, and is learned here where it is missing; finished rows
are kept in the same folder.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from comparison import LOOK, WORK
from comparison_tables import Row, shares, show_bytes, show_range, show_spread
from crowds import WAYS, gather_crowd, invent_characters, merge_loras, tiny_tokenizer
from lessons import open_model, read_cast
from measure import Outcome, Table
from questions import NEW, QUIET, Amount, Question, ask_alone
from rows import Job, draw_questions, take_row
from verdicts import Count, Pixels, Verdicts, count_of
from ways_to_learn import BASE, RATES, STEPS, Method, engram_file

from engram_core import merge_adapters, open_adapter
from engram_core.container import open_target, write_all
from engram_vision.demo.characters import DemoCharacter
from engram_vision.demo.judge import Judge
from engram_vision.loading import load_engram
from engram_vision.shipped import judge_folder, tiny_fingerprint

ENGRAM = Method(name=f"engram, one residual, {STEPS} steps", kind="engram", steps=STEPS, options={"sites": "text"})
_LORA = "LoRA of the U-Net, rank 4"
LORA = Method(name=_LORA, kind="lora", options={"rate": RATES[_LORA], "part": "unet", "rank": 4})
SHORT_STEPS = 100  # of the other monsters' LoRAs


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """How many are merged, and what is drawn.

    Attributes:
        concepts: numbers of merged engrams; 1 is the character's own file.
        adapters: numbers of merged LoRAs; 1 is the character's own.
        seeds: of learning and of drawing.
        characters: at most.
        steps: of learning, at most.
        others_steps: of the other monsters' LoRAs.
        amount: of pictures.
        look: how they are drawn.
    """

    concepts: Sequence[int] = (1, 10, 100, 1000)
    adapters: Sequence[int] = (1, 2, 3, 10)
    seeds: Sequence[int] = (0, 1, 2)
    characters: int = 3
    steps: int | None = None
    others_steps: int = SHORT_STEPS
    amount: Amount = field(default_factory=Amount)
    look: Mapping[str, Any] = field(default_factory=lambda: LOOK)

    @classmethod
    def quick(cls) -> Crowd:
        """Return one that takes a minute and tells nothing."""
        return cls(
            concepts=(1, 5),
            adapters=(1, 2),
            seeds=(0,),
            characters=1,
            steps=2,
            others_steps=2,
            amount=Amount(shown=1, new=1, prompts=2, scenes=1),
            look={**LOOK, "steps": 2},
        )


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    if not quick:
        return Accumulation(Crowd(), WORK / tiny_fingerprint("sd15")[:12], device).run()
    with tempfile.TemporaryDirectory(prefix="engram-accumulation-") as folder:
        return Accumulation(Crowd.quick(), Path(folder), device).run()


class Accumulation:
    """One call of `run`."""

    def __init__(self, crowd: Crowd, work: Path, device: str) -> None:
        """Take what is to be done, a folder to keep it in, and where to compute."""
        self._crowd, self._work, self._device = crowd, work, device
        self._verdicts = Verdicts(Judge.load(judge_folder()))
        cast, _, self._phrases = read_cast()
        self._cast = cast[: crowd.characters]
        self._drawn: dict[tuple[str, str, int], Pixels] = {}

    def run(self) -> Outcome:
        """Make every row that is missing, and sum up."""
        rows = [row for seed in self._crowd.seeds for row in (*self._merge_engrams(seed), *self._merge_loras(seed))]
        # Methods in the order of their numbers, which the first seed tells.
        order = list(dict.fromkeys(row.method for row in rows))
        rows.sort(key=lambda row: order.index(row.method))
        return Outcome(
            tables=[self._make_table(rows, order)],
            figures={
                "threads": torch.get_num_threads(),
                "seeds": list(self._crowd.seeds),
                "rows": [row.to_json() for row in rows],
            },
        )

    def _merge_engrams(self, seed: int) -> list[Row]:
        """Return the rows of engrams of one seed."""
        files = [self._learn(ENGRAM, one, seed) for one in self._cast]
        rows, tokenizer = [], tiny_tokenizer(self._device)
        for count in self._crowd.concepts:
            for character, file in zip(self._cast, files, strict=True):

                def open_crowd(count: int = count, file: Path = file) -> tuple[Any, dict[str, float]]:
                    adapter, costs = open_adapter(engram_file(file)), dict[str, float]()
                    if count > 1:
                        parts = gather_crowd([engram_file(each) for each in files], count, tokenizer, seed)
                        started = monotonic()
                        adapter = merge_adapters(parts)
                        costs["merge_seconds"] = monotonic() - started
                    for _ in range(2):  # what is only done once is not counted
                        pipeline = open_model(self._device)
                        started = monotonic()
                        load_engram(pipeline, adapter, name="crowd")
                        costs["load_seconds"] = monotonic() - started
                    return pipeline, {**costs, "size": adapter.nbytes()}

                name = f"engrams, {count:,} in one file"
                rows.append(self._keep(name, ENGRAM, character, seed, open_crowd))
        return rows

    def _merge_loras(self, seed: int) -> list[Row]:
        """Return the rows of LoRAs of one seed."""
        most = max(self._crowd.adapters)
        others = invent_characters(self._work / f"others-{seed}", max(0, most - len(self._cast)), seed=seed)
        short = replace(LORA, steps=self._crowd.others_steps)
        places = {one.name: self._learn(LORA, one, seed) for one in self._cast}
        places |= {one.name: self._learn(short, one, seed, pictures=1) for one in others}
        rows = []
        for way in WAYS:
            for count in self._crowd.adapters:
                if count == 1 and way != next(iter(WAYS)):
                    continue  # alone there is nothing to merge
                for character in self._cast:
                    rest = [one for one in (*self._cast, *others) if one.name != character.name]
                    chosen = [(one.name, places[one.name]) for one in (character, *rest[: count - 1])]

                    def open_merged(
                        chosen: Sequence[tuple[str, Path]] = chosen, way: str = way
                    ) -> tuple[Any, dict[str, float]]:
                        return merge_loras(LORA, chosen, way, device=self._device, seed=seed)

                    name = f"LoRA, {count} {way}" if count > 1 else "LoRA, 1"
                    rows.append(self._keep(name, LORA, character, seed, open_merged))
        return rows

    def _learn(self, method: Method, character: DemoCharacter, seed: int, pictures: int | None = None) -> Path:
        """Learn what is missing, as `comparison` does; returns where it lies."""
        job = self._job(method, character, seed, self._ask(character, seed)[:pictures])
        take_row(job)
        return job.task(character).output

    def _keep(
        self,
        name: str,
        method: Method,
        character: DemoCharacter,
        seed: int,
        open_pipeline: Callable[[], tuple[Any, dict[str, float]]],
    ) -> Row:
        """Return a row that was kept, if it was one of the same facts, or make it."""
        questions = [each for each in self._ask(character, seed) if each.group in (NEW, QUIET)]
        job = self._job(method, character, seed, questions)
        facts = json.loads(json.dumps([job.facts(), name, asdict(self._crowd)]))
        file = job.record.with_name(f"{name.replace(' ', '-').replace(',', '')}--{job.record.name}")
        if file.exists():
            kept = json.loads(file.read_text(encoding="utf-8"))
            if kept["facts"] == facts:
                counts = {label: Count(**values) for label, values in kept["counts"].items()}
                return Row(method=name, character=character.name, seed=seed, counts=counts, costs=kept["costs"])
        print(f"{name}, {character.name}, seed {seed} ...", file=sys.stderr, flush=True)
        pipeline, costs = open_pipeline()
        counts = self._count(character, questions, draw_questions(pipeline, job), job)
        row = Row(method=name, character=character.name, seed=seed, counts=counts, costs=costs)
        record = {"facts": facts, "costs": costs, "counts": {label: asdict(count) for label, count in counts.items()}}
        with open_target(file, overwrite=True) as target:
            write_all(target, memoryview(json.dumps(record, indent=1).encode()))
        return row

    def _count(
        self, character: DemoCharacter, questions: Sequence[Question], pixels: Pixels, job: Job
    ) -> dict[str, Count]:
        """Return the verdicts, and how many pictures of the character have the bytes of what it draws alone."""
        base, alone = (self._draw_alone(replace(job, method=method)) for method in (BASE, job.method))
        counts = self._verdicts.judge_alone(character, questions, pixels, base)
        named = [at for at, question in enumerate(questions) if question.group == NEW]
        same = [pixels[at].tobytes() == alone[at].tobytes() for at in named]
        return {label: count for label, count in counts.items() if count.count} | {"as alone": count_of(same)}

    def _draw_alone(self, job: Job) -> Pixels:
        """Return what a character's own file draws, or the base model; in the same batches, so bytes compare."""
        (character,) = job.characters
        key = (job.method.name, character.name, job.seed)
        if key not in self._drawn:
            pipeline = open_model(self._device)
            job.method.load(pipeline, character.name, job.task(character).output)
            self._drawn[key] = draw_questions(pipeline, job)
        return self._drawn[key]

    def _ask(self, character: DemoCharacter, seed: int) -> list[Question]:
        return ask_alone(character, self._phrases, seed, self._crowd.amount)

    def _job(self, method: Method, character: DemoCharacter, seed: int, questions: Sequence[Question]) -> Job:
        return Job(
            method=method,
            characters=(character,),
            questions=tuple(questions),
            look=self._crowd.look,
            seed=seed,
            steps=self._crowd.steps,
            work=self._work,
            device=self._device,
        )

    def _make_table(self, rows: Sequence[Row], order: Sequence[str]) -> Table:
        def cost(name: str, label: str, write: Callable[[float], str]) -> str:
            return show_range([row.costs[label] for row in rows if row.method == name and label in row.costs], write)

        lines = [
            (
                name,
                show_spread(shares(rows, name, [f"{NEW}: identity"])),
                show_spread(shares(rows, name, [f"{NEW}: scene"])),
                show_spread(shares(rows, name, ["as alone"])),
                show_spread(shares(rows, name, [f"{QUIET}: identical"])),
                show_spread(shares(rows, name, [f"{QUIET}: obeyed"])),
                cost(name, "size", show_bytes),
                cost(name, "merge_seconds", lambda value: f"{1000 * value:,.0f} ms"),
                cost(name, "load_seconds", lambda value: f"{1000 * value:,.0f} ms"),
            )
            for name in order
        ]
        return Table(
            title=f"One character among others, mean (lowest to highest) of {len(self._crowd.seeds)} seeds",
            columns=(
                "",
                "identity, new scenes",
                "scene",
                "pictures as alone",
                "without the name: identical",
                "obeyed",
                "file",
                "merging",
                "loading",
            ),
            rows=lines,
        )
