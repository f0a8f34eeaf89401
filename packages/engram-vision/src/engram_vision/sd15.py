"""Backbone `sd15`: Stable Diffusion 1.x, one CLIP text encoder, its last hidden state edited."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_core import Adapter, ConvertSettings
from engram_vision.backbone import ImageBackboneWithDemo
from engram_vision.evaluation.settings import SD15EvaluateSettings
from engram_vision.families import SD15 as FAMILY
from engram_vision.settings import SD15GenerateSettings, SD15TrainSettings

__all__ = ["SD15", "StableDiffusion15"]


class StableDiffusion15(ImageBackboneWithDemo):
    """Stable Diffusion 1.x in diffusers' `StableDiffusionPipeline`."""

    family = FAMILY
    title = "Stable Diffusion 1.5"
    train_settings = SD15TrainSettings
    generate_settings = SD15GenerateSettings
    evaluate_settings = SD15EvaluateSettings
    tiny_train: Mapping[str, Any] = {
        "steps": 300,
        "batch_size": 10,
        "warm_up": 10,
        "vector_rate": 0.5,
        "scale_rate": 1e-3,
        "weight_decay": 0.0,
        "flip": True,
        "validate_every": 50,
    }
    tiny_generate: Mapping[str, Any] = {"steps": 20, "guidance": 4.0}

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Import a TinyEngram checkpoint: `engram_weights*.pt` with `engram_config.json` beside it."""
        from engram_vision.tinyengram import convert_sd15  # imports torch

        return convert_sd15(source, settings, self)


SD15 = StableDiffusion15()
