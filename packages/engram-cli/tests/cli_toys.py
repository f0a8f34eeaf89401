"""A backbone of another package, quick and without torch, which does what its trigger or prompt says."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from engram_core import (
    ClipsReport,
    DemoReport,
    EngramError,
    EvaluateReport,
    Generated,
    GeneratedText,
    GenerateReport,
    InputError,
    Measure,
    TextReport,
    TrainReport,
    UsedAdapter,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTraining:
    data: Path
    trigger: str
    output: Path
    name: str | None = None
    model: str = "toy/model"
    steps: int = 10
    vector_rate: float = 0.5
    max_grad_norm: float | None = 1.0
    flip: bool = False
    keep: Literal["best", "last"] = "best"
    preview_prompts: tuple[str, ...] = ()
    beats: int = 9  # no flag of the command sets it
    motif: str | None = None

    def faults(self):
        if self.steps < 1:
            yield f"steps is {self.steps}, expected at least 1"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyGeneration:
    output: Path = Path("images")
    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    seeds: tuple[int, ...] = (0,)
    model: str = "toy/model"
    compare: bool = False
    width: int | None = None
    guidance: float = 7.5

    def faults(self):
        if not self.prompts:
            yield "there is no prompt; give --prompt or --prompts-file"


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyEvaluation:
    adapters: tuple[str, ...] = ()
    texts: tuple[Path, ...] = ()
    tasks: tuple[str, ...] = ()
    model: str = "toy/model"
    base: bool = True
    window: int | None = None
    output: Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyClips:
    data: Path
    trigger: str
    output: Path
    model: str = "toy/model"
    frames: int = 81
    described_as: str | None = None


class Mute:
    """A backbone without abilities."""

    kind = "concept-table"
    streams = MappingProxyType({"text": "last_hidden_state"})
    default_model = "toy/model"

    def __init__(self, name="mute", title="a mute"):
        self.name, self.title = name, title

    def load_tokenizers(self, model, streams=None):
        return {}


class Toy(Mute):
    """A backbone that trains, generates and demonstrates, and remembers with what."""

    train_settings = ToyTraining
    generate_settings = ToyGeneration

    def __init__(self, name="toy", title="a toy"):
        super().__init__(name, title)
        self.calls = []
        self.models = []
        self.advice = {}
        self.failures = ()

    def default_train_settings(self, model):
        self.models.append(model)
        return self.advice

    default_generate_settings = default_train_settings

    def train(self, settings, *, resume=False, overwrite=False, watcher=None):
        self.calls.append((settings, resume, overwrite))
        watcher.begin("training", settings.steps)
        watcher.note("a picture is small")
        if settings.trigger == "stop":
            raise KeyboardInterrupt
        if settings.trigger == "fail":
            raise EngramError("pictures: has no captions; write some")
        if settings.trigger == "wait":
            time.sleep(60)
        watcher.advance(settings.steps, {"loss": 0.25, "memory_mb": 1500.0})
        return self._report(settings)

    def _report(self, settings):
        return TrainReport(
            output=settings.output,
            run_dir=settings.output.with_suffix(".run"),
            identity="ab" * 32,
            n_bytes=1234,
            steps=settings.steps,
            kept_step=settings.steps - 1,
            loss=0.123456,
            seconds=83.2,
            entries={"text": 7, "other": 1},
        )

    def check_concepts(self, settings, *, resume=False, overwrite=False):
        if len({each.output for each in settings}) < len(settings):
            raise InputError("two write the same file")

    def train_together(self, settings, *, resume=False, overwrite=False, watcher=None):
        self.calls.append((settings, resume, overwrite))
        watcher.begin("training", settings[0].steps)
        if any(each.trigger == "stop" for each in settings):
            raise KeyboardInterrupt
        return [self._report(each) for each in settings]

    def generate(self, settings, *, overwrite=False, watcher=None):
        self.calls.append((settings, overwrite))
        watcher.note("'aldric' stands in the prompt but does not fire in text")
        files = [
            Generated(path=settings.output / f"{seed}.png", prompt=prompt, seed=seed, identity=None)
            for prompt in settings.prompts
            for seed in settings.seeds
        ]
        grid = settings.output / "grid.png" if settings.compare else None
        return GenerateReport(files=tuple(files), grid=grid, seconds=2.5)

    def demo(self, output, *, seed=0, overwrite=False, watcher=None):
        self.calls.append((output, seed, overwrite))
        return DemoReport(
            page=output / "index.html",
            figures={"triggers that fire": "12 of 12", "bytes equal without a trigger": "yes"},
            passed=not self.failures,
            failures=self.failures,
            seconds=3.5,
        )


class Talker(Mute):
    """A backbone for texts that measures as well; what it says is in its prompts, what fails in its tasks."""

    kind = "hashed-memory"
    generate_settings = ToyGeneration
    evaluate_settings = ToyEvaluation

    def __init__(self, name="talker", title="a talker"):
        super().__init__(name, title)
        self.calls = []

    def default_generate_settings(self, model):
        return {}

    default_evaluate_settings = default_generate_settings

    def generate(self, settings, *, overwrite=False, watcher=None):
        self.calls.append((settings, overwrite))
        adapters = tuple(UsedAdapter(file=file, identity="ab" * 32, strength=0.5) for file in settings.adapters)
        texts = []
        for prompt in settings.prompts:
            for used in ((), adapters) if settings.compare else (adapters,):
                text = f" {'more' if used else 'less'}\n[bold]and\x1b[31m so on"
                title = f"{'engram' if used else 'base'}: {prompt}"
                watcher.text(title, text[:5])
                watcher.text(title, text[5:])
                watcher.text(title, "")
                fields = {"prompt": prompt, "seed": 0, "text": text, "n_tokens": 3, "stopped": "end"}
                texts.append(GeneratedText(adapters=used, **fields))
        output = settings.output if settings.output != Path("images") else None
        return TextReport(texts=tuple(texts), output=output, seconds=1.5)

    def evaluate(self, settings, *, overwrite=False, watcher=None):
        self.calls.append((settings, overwrite))
        watcher.begin("reading", 4)
        watcher.advance(4)
        measures = [
            Measure(
                subject=str(text), metric="perplexity", values={"base": 9.5, "engram": 7.25}, higher_is_better=False
            )
            for text in settings.texts
        ] + [
            Measure(
                subject=task,
                metric="acc",
                values={"base": 0.5, "engram": value},
                higher_is_better=True,
                errors={"base": 0.03, "engram": 0.04},
            )
            for task, value in zip(settings.tasks, (0.45, 0.4, 0.6), strict=False)
        ]
        counts = {"documents": 1, "tokens": 20, "bytes": 80, "windows": 4}
        failures = [f"{task} failed" for task in settings.tasks if task.startswith("bad")]
        return EvaluateReport(
            measures=tuple(measures),
            adapters=tuple(UsedAdapter(file=file, identity="ab" * 32, strength=1.0) for file in settings.adapters),
            details={"texts": {str(text): counts for text in settings.texts}, "failures": failures},
            output=settings.output,
            seconds=83.0,
        )


class Filmer(Mute):
    """A backbone that makes clips of pictures; a trigger can stop it."""

    clips_settings = ToyClips

    def __init__(self, name="filmer", title="a filmer"):
        super().__init__(name, title)
        self.calls = []

    def default_clips_settings(self, model):
        return {"frames": 9} if model == "tiny" else {}

    def build_clips(self, settings, *, overwrite=False, watcher=None):
        self.calls.append((settings, overwrite))
        watcher.begin("making clips", 2)
        if settings.trigger == "stop":
            raise KeyboardInterrupt
        return ClipsReport(
            folder=settings.output,
            clips=(settings.output / "a.mp4", settings.output / "b.mp4"),
            n_made=1,
            sheet=settings.output / "sheet.png",
            seconds=83.0,
        )


TOY = Toy()
