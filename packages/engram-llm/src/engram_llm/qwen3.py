"""Backbone `qwen3`: decoder language models with a hashed n-gram memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engram_core import (
    ConvertSettings,
    EvaluateReport,
    HashedMemory,
    StreamTokenizer,
    TextReport,
    TrainReport,
    Watcher,
)
from engram_core.huggingface import TokenizerSource, load_tokenizers
from engram_llm.settings import EvaluateSettings, GenerateSettings, TrainSettings
from engram_llm.shipped import TINY, model_place

__all__ = ["QWEN3", "Qwen3"]

# Chosen among six on a validation split of the training texts of the domain; docs/tiny-language.md has the figures.
_TINY_TRAIN: Mapping[str, Any] = {
    "engram_vocab_size": (8009, 8009),
    "n_embed_per_ngram": 128,
    "n_head_per_ngram": 4,
    "layer_ids": (1, 3, 5),
    "learning_rate": 1e-2,
    "max_length": 256,
    "steps": 300,
    "precision": "fp32",
}


class Qwen3:
    """Qwen3 and its like in transformers; the memory is addressed by hashes, not by registered triggers."""

    name = "qwen3"
    kind = "hashed-memory"
    title = "Qwen3"
    # Hidden states before chosen decoder layers; which layers is part of a memory's own settings.
    streams: Mapping[str, str] = {"text": "decoder_layer_input"}
    default_model = "Qwen/Qwen3-0.6B"
    tokenizers: Mapping[str, TokenizerSource] = {"text": TokenizerSource(subfolder="", max_length=None)}
    train_settings = TrainSettings
    generate_settings = GenerateSettings
    evaluate_settings = EvaluateSettings

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizer of a model in transformers layout; loads no weights."""
        return load_tokenizers(model_place(model), self.tokenizers, streams)

    def default_train_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: it is narrow, its texts are short, and it is small enough for full precision."""
        return _TINY_TRAIN if model == TINY else {}

    def default_generate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: it is small enough for full precision."""
        return {"precision": "fp32"} if model == TINY else {}

    def default_evaluate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: it is small enough for full precision."""
        return self.default_generate_settings(model)

    def train(
        self, settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
    ) -> TrainReport:
        """Train a memory, LoRA, or both; see `engram_llm.training.trainer.train`."""
        from engram_llm.training.trainer import train  # imports torch

        return train(settings, resume=resume, overwrite=overwrite, watcher=watcher)

    def generate(
        self, settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> TextReport:
        """Generate texts; see `engram_llm.generation.generate`."""
        from engram_llm.generation import generate  # imports torch

        return generate(settings, overwrite=overwrite, watcher=watcher)

    def evaluate(
        self, settings: EvaluateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> EvaluateReport:
        """Measure texts and tasks; see `engram_llm.evaluation.evaluate`."""
        from engram_llm.evaluation import evaluate  # imports torch

        return evaluate(settings, overwrite=overwrite, watcher=watcher)

    def convert(self, source: Path, settings: ConvertSettings) -> HashedMemory:
        """Import a checkpoint of TinyEngram or engram-peft; see `engram_llm.conversion.convert`."""
        from engram_llm.conversion import convert  # imports torch

        return convert(source, settings, self.name, self.default_model)


QWEN3 = Qwen3()
