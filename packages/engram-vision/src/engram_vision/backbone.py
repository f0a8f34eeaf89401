"""What the backbones of diffusers share; importing it imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from engram_core import DemoReport, EvaluateReport, GenerateReport, StreamTokenizer, TrainReport, Watcher
from engram_core.huggingface import TokenizerSource, load_tokenizers
from engram_vision.evaluation.settings import EvaluateSettings
from engram_vision.families import Family
from engram_vision.settings import GenerateSettings, TrainSettings
from engram_vision.shipped import TINY, model_place

if TYPE_CHECKING:
    from engram_vision.training.medium import Medium

__all__ = ["DiffusersBackbone", "ImageBackbone", "ImageBackboneWithDemo"]


class DiffusersBackbone:
    """A family of generators in diffusers; subclasses say which, and with which settings.

    Attributes:
        family: the parts of its pipeline.
        tiny_train, tiny_generate: settings that suit its `tiny` better than the defaults.
    """

    kind = "concept-table"
    family: Family
    title: str
    train_settings: type[TrainSettings]
    generate_settings: type[GenerateSettings]
    evaluate_settings: type[EvaluateSettings]
    tiny_train: Mapping[str, Any] = MappingProxyType({})
    tiny_generate: Mapping[str, Any] = MappingProxyType({})

    def __init__(self) -> None:
        """Derive name, default model, streams and tokenizers from the family."""
        parts = self.family.streams
        self.name, self.default_model = self.family.name, self.family.default_model
        self.streams: Mapping[str, str] = {stream: part.site for stream, part in parts.items()}
        self.tokenizers: Mapping[str, TokenizerSource] = {
            stream: TokenizerSource(subfolder=part.tokenizer, max_length=part.max_length)
            for stream, part in parts.items()
        }

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizers of a model in diffusers layout; loads no weights."""
        return load_tokenizers(model_place(self.name, model), self.tokenizers, streams)

    def default_train_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: its text states are narrow and its training short, so rates are high."""
        return self.tiny_train if model == TINY else {}

    def default_generate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: it needs fewer steps and less guidance."""
        return self.tiny_generate if model == TINY else {}

    def default_evaluate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: to draw as `generate` does, and the judge that was made for what it draws."""
        return {**self.tiny_generate, "image_model": TINY, "text_model": TINY} if model == TINY else {}

    def medium(self) -> Medium:
        """Return what training must know of what the family draws; imports torch."""
        raise NotImplementedError

    def train(
        self, settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
    ) -> TrainReport:
        """Train one concept; see `engram_vision.training.trainer.train`."""
        from engram_vision.training.trainer import train  # imports torch

        return train(settings, resume=resume, overwrite=overwrite, watcher=watcher, medium=self.medium())

    def check_concepts(
        self, settings: Sequence[TrainSettings], *, resume: bool = False, overwrite: bool = False
    ) -> None:
        """Refuse what `train_together` would; see `engram_vision.training.checks.check_concepts`."""
        from engram_vision.training.checks import check_concepts

        check_concepts(settings, resume=resume, overwrite=overwrite)

    def train_together(
        self,
        settings: Sequence[TrainSettings],
        *,
        resume: bool = False,
        overwrite: bool = False,
        watcher: Watcher | None = None,
    ) -> list[TrainReport]:
        """Train several concepts at once; see `engram_vision.training.trainer.train_together`."""
        from engram_vision.training.trainer import train_together  # imports torch

        return train_together(settings, resume=resume, overwrite=overwrite, watcher=watcher, medium=self.medium())


class ImageBackbone(DiffusersBackbone):
    """A family of image generators."""

    def medium(self) -> Medium:
        """Return `PICTURES`."""
        from engram_vision.training.pictures import PICTURES  # imports torch

        return PICTURES

    def generate(
        self, settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> GenerateReport:
        """Draw pictures; see `engram_vision.generation.generate`."""
        from engram_vision.generation import generate  # imports torch

        return generate(settings, overwrite=overwrite, watcher=watcher)

    def evaluate(
        self, settings: EvaluateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> EvaluateReport:
        """Measure pictures, base against engram; see `engram_vision.evaluation.run.evaluate`."""
        from engram_vision.evaluation.run import evaluate  # imports torch

        return evaluate(settings, overwrite=overwrite, watcher=watcher)


class ImageBackboneWithDemo(ImageBackbone):
    """A family for which a `tiny` checkpoint ships, so that `engram demo` can show it."""

    def demo(
        self, output: Path, *, seed: int = 0, overwrite: bool = False, watcher: Watcher | None = None
    ) -> DemoReport:
        """Train, merge and draw two characters on `tiny`; see `engram_vision.demo.run.run_demo`."""
        from engram_vision.demo.run import run_demo  # imports torch

        return run_demo(self, output, seed=seed, overwrite=overwrite, watcher=watcher)
