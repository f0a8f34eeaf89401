"""Backbone `wan22`: Wan 2.2 video, one UMT5 text encoder, edited before the text projection."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_core import ClipsReport, DemoReport, EvaluateReport, GenerateReport, Watcher
from engram_video.families import WAN22 as FAMILY
from engram_video.settings import (
    FORMATS,
    Wan22ClipsSettings,
    Wan22EvaluateSettings,
    Wan22GenerateSettings,
    Wan22TrainSettings,
)
from engram_vision.backbone import DiffusersBackbone

if TYPE_CHECKING:
    from engram_vision.training.medium import Medium

__all__ = ["WAN22", "Wan22"]


class Wan22(DiffusersBackbone):
    """Wan 2.x in diffusers' `WanPipeline`."""

    family = FAMILY
    title = FAMILY.title
    train_settings = Wan22TrainSettings
    generate_settings = Wan22GenerateSettings
    clips_settings = Wan22ClipsSettings
    evaluate_settings = Wan22EvaluateSettings
    tiny_train: Mapping[str, Any] = {
        "width": 64,
        "height": 64,
        "frames": 9,
        "steps": 300,
        "batch_size": 5,
        # Its text states are narrow and its training short: what is learned without bounds comes further (measured).
        "sites": "blocks",
        "rule": "absolute",
        "overlap": "sum",
        "vector_rate": 0.3,
        "scale_rate": 1e-3,
        "weight_decay": 0.0,
        "warm_up": 10,
        "schedule": "linear",
        "precision": "fp32",
        "gradient_checkpointing": False,
    }
    tiny_generate: Mapping[str, Any] = {
        "width": 64,
        "height": 64,
        "frames": 9,
        "fps": 4,
        "steps": 20,
        "guidance": 3.0,
        "batch_size": 4,
        "precision": "fp32",
    }

    def medium(self) -> Medium:
        """Return `CLIPS`."""
        from engram_video.training.clips import CLIPS  # imports torch

        return CLIPS

    def generate(
        self, settings: Wan22GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> GenerateReport:
        """Draw clips; see `engram_video.generation.generate`."""
        from engram_video.generation import generate  # imports torch

        return generate(settings, overwrite=overwrite, watcher=watcher)

    def default_train_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`, and the size of a published model's clips."""
        size = {name: value for name, value in FORMATS.get(model, {}).items() if name in ("width", "height")}
        return {**size, **super().default_train_settings(model)}

    def default_generate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`, and size, length and rate of a published model's clips."""
        return {**FORMATS.get(model, {}), **super().default_generate_settings(model)}

    def default_evaluate_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`, and size, length and rate of a published model's clips."""
        return {**FORMATS.get(model, {}), **super().default_evaluate_settings(model)}

    def default_clips_settings(self, model: str) -> Mapping[str, Any]:
        """Return what suits `tiny`, and size, length and rate of a published model's clips."""
        defaults = self.default_generate_settings(model)
        return {name: value for name, value in defaults.items() if name != "batch_size"}

    def build_clips(
        self, settings: Wan22ClipsSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> ClipsReport:
        """Make clips of pictures; see `engram_video.clipsets.build_clips`."""
        from engram_video.clipsets import build_clips  # imports torch

        return build_clips(settings, overwrite=overwrite, watcher=watcher)

    def evaluate(
        self, settings: Wan22EvaluateSettings, *, overwrite: bool = False, watcher: Watcher | None = None
    ) -> EvaluateReport:
        """Measure clips, base against engram; see `engram_video.evaluation.clips.evaluate`."""
        from engram_video.evaluation.clips import evaluate  # imports torch

        return evaluate(settings, overwrite=overwrite, watcher=watcher)

    def demo(
        self, output: Path, *, seed: int = 0, overwrite: bool = False, watcher: Watcher | None = None
    ) -> DemoReport:
        """Make clips of two characters' pictures, train, merge and draw; see `engram_video.demo.run.run_demo`."""
        from engram_video.demo.run import run_demo  # imports torch

        return run_demo(self, output, seed=seed, overwrite=overwrite, watcher=watcher)


WAN22 = Wan22()
