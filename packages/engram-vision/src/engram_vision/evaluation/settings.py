"""What users can set for measuring what diffusers draws; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from engram_vision.families import SD15, SD35, SDXL
from engram_vision.settings import (
    Device,
    GenerateSettings,
    Precision,
    SD15GenerateSettings,
    SD35GenerateSettings,
    SDXLGenerateSettings,
    too_low,
)

__all__ = ["EvaluateSettings", "SD15EvaluateSettings", "SD35EvaluateSettings", "SDXLEvaluateSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateSettings:
    """What to measure, on what and with what; each family has a class of its own, with its usual values.

    Attributes:
        drawing: the settings class for drawing with the family (not a setting).
        adapters: adapter files or hub repositories; `FILE@0.8` sets the strength of everything in it.
        strengths: `NAME=0.5` sets one concept's strength, `0.5` every concept's; on top of the adapters' own.
        lora: LoRA of diffusers or of its trainers to draw with and measure as well: safetensors file, folder with one,
            or hub id.
        base: also draw and measure without adapters.
        prompts: what to draw; with adapters, each holds a trigger.
        control_prompts: what to draw without a trigger, to see that adapters leave it as it is, byte for byte.
        seeds: each prompt is drawn once with each.
        files: pictures or clips on disk, or folders of them, to measure as they are instead of drawing.
        references: folder of pictures of the subject.
        image_model: model of transformers whose features of frames are compared, hub id or folder, e.g. of CLIP,
            SigLIP, DINOv2 or ViT; `tiny` is the judge that ships for what `tiny` draws.
        text_model: model of transformers that compares frames with prompts, e.g. of CLIP or SigLIP; or `tiny`.
        described_as: words that the text model reads in place of the triggers, which it cannot know.
        output: folder for the figures, what was drawn, an overview and a plot; None keeps none.
        negative: negative prompt for all.
        model: hub id or folder of the base model, or `tiny`.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        width, height: pixels; None means the model's own.
        batch_size: drawn at once.
        precision: number type of the base model; the others compute in float32.
        device: where to draw and measure.
        low_memory: keep only the part that is at work on the device; slower.
        force_base: use adapters that were trained on another model of the family.
    """

    drawing: ClassVar[type[GenerateSettings]]

    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    lora: str | None = None
    base: bool = True
    prompts: tuple[str, ...] = ()
    control_prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    files: tuple[Path, ...] = ()
    references: Path | None = None
    image_model: str | None = None
    text_model: str | None = None
    described_as: str | None = None
    output: Path | None = None
    negative: str = ""
    model: str
    steps: int = 30
    guidance: float = 7.5
    width: int | None = None
    height: int | None = None
    batch_size: int = 4
    precision: Precision = "fp32"
    device: Device = "auto"
    low_memory: bool = False
    force_base: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from too_low(self, {"steps": 1, "width": 8, "height": 8, "batch_size": 1})
        if not 0 <= self.guidance < float("inf"):
            yield f"guidance is {self.guidance}, expected a finite number of at least 0"
        if not self.seeds or min(self.seeds) < 0:
            yield f"seeds are {list(self.seeds)}, expected at least one, none below 0"
        yield from self._wrong_subjects()
        if self.references is not None and self.image_model is None:
            yield "references need a model to compare with; give --image-model, e.g. facebook/dinov2-base"
        if self.described_as is not None and (self.text_model is None or not self.adapters):
            yield "described_as stands for triggers when a text model reads them; give --text-model and --adapter"
        if not (self.image_model or self.text_model or self.control_prompts or self.measures_more()):
            yield "there is nothing to measure; give --image-model, --text-model or --control-prompt"

    def measures_more(self) -> bool:
        """Tell whether something is measured that needs no model."""
        return False

    def _wrong_subjects(self) -> Iterator[str]:
        """Yield what is wrong with what is to be measured."""
        draws = bool(self.adapters) or self.lora is not None
        if self.files and (self.prompts or self.control_prompts or draws):
            yield "files are measured as they are; leave out prompts, control prompts, adapters and LoRA, or the files"
        if not self.files and not self.prompts and not self.control_prompts:
            yield "there is nothing to measure on; give --prompt, --control-prompt or --files"
        if self.control_prompts and not (draws and self.base):
            yield "control_prompts compare base and engram; give --adapter or --lora, and not --no-base"
        if not self.base and not draws and not self.files:
            yield "there is nothing to draw without the base model; give --adapter or --lora"
        both = [prompt for prompt in self.prompts if prompt in self.control_prompts]
        if both:
            yield f"{both[0]!r} is a prompt and a control prompt; make it one of them"


@dataclass(frozen=True, slots=True, kw_only=True)
class SD15EvaluateSettings(EvaluateSettings):
    """What to measure of Stable Diffusion 1.x."""

    drawing: ClassVar[type[GenerateSettings]] = SD15GenerateSettings

    model: str = SD15.default_model


@dataclass(frozen=True, slots=True, kw_only=True)
class SDXLEvaluateSettings(EvaluateSettings):
    """What to measure of Stable Diffusion XL."""

    drawing: ClassVar[type[GenerateSettings]] = SDXLGenerateSettings

    model: str = SDXL.default_model
    guidance: float = 5.0
    batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SD35EvaluateSettings(EvaluateSettings):
    """What to measure of Stable Diffusion 3.5.

    Attributes:
        without_t5: leave the T5 encoder out, which saves 9.5 GB of memory; prompts are followed less closely.
    """

    drawing: ClassVar[type[GenerateSettings]] = SD35GenerateSettings

    model: str = SD35.default_model
    guidance: float = 4.5
    batch_size: int = 1
    precision: Precision = "bf16"
    without_t5: bool = False
