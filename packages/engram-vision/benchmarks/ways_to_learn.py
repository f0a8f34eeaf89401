"""The methods that are compared: how each learns, how what it learned is loaded, and what a prompt calls it.

A further method is one more entry of `METHODS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import monotonic
from typing import Any

from baselines import (
    PRIOR_EACH,
    Learned,
    invented_word,
    learn_inversion,
    learn_lora,
    learn_whole,
    load_inversion,
    load_lora,
    load_whole,
)
from lessons import Task
from quiet import Others
from timed import count_values

from engram_core import Watcher
from engram_vision.demo.characters import DemoCharacter
from engram_vision.loading import load_engram
from engram_vision.training.trainer import train

STEPS = 300
SHORT = (20, 50)

# Peak learning rates of 300 steps, as the benchmark `rates` picked them on the development character.
RATES: Mapping[str, float] = {
    "textual inversion": 1e-2,
    "textual inversion, 8 vectors": 1e-3,
    "LoRA of the U-Net, rank 4": 1e-3,
    "LoRA of the U-Net, rank 16": 3e-4,
    "LoRA of the text encoder, rank 4": 3e-3,
    "LoRA of the transformer, rank 4": 3e-4,
    "LoRA of the transformer, rank 16": 3e-4,
    "DreamBooth": 1e-4,
    "DreamBooth, prior preserved": 1e-4,
}


LIBRARIES = ("torch", "diffusers", "transformers", "peft")


@cache
def digest_code() -> str:
    """Return a digest of the scripts by which methods learn; what was learned by others is learned anew."""
    parts = (Path(__file__).with_name(name).read_bytes() for name in ("baselines.py", "lessons.py"))
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to learn.

    Attributes:
        name: for the tables.
        kind: a key of `KINDS`.
        steps: of learning.
        options: what the kind has to know.
    """

    name: str
    kind: str
    steps: int = STEPS
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return self.kind in KINDS

    @property
    def composes(self) -> bool:
        """Whether several of what it learned can be in force at once."""
        return self.kind != "whole"

    @property
    def has_rate(self) -> bool:
        """Whether a rate of it had to be chosen here."""
        return "rate" in self.options

    def with_rate(self, rate: float) -> Method:
        """Return the method with another learning rate."""
        return replace(self, options={**self.options, "rate": rate})

    def word(self, character: DemoCharacter) -> str:
        """Return what a prompt calls a character."""
        if self.kind == "words":
            return character.description
        return invented_word(character.name) if self.kind == "inversion" else character.name

    def facts(self, task: Task) -> dict[str, Any]:
        """Return what the outcome depends on."""
        changes = engram_changes(task, self.options) if self.kind == "engram" else {}
        facts = {"settings": task.facts(changes), "kind": self.kind, "options": dict(self.options)}
        return facts | {"code": digest_code(), "libraries": {name: version(name) for name in LIBRARIES}}

    def learn(self, task: Task) -> Learned:
        """Learn and write what was learned."""
        return KINDS[self.kind].learn(task, self.options)

    def load(self, pipeline: Any, trigger: str, output: Path) -> None:
        """Put what was learned into a pipeline."""
        if self.learns:
            KINDS[self.kind].load(pipeline, trigger, output)

    def kept(self, output: Path) -> Path:
        """Return the file or folder that holds what was learned."""
        return output.with_suffix(KINDS[self.kind].suffix)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What methods of a kind have in common.

    Attributes:
        learn: learns and writes.
        load: puts into a pipeline what was learned of a trigger.
        suffix: of the file or folder that is written.
    """

    learn: Callable[[Task, Mapping[str, Any]], Learned]
    load: Callable[[Any, str, Path], None]
    suffix: str


class _Clock(Watcher):
    """Measures the time from the first step to the last."""

    def __init__(self) -> None:
        self.seconds, self.busy = 0.0, 0.0
        self._started, self._others = 0.0, Others()

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:  # noqa: ARG002
        """Start with the first step."""
        if title == "training":
            self._started = monotonic()
            self._others.restart()

    def end(self) -> None:
        """Stop after the last step."""
        if self._started and not self.seconds:
            self.seconds, self.busy = monotonic() - self._started, self._others.share()


def engram_changes(task: Task, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return what an engram's settings differ in from `tiny`'s: the sites, and checks that suit fewer steps."""
    every = task.settings().validate_every
    return {"sites": options["sites"], "validate_every": min(every, max(1, task.steps // 2))}


def learn_engram(task: Task, options: Mapping[str, Any]) -> Learned:
    """Train with the project's own trainer; what a stopped run left is begun anew."""
    clock = _Clock()
    report = train(task.settings(engram_changes(task, options)), overwrite=True, watcher=clock)
    return Learned(
        values=count_values(report.output),
        seconds=clock.seconds,
        others=clock.busy,
        size=report.output.stat().st_size,
    )


def engram_file(output: Path) -> Path:
    """Return where an engram is kept."""
    return output.with_suffix(".safetensors")


def _load_engram(pipeline: Any, trigger: str, output: Path) -> None:
    load_engram(pipeline, engram_file(output), name=trigger)


KINDS: Mapping[str, Kind] = {
    "engram": Kind(learn=learn_engram, load=_load_engram, suffix=".safetensors"),
    "inversion": Kind(learn=learn_inversion, load=load_inversion, suffix=".word.safetensors"),
    "lora": Kind(learn=learn_lora, load=load_lora, suffix=".lora"),
    "whole": Kind(learn=learn_whole, load=load_whole, suffix=".unet"),
}

BASE = Method(name="the base model", kind="base", steps=0)
WORDS = Method(name="the base model, looks in words", kind="words", steps=0)


def list_methods(phrases: Sequence[str], *, short: bool = False) -> tuple[Method, ...]:
    """Return the methods that are compared.

    Args:
        phrases: of the scenes in which DreamBooth draws its class.
        short: whether engrams and LoRA alone are, of a denoiser that is a transformer.
    """

    def rated(name: str, kind: str, **options: Any) -> Method:
        return Method(name=name, kind=kind, options={"rate": RATES[name], **options})

    engrams = [
        Method(name=f"engram, {what}, {steps} steps", kind="engram", steps=steps, options={"sites": sites})
        for sites, what in (("text", "one residual"), ("blocks", "a residual for each block"))
        for steps in (*SHORT, STEPS)
    ]
    if short:
        loras = [
            rated(f"LoRA of the transformer, rank {rank}", "lora", part="transformer", rank=rank) for rank in (4, 16)
        ]
        return (*engrams, *loras)
    prior = {"phrases": list(phrases), "each": PRIOR_EACH}
    return (
        *engrams,
        rated("textual inversion", "inversion", vectors=1),
        rated("textual inversion, 8 vectors", "inversion", vectors=8),
        rated("LoRA of the U-Net, rank 4", "lora", part="unet", rank=4),
        rated("LoRA of the U-Net, rank 16", "lora", part="unet", rank=16),
        rated("LoRA of the text encoder, rank 4", "lora", part="text_encoder", rank=4),
        rated("DreamBooth", "whole", prior=False),
        rated("DreamBooth, prior preserved", "whole", prior=True, **prior),
    )
