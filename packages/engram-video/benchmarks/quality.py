"""Characters in scenes and motions that no clip showed: engram, the published method and LoRA, and the base model.

All learn from the same clips, which the frozen model made of five pictures, in as many steps of as many clips. Nothing
was chosen by these figures. Run through `run.py`; each run is made in a process of its own and kept in
`build/video-quality`, so that a stopped benchmark goes on.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from checkpoint import Checkpoint
from measure import Outcome, Table
from methods import METHODS, Method, Task, open_base
from pooled import make_all
from scores import Asked, Judges, Pixels, Score, compare_clips

from engram_core.container import open_target, write_all
from engram_core.settings import Layer, resolve_settings
from engram_video.clips import read_clip
from engram_video.clipsets import build_clips
from engram_video.demo.motions import MOTION_PHRASES, new_motions, shown_motions
from engram_video.demo.run import write_pictures
from engram_video.drawing import draw_clips
from engram_video.settings import Wan22ClipsSettings
from engram_video.wan22 import WAN22
from engram_vision.demo.characters import DemoCharacter, read_characters
from engram_vision.drawing import Drawing

WORK = Path("build/video-quality")
BASE, DESCRIBED = "the base model", "the base model, looks in words"
# Without a trigger: other subjects, the characters' looks in words, and single words of their names.
CONTROLS = (
    "a fox jumping in the forest",
    "a robot walking to the left at night",
    "a cat and a penguin swaying in the snow",
    "a blue monster coming closer on the beach",
    "a purple spotted round monster with one eye and horns jumping on the beach",
    "zorbit walking to the right in the city",
    "wumble fenny standing still in a meadow",
    "in the desert",
)
LOOK = ("steps", "guidance", "width", "height", "frames", "batch_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How much is learned and drawn.

    Attributes:
        methods: what is compared.
        seeds: of learning and of drawing.
        steps: of learning; None means those of `tiny`'s settings.
        scenes, motions: new ones of each character, at most.
        controls: prompts without a trigger, at most.
        look: how clips are drawn.
    """

    methods: Sequence[Method] = METHODS
    seeds: Sequence[int] = (0, 1, 2)
    steps: int | None = None
    scenes: int = 5
    motions: int = 2
    controls: int = len(CONTROLS)
    look: Mapping[str, Any] = field(default_factory=lambda: {name: WAN22.tiny_generate[name] for name in LOOK})

    @classmethod
    def quick(cls) -> Plan:
        """Return one that takes seconds and tells nothing."""
        whole = cls()
        return replace(
            whole,
            methods=(*METHODS[:2], METHODS[-1]),
            seeds=(0,),
            steps=2,
            scenes=1,
            motions=1,
            controls=2,
            look={**whole.look, "steps": 2, "frames": 9},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run came to.

    Attributes:
        facts: what it depends on; it is made anew when they differ.
        values: how many learned.
        seconds: of learning.
        scores: of each clip in a new scene and motion.
        identical: how many clips of prompts without a trigger have the base model's bytes.
        controls: how many such prompts there are.
        difference: mean absolute difference of these clips from the base model's, in 0..1.
        showing: share of their frames that show the character.
    """

    facts: Mapping[str, Any]
    values: int = 0
    seconds: float = 0.0
    scores: Sequence[Score]
    identical: int = 0
    controls: int = 0
    difference: float = 0.0
    showing: float = 0.0

    @classmethod
    def read(cls, file: Path) -> Result:
        """Return one that was kept."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**values | {"scores": [Score(**score) for score in values["scores"]]})

    def write(self, file: Path) -> None:
        """Keep it, whole or not at all."""
        with open_target(file, overwrite=True) as target:
            write_all(target, memoryview(json.dumps(asdict(self), indent=1).encode()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A character and the clips that it is learned from.

    Attributes:
        number: of the character, from 0.
        character: who it is.
        clips: folder of its clips.
    """

    number: int
    character: DemoCharacter
    clips: Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A run to make.

    Attributes:
        checkpoint, work, plan, device: as `Benchmark` takes them.
        name: of the row.
        subject: what is learned and drawn.
        seed: of learning and drawing.
    """

    checkpoint: Checkpoint
    work: Path
    plan: Plan
    device: str
    name: str
    subject: Subject
    seed: int


def make_run(job: Job) -> str:
    """Make a run and keep it, in a process of its own; returns its name."""
    Benchmark(job.checkpoint, job.work, job.plan, job.device).measure(job.name, job.subject, job.seed)
    return f"{job.name}, {job.subject.character.name}, seed {job.seed}"


def run(*, quick: bool, device: str) -> Outcome:
    """Measure everything."""
    checkpoint = Checkpoint.find()
    if not quick:
        return Benchmark(checkpoint, WORK / checkpoint.fingerprint(), Plan(), device).run()
    with tempfile.TemporaryDirectory(prefix="engram-video-quality-") as folder:
        return Benchmark(checkpoint, Path(folder), Plan.quick(), device).run()


class Benchmark:
    """One call of `run`."""

    def __init__(self, checkpoint: Checkpoint, work: Path, plan: Plan, device: str) -> None:
        self._checkpoint, self._work, self._plan, self._device = checkpoint, work, plan, device
        self._judges = Judges(checkpoint)
        self._characters, self._phrases = read_characters()

    def run(self) -> Outcome:
        """Measure everything."""
        self._work.mkdir(parents=True, exist_ok=True)
        subjects = [
            Subject(number=number, character=one, clips=self._make_clips(number, one))
            for number, one in enumerate(self._characters)
        ]
        names = (BASE, DESCRIBED, *(method.name for method in self._plan.methods))
        self._make_missing(list(product(names, subjects, self._plan.seeds)))
        found: dict[str, dict[int, list[Result]]] = {}
        for name in names:
            found[name] = {seed: [self._read(name, each, seed) for each in subjects] for seed in self._plan.seeds}
            print(f"{name}: identity {_show(_means(found[name], 'identity'))}", flush=True)
        return self._sum_up(found, subjects)

    def measure(self, name: str, subject: Subject, seed: int) -> None:
        """Make a run and keep what it came to."""
        task, method = self._task(name, subject, seed), self._method(name)
        n_values, seconds = 0, 0.0
        if method is None:
            pipeline = open_base(task)
        else:
            started = monotonic()
            n_values = method.run(task)
            seconds = monotonic() - started
            # What it takes to go on with a run is not needed any more.
            shutil.rmtree(task.output.with_suffix(".run"), ignore_errors=True)
            pipeline = method.open(task)
        result = self._look_at(pipeline, name, subject, seed)
        replace(result, values=n_values, seconds=seconds).write(self._record(name, subject, seed))

    def _make_missing(self, runs: Sequence[tuple[str, Subject, int]]) -> None:
        """Make the runs that are not kept."""
        jobs = [
            Job(
                checkpoint=self._checkpoint,
                work=self._work,
                plan=self._plan,
                device=self._device,
                name=name,
                subject=subject,
                seed=seed,
            )
            for name, subject, seed in runs
            if not self._is_kept(name, subject, seed)
        ]
        make_all(make_run, jobs, device=self._device)

    def _method(self, name: str) -> Method | None:
        """Return the method of a row; None for the base model."""
        return next((method for method in self._plan.methods if method.name == name), None)

    def _look_at(self, pipeline: Any, name: str, subject: Subject, seed: int) -> Result:
        """Draw everything with a pipeline and measure it."""
        asked = self._ask(subject, seed, described=name == DESCRIBED)
        # The base model draws these twice as well: noise would show.
        scores = self._judges.score(subject.character, asked, self._draw(pipeline, asked))
        controls = self._ask_controls(seed)
        # By the process that compares with them.
        base, own = self._draw(open_base(self._task(BASE, subject, seed)), controls), self._draw(pipeline, controls)
        return Result(
            facts=self._facts(name, subject, seed),
            scores=scores,
            identical=sum(a.tobytes() == b.tobytes() for a, b in zip(base, own, strict=True)),
            controls=len(own),
            difference=mean(compare_clips(a, b) for a, b in zip(base, own, strict=True)),
            showing=self._judges.share_showing(subject.character, own),
        )

    def _record(self, name: str, subject: Subject, seed: int) -> Path:
        """Return the file of what a run came to."""
        return self._task(name, subject, seed).output.with_suffix(".json")

    def _is_kept(self, name: str, subject: Subject, seed: int) -> bool:
        """Tell whether a run of the same facts is kept."""
        file = self._record(name, subject, seed)
        facts = json.loads(json.dumps(self._facts(name, subject, seed)))
        return file.exists() and Result.read(file).facts == facts

    def _read(self, name: str, subject: Subject, seed: int) -> Result:
        return Result.read(self._record(name, subject, seed))

    def _task(self, name: str, subject: Subject, seed: int) -> Task:
        # No dots: what follows the last one would be taken for a suffix.
        file = f"{name}, {subject.character.slug}, {seed}".replace(".", "_")
        return Task(
            model=self._checkpoint.model,
            clips=subject.clips,
            trigger=subject.character.name,
            output=self._work / file,
            cache=self._work / "frozen",
            steps=self._plan.steps,
            seed=seed,
            device=self._device,
        )

    def _facts(self, name: str, subject: Subject, seed: int) -> dict[str, Any]:
        """Return all that a run depends on, beside the checkpoint."""
        method = self._method(name)
        return {
            "look": dict(self._plan.look),
            "shown": list(shown_motions(subject.number)),
            "asked": [asdict(one) for one in self._ask(subject, seed, described=name == DESCRIBED)],
            "controls": self._control_prompts(),
            "settings": {} if method is None else method.describe(self._task(name, subject, seed)),
        }

    def _ask(self, subject: Subject, seed: int, *, described: bool = False) -> list[Asked]:
        """Return what to draw of a character: each new scene with each new motion."""
        character = subject.character
        scenes = [scene for scene in self._phrases if scene not in character.shown][: self._plan.scenes]
        motions = new_motions(subject.number)[: self._plan.motions]
        who = character.description if described else character.name
        return [
            Asked(
                prompt=f"{who} {MOTION_PHRASES[motion]} {self._phrases[scene]}",
                seed=1000 * seed + number,
                scene=scene,
                motion=motion,
            )
            for number, (scene, motion) in enumerate((scene, motion) for scene in scenes for motion in motions)
        ]

    def _control_prompts(self) -> list[str]:
        return list(CONTROLS[: self._plan.controls])

    def _ask_controls(self, seed: int) -> list[Drawing]:
        return [Drawing(prompt=prompt, seed=1000 * seed + at) for at, prompt in enumerate(self._control_prompts())]

    def _draw(self, pipeline: Any, asked: Sequence[Asked] | Sequence[Drawing]) -> list[Pixels]:
        return draw_clips(pipeline, [Drawing(prompt=one.prompt, seed=one.seed) for one in asked], **self._plan.look)

    def _make_clips(self, number: int, character: DemoCharacter) -> Path:
        """Make a character's clips of its pictures by the frozen model; returns their folder."""
        pictures, clips = (self._work / f"{character.slug}-{kind}" for kind in ("pictures", "clips"))
        write_pictures(character, shown_motions(number), pictures)
        values = {name: self._plan.look[name] for name in LOOK if name != "batch_size"}
        values |= {"fps": WAN22.tiny_generate["fps"], "precision": WAN22.tiny_generate["precision"]}
        values |= {"model": self._checkpoint.model, "data": pictures, "trigger": character.name, "output": clips}
        values |= {"described_as": character.description}
        values |= {"device": self._device}
        print(f"the clips of {character.name} ...", file=sys.stderr, flush=True)
        # Those that were made with the same settings are kept all the same.
        build_clips(resolve_settings(Wan22ClipsSettings, [Layer(source="benchmark", values=values)]), overwrite=True)
        return clips

    def _sum_up(self, found: Mapping[str, Mapping[int, Sequence[Result]]], subjects: Sequence[Subject]) -> Outcome:
        shows, holds, stays = [], [], []
        figures: dict[str, Any] = {"seeds": list(self._plan.seeds)}
        for name, by_seed in found.items():
            results = [result for each in by_seed.values() for result in each]
            means = {metric: _means(by_seed, metric) for metric in Score.__dataclass_fields__}
            values = sorted({result.values for result in results})
            seconds = [result.seconds for result in results]
            shown = {
                metric: _show(found_means, digits=3 if metric in ("warping", "flow") else 2)
                for metric, found_means in means.items()
            }
            learned = (
                "" if not values[-1] else " to ".join(f"{value:,}" for value in dict.fromkeys((values[0], values[-1])))
            )
            shows.append(
                (name, learned, *(shown[metric] for metric in ("identity", "identity_drop", "scene", "motion")))
            )
            holds.append(
                (name, *(shown[each] for each in ("likeness", "likeness_drop", "consistency", "warping", "flow")))
            )
            if name != DESCRIBED:
                identical, count = (sum(getattr(each, what) for each in results) for what in ("identical", "controls"))
                difference = _show(_means_of(by_seed, lambda result: result.difference), digits=3)
                showing = _show(_means_of(by_seed, lambda result: result.showing))
                took = f"{mean(seconds):.0f} s" if learned else ""
                stays.append((name, f"{identical} of {count}", difference, showing, took))
            figures[name] = {
                "values": values,
                "seconds": seconds,
                "identical": [result.identical for result in results],
                "controls": [result.controls for result in results],
                "difference": [result.difference for result in results],
                "showing": [result.showing for result in results],
                **means,
            }
        made = {
            subject.character.name: self._judges.share_showing(
                subject.character, [read_clip(path).frames for path in sorted(subject.clips.glob("*.mp4"))]
            )
            for subject in subjects
        }
        figures["frames of the clips learned from that show the character"] = made
        n_clips = sum(len(result.scores) for result in next(iter(found[BASE].values())))
        of_seeds = f"mean (lowest to highest) of {len(self._plan.seeds)} seeds of {n_clips} clips"
        return Outcome(
            tables=[
                Table(
                    title=f"Characters in new scenes and motions, {of_seeds}",
                    columns=("method", "learns", "identity", "lost by the end", "scene", "motion"),
                    rows=shows,
                ),
                Table(
                    title=f"The same clips by the judge's features and by optical flow, {of_seeds}",
                    columns=("method", "likeness", "lost by the end", "consistency", "warping error", "flow"),
                    rows=holds,
                ),
                Table(
                    title="Prompts without the name, and the time that learning took",
                    columns=("method", "identical clips", "difference", "frames with the character", "learning"),
                    rows=stays,
                ),
            ],
            notes=[
                "of the frames of the clips learned from, the judge finds the character in "
                + ", ".join(f"{share:.2f} ({name})" for name, share in made.items())
                + "."
            ],
            figures=figures,
        )


def _means(by_seed: Mapping[int, Sequence[Result]], metric: str) -> list[float]:
    """Return a figure's mean over the clips of each seed; seeds in which it was never measured are left out."""
    values = [
        [value for result in results for score in result.scores if (value := getattr(score, metric)) is not None]
        for results in by_seed.values()
    ]
    return [mean(each) for each in values if each]


def _means_of(by_seed: Mapping[int, Sequence[Result]], read: Callable[[Result], float]) -> list[float]:
    return [mean(map(read, results)) for results in by_seed.values()]


def _show(values: Sequence[float], digits: int = 2) -> str:
    """Return mean, lowest and highest as one cell."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
