"""What users can set for training, generating and evaluating clips; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from engram_core import Overlap, Rule
from engram_video.families import WAN22
from engram_vision.evaluation.settings import EvaluateSettings
from engram_vision.families import Family
from engram_vision.settings import Device, GenerateSettings, Precision, TrainSettings, too_low

__all__ = ["FORMATS", "Wan22ClipsSettings", "Wan22EvaluateSettings", "Wan22GenerateSettings", "Wan22TrainSettings"]


_SMALL, _LARGE = {"width": 832, "height": 480}, {"width": 1280, "height": 720}
_LENGTH = {"frames": 81, "fps": 16}

FORMATS: Mapping[str, Mapping[str, int]] = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": {**_SMALL, **_LENGTH},
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": {**_LARGE, **_LENGTH},
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": {**_SMALL, **_LENGTH},
    "Wan-AI/Wan2.1-I2V-14B-720P-Diffusers": {**_LARGE, **_LENGTH},
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": {**_LARGE, **_LENGTH},
    "Wan-AI/Wan2.2-I2V-A14B-Diffusers": {**_LARGE, **_LENGTH},
}
"""Size, length and rate of clips that published models make, where they differ from the defaults (model cards)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan22TrainSettings(TrainSettings):
    """How a concept is trained for Wan 2.2; the defaults are the published run's (report, section 3.3).

    Attributes:
        width, height: pixels that clips are resized and cut to.
        frames: taken from each clip, evenly over its length; one more than a multiple of what the autoencoder puts
            into one latent frame, which is four.
    """

    family: ClassVar[Family] = WAN22

    model: str = WAN22.default_model
    rule: Rule = "relative"
    overlap: Overlap = "mean"
    steps: int = 28000
    batch_size: int = 1
    vector_rate: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    precision: Precision = "bf16"
    gradient_checkpointing: bool = True
    width: int = 1280
    height: int = 704
    frames: int = 9

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from TrainSettings.faults(self)  # a slotted dataclass is made anew, which super() does not bear
        yield from too_low(self, {"width": 8, "height": 8, "frames": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan22GenerateSettings(GenerateSettings):
    """What to generate with Wan 2.2.

    Attributes:
        frames: of each clip.
        fps: frames a second of the file; the model draws the same frames whatever it is.
    """

    family: ClassVar[Family] = WAN22

    output: Path = Path("clips")
    model: str = WAN22.default_model
    steps: int = 50
    guidance: float = 5.0
    width: int | None = 1280
    height: int | None = 704
    frames: int = 121
    fps: int = 24
    batch_size: int = 1
    precision: Precision = "bf16"

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from GenerateSettings.faults(self)
        yield from too_low(self, {"frames": 1, "fps": 1})
        yield from _without_size(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan22ClipsSettings:
    """How pictures become clips; the defaults are the published builder's (report, section 3.2).

    Attributes:
        data: folder of pictures with captions, as for training.
        trigger: the phrase that every caption must hold.
        output: folder for the clips; made when it does not exist.
        model: hub id or folder of an image-to-video model, or `tiny`.
        frames: of each clip.
        fps: frames a second.
        width, height: pixels; pictures are resized and cut to them.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        negative: negative prompt for all.
        described_as: words that the model reads in place of the trigger, which it cannot know.
        seed: of the first noise, the same for all.
        precision: number type of the model.
        device: where to draw.
        low_memory: keep only the part that is at work on the device; slower.
    """

    data: Path
    trigger: str
    output: Path
    model: str = WAN22.default_model
    frames: int = 81
    fps: int = 24
    width: int = 1280
    height: int = 704
    steps: int = 50
    guidance: float = 5.0
    negative: str = ""
    described_as: str | None = None
    seed: int = 0
    precision: Precision = "bf16"
    device: Device = "auto"
    low_memory: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from too_low(self, {"frames": 1, "fps": 1, "width": 8, "height": 8, "steps": 1, "seed": 0})
        if not 0 <= self.guidance < float("inf"):
            yield f"guidance is {self.guidance}, expected a finite number of at least 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wan22EvaluateSettings(EvaluateSettings):
    """What to measure of Wan 2.2.

    Attributes:
        frames: of each clip.
        fps: frames a second of the files.
        warping: measure the warping error, which needs OpenCV; None means where that is installed.
    """

    drawing: ClassVar[type[GenerateSettings]] = Wan22GenerateSettings

    model: str = WAN22.default_model
    steps: int = 50
    guidance: float = 5.0
    width: int | None = 1280
    height: int | None = 704
    frames: int = 121
    fps: int = 24
    batch_size: int = 1
    precision: Precision = "bf16"
    warping: bool | None = None

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from EvaluateSettings.faults(self)
        yield from too_low(self, {"frames": 1, "fps": 1})
        yield from _without_size(self)

    def measures_more(self) -> bool:
        """Tell whether the warping error is asked for."""
        return bool(self.warping)


def _without_size(settings: Wan22GenerateSettings | Wan22EvaluateSettings) -> Iterator[str]:
    for name in ("width", "height"):
        if getattr(settings, name) is None:
            yield f"{name} is none, expected pixels: a video model has no size of its own"
