"""One row of the comparison: learn, in a process of its own, load, draw, and keep all of it.

What the process needs in memory is then its method's alone, and a benchmark that was stopped goes on with the next row.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
from baselines import Prior
from lessons import Lessons, Task, open_model
from memory import Memory
from pooled import make_all
from questions import WITHOUT_NAME, Question
from verdicts import Pixels
from ways_to_learn import Method

from engram_core.container import open_target, write_all
from engram_vision.demo.characters import DemoCharacter
from engram_vision.drawing import draw
from engram_vision.sd15 import SD15


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What a row is made of.

    Attributes:
        method: how it is learned.
        characters: one, or two that are learned already.
        questions: what is drawn.
        look: how pictures are drawn.
        seed: of learning.
        steps: of learning, at most.
        work: folder for all that is kept.
        device: where to compute.
        backbone: whose `tiny` learns and draws.
    """

    method: Method
    characters: tuple[DemoCharacter, ...]
    questions: tuple[Question, ...]
    look: Mapping[str, Any]
    seed: int
    steps: int | None
    work: Path
    device: str
    backbone: Any = SD15

    @property
    def name(self) -> str:
        """Which row it is."""
        return f"{self.method.name}, {' and '.join(one.name for one in self.characters)}, seed {self.seed}"

    @property
    def record(self) -> Path:
        """The file that tells what was measured; the pictures lie beside it."""
        parts = [self.method.name, *(one.slug for one in self.characters), str(self.seed)]
        return self.work / "rows" / f"{'--'.join(map(_slug, parts))}.json"

    @property
    def pictures(self) -> Path:
        """The file of the pictures."""
        return self.record.with_suffix(".npz")

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn for the row."""
        return self.method.learns and len(self.characters) == 1

    def task(self, character: DemoCharacter) -> Task:
        """Return what is to be learned of a character."""
        steps = self.method.steps if self.steps is None else min(self.steps, self.method.steps)
        return Task(
            data=character.folder,
            trigger=character.name,
            output=self.work / "learned" / "--".join(map(_slug, (self.method.name, character.slug, str(self.seed)))),
            cache=self.work / "frozen",
            steps=max(1, steps),
            seed=self.seed,
            device=self.device,
            backbone=self.backbone,
        )

    def facts(self) -> dict[str, Any]:
        """Return all that the row depends on; it is made anew when something differs."""
        learned = [self.method.facts(self.task(one)) for one in self.characters] if self.method.learns else []
        facts = {
            "learned": learned,
            "references": [_digest_folder(one.folder) for one in self.characters] if learned else [],
            "names": [self.method.word(one) for one in self.characters],
            "questions": [asdict(question) for question in self.questions],
            "look": dict(self.look),
        }
        plain: dict[str, Any] = json.loads(json.dumps(facts))
        return plain

    def has(self, character: DemoCharacter) -> bool:
        """Tell whether what was learned of a character is there, where it is needed again."""
        needed = self.method.learns and self.method.composes
        return not needed or self.method.kept(self.task(character).output).exists()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Drawn:
    """A row that is done.

    Attributes:
        pixels: of each question, uint8 [N, H, W, 3].
        costs: what learning took and gave; empty where nothing was learned.
    """

    pixels: Pixels
    costs: dict[str, float]


def make_rows(jobs: Sequence[Job]) -> None:
    """Make the rows that are not kept."""
    missing = [job for job in jobs if _read_row(job) is None]
    if missing:
        make_all(_make_named, missing, device=missing[0].device)


def take_row(job: Job) -> Drawn:
    """Return a row that is kept, if it was one of the same facts, or make it."""
    kept = _read_row(job)
    if kept is not None:
        return kept
    make_rows([job])
    made = _read_row(job)
    if made is None:
        raise RuntimeError(f"{job.record}: was made and cannot be read")
    return made


def fill_caches(jobs: Sequence[Job]) -> None:
    """Make what rows share: latents, text states and pictures of the class. No row's costs are to hold it."""
    if any(_read_row(job) is None for job in jobs):
        make_all(_fill, jobs, device=jobs[0].device)


def _fill(job: Job) -> str:
    (character,) = job.characters
    task = job.task(character)
    lessons = Lessons(task)
    if job.method.options.get("prior"):
        Prior(lessons, task.cache, job.method.options["phrases"], job.method.options["each"])
    return f"what {character.name} is learned from"


def _make_named(job: Job) -> str:
    make_row(job)
    return job.name


def make_row(job: Job) -> None:
    """Learn, load, draw, and keep all of it."""
    costs: dict[str, float] = {}
    for file in (job.record, job.pictures):
        file.unlink(missing_ok=True)
    for folder in ("rows", "learned"):
        (job.work / folder).mkdir(parents=True, exist_ok=True)
    if job.learns:
        costs = _learn(job)
    pipeline, costs["load_seconds"] = _load(job)
    pixels = draw_questions(pipeline, job)
    if job.method.learns and not job.method.composes:
        for one in job.characters:  # large, and of no further use
            _remove(job.method.kept(job.task(one).output))
    np.savez_compressed(job.pictures, pixels=pixels)
    text = json.dumps({"facts": job.facts(), "costs": costs if job.method.learns else {}}, indent=1)
    with open_target(job.record, overwrite=True) as target:
        write_all(target, memoryview(text.encode()))


def draw_questions(pipeline: Any, job: Job) -> Pixels:
    """Draw a job's questions with what is loaded, uint8 [N, H, W, 3].

    Those with a name and those without are in batches of their own, in the same order for every method, so that
    bytes can be compared.
    """
    names = [job.method.word(one) for one in job.characters]
    drawings = [question.drawing(*names) for question in job.questions]
    quiet = [question.group in WITHOUT_NAME for question in job.questions]
    found: dict[int, Any] = {}
    for kind in (False, True):
        rows = [at for at, flag in enumerate(quiet) if flag == kind]
        images = draw(pipeline, [drawings[at] for at in rows], **job.look)
        found |= {at: np.asarray(image.convert("RGB")) for at, image in zip(rows, images, strict=True)}
    return np.stack([found[at] for at in range(len(drawings))])


def _learn(job: Job) -> dict[str, float]:
    (character,) = job.characters
    task, memory = job.task(character), Memory(job.device)
    for path in (job.method.kept(task.output), task.output.with_suffix(".run")):
        _remove(path)
    started = monotonic()
    learned = job.method.learn(task)
    whole = monotonic() - started
    _remove(task.output.with_suffix(".run"))  # what it takes to go on with a run is not needed any more
    return {
        "values": learned.values,
        "size": learned.size,
        "seconds": learned.seconds,
        "whole_seconds": whole,
        "others": learned.others,
        "peak": memory.peak(),
    }


def _load(job: Job) -> tuple[Any, float]:
    """Return a pipeline with all that was learned, and how long that took; what is only done once is not counted."""
    for _ in range(2):
        pipeline = open_model(job.device, job.backbone)
        started = monotonic()
        for one in job.characters:
            job.method.load(pipeline, one.name, job.task(one).output)
        seconds = monotonic() - started
    return pipeline, seconds


def _read_row(job: Job) -> Drawn | None:
    if not (job.record.exists() and job.pictures.exists() and all(map(job.has, job.characters))):
        return None
    record = json.loads(job.record.read_text(encoding="utf-8"))
    if record["facts"] != job.facts():
        return None
    with np.load(job.pictures) as kept:
        return Drawn(pixels=kept["pixels"], costs=record["costs"])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _slug(text: str) -> str:
    """Return a text as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")


def _digest_folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def list_columns(questions: Sequence[Question], groups: Sequence[str]) -> list[int]:
    """Return the first question of each group, by its number; groups without one are left out."""
    found = [[at for at, question in enumerate(questions) if question.group == group] for group in groups]
    return [numbers[0] for numbers in found if numbers]
