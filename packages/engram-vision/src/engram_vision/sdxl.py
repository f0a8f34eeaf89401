"""Backbone `sdxl`: Stable Diffusion XL, two CLIP text encoders, their last states but one edited."""

from __future__ import annotations

from engram_vision.backbone import ImageBackbone
from engram_vision.evaluation.settings import SDXLEvaluateSettings
from engram_vision.families import SDXL as FAMILY
from engram_vision.settings import SDXLGenerateSettings, SDXLTrainSettings

__all__ = ["SDXL", "StableDiffusionXL"]


class StableDiffusionXL(ImageBackbone):
    """Stable Diffusion XL in diffusers' `StableDiffusionXLPipeline`."""

    family = FAMILY
    title = "Stable Diffusion XL"
    train_settings = SDXLTrainSettings
    generate_settings = SDXLGenerateSettings
    evaluate_settings = SDXLEvaluateSettings


SDXL = StableDiffusionXL()
