"""Backbone `sd35`: Stable Diffusion 3.5, three text encoders, each with its own table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_core import Adapter, ConvertSettings
from engram_vision.backbone import ImageBackboneWithDemo
from engram_vision.evaluation.settings import SD35EvaluateSettings
from engram_vision.families import SD35 as FAMILY
from engram_vision.settings import SD35GenerateSettings, SD35TrainSettings

__all__ = ["SD35", "StableDiffusion35"]


class StableDiffusion35(ImageBackboneWithDemo):
    """Stable Diffusion 3.5 (medium, large) in diffusers' `StableDiffusion3Pipeline`."""

    family = FAMILY
    title = "Stable Diffusion 3.5"
    train_settings = SD35TrainSettings
    generate_settings = SD35GenerateSettings
    evaluate_settings = SD35EvaluateSettings
    tiny_train: Mapping[str, Any] = {
        "steps": 300,
        "batch_size": 10,
        "warm_up": 10,
        "vector_rate": 0.05,
        "scale_rate": 1e-2,
        "weight_decay": 0.0,
        "flip": True,
        "validate_every": 50,
        "precision": "fp32",
    }
    tiny_generate: Mapping[str, Any] = {"steps": 20, "guidance": 4.0, "precision": "fp32"}

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Import a TinyEngram checkpoint: a folder with `engram_1..3.pt` and `scale_1..3.pt`."""
        from engram_vision.tinyengram import convert_sd35  # imports torch

        return convert_sd35(source, settings, self)


SD35 = StableDiffusion35()
