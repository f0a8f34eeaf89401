"""A backbone of another package, quick and without torch, which does what its trigger or prompt says."""

import time
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from engram_core import DemoReport, EngramError, Generated, GenerateReport, TrainReport


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyTraining:
    data: Path
    trigger: str
    output: Path
    model: str = "toy/model"
    steps: int = 10
    vector_rate: float = 0.5
    max_grad_norm: float | None = 1.0
    flip: bool = False
    keep: Literal["best", "last"] = "best"
    preview_prompts: tuple[str, ...] = ()
    frames: int = 9  # no flag of the command sets it
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


TOY = Toy()
