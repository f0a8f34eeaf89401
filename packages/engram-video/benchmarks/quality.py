"""Characters in scenes and motions that no clip showed: engram, the published method and LoRA, and the base model.

All learn from the same clips, which the frozen model made of five pictures, in as many steps of as many clips. Nothing
was chosen by these figures. Run through `run.py`; each run is made in a process of its own and kept in
`build/video-quality`, so that a stopped benchmark goes on; with the runs lies a picture for each character.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from pathlib import Path
from statistics import mean
from time import monotonic
from typing import Any

from checkpoint import Checkpoint
from measure import Outcome
from methods import METHODS, Method, Task, open_base
from PIL import Image
from pooled import make_all
from quality_results import BASE, DESCRIBED, Result, list_means, show_means, sum_up
from scores import Asked, Judges, Pixels, compare_clips

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
from engram_vision.grid import draw_grid

WORK = Path("build/video-quality")
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
            print(f"{name}: identity {show_means(list_means(found[name], 'identity'))}", flush=True)
        for subject in subjects:
            self._write_grid(names, subject)
        return sum_up(found, {one.character.name: self._share_made(one) for one in subjects})

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

    def _share_made(self, subject: Subject) -> float:
        """Return the share of frames of the clips learned from that show the character."""
        clips = [read_clip(path).frames for path in sorted(subject.clips.glob("*.mp4"))]
        return self._judges.share_showing(subject.character, clips)

    def _write_grid(self, names: Sequence[str], subject: Subject) -> None:
        """Write a picture: a row for each method, with frames of a clip with the name and of one without."""
        seed, rows = self._plan.seeds[0], []
        controls = self._ask_controls(seed)
        quiet = next((one for one in controls if "monster" in one.prompt), controls[-1])
        for name in names:
            task, method = self._task(name, subject, seed), self._method(name)
            pipeline = open_base(task) if method is None else method.open(task)
            asked = self._ask(subject, seed, described=name == DESCRIBED)[0]
            clips = [*self._draw(pipeline, [asked]), *self._draw(pipeline, [quiet])]
            rows.append((name, [Image.fromarray(clip[at]) for clip in clips for at in (0, len(clip) // 2, -1)]))
        columns = [f"{what}{which}" for what in ("named, ", "unnamed, ") for which in ("first", "middle", "last")]
        sheet = draw_grid(columns, rows)
        sheet.save(self._work / f"{WAN22.name}-{subject.character.slug}.png", optimize=True)
