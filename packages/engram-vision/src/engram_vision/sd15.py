"""Backbone `sd15`: Stable Diffusion 1.x, one CLIP text encoder, its last hidden state edited."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from engram_core import (
    Adapter,
    ConvertSettings,
    DemoReport,
    GenerateReport,
    StreamTokenizer,
    TrainReport,
    Watcher,
)
from engram_core.huggingface import TokenizerSource, load_tokenizers
from engram_vision.settings import GenerateSettings, TrainSettings
from engram_vision.shipped import TINY, tiny_folder

__all__ = ["SD15", "StableDiffusion15"]


class StableDiffusion15:
    """Stable Diffusion 1.x in diffusers' `StableDiffusionPipeline`."""

    name = "sd15"
    kind = "concept-table"
    title = "Stable Diffusion 1.5"
    # After the final layer norm: the states the U-Net's cross-attention reads (report, section 2.7).
    streams: Mapping[str, str] = {"clip_l": "last_hidden_state"}
    default_model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    tokenizers: Mapping[str, TokenizerSource] = {"clip_l": TokenizerSource(subfolder="tokenizer", max_length=77)}
    train_settings = TrainSettings
    generate_settings = GenerateSettings

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizer of a model in diffusers layout; loads no weights."""
        return load_tokenizers(str(tiny_folder()) if model == TINY else model, self.tokenizers, streams)

    def default_train_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: its text states are narrow and its training short, so rates are high."""
        if model != TINY:
            return {}
        return {
            "steps": 300,
            "batch_size": 10,
            "warm_up": 10,
            "vector_rate": 0.5,
            "scale_rate": 1e-3,
            "weight_decay": 0.0,
            "flip": True,
            "validate_every": 50,
        }

    def default_generate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`: it needs fewer steps and less guidance."""
        return {"steps": 20, "guidance": 4.0} if model == TINY else {}

    def train(
        self, settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
    ) -> TrainReport:
        """Train one concept; see `engram_vision.training.trainer.train`."""
        from engram_vision.training.trainer import train  # imports torch

        return train(settings, resume=resume, overwrite=overwrite, watcher=watcher)

    def generate(
        self, settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> GenerateReport:
        """Draw pictures; see `engram_vision.generation.generate`."""
        from engram_vision.generation import generate  # imports torch

        return generate(settings, overwrite=overwrite, watcher=watcher)

    def demo(
        self, output: Path, *, seed: int = 0, overwrite: bool = False, watcher: Watcher | None = None
    ) -> DemoReport:
        """Train, merge and draw two characters on `tiny`; see `engram_vision.demo.run.run_demo`."""
        from engram_vision.demo.run import run_demo  # imports torch

        defaults = self.default_train_settings(TINY)
        return run_demo(output, seed=seed, overwrite=overwrite, watcher=watcher, defaults=defaults)

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Import a TinyEngram checkpoint: `engram_weights*.pt` with `engram_config.json` beside it."""
        from engram_vision.tinyengram import convert_sd15  # imports torch

        return convert_sd15(source, settings, self)


SD15 = StableDiffusion15()
