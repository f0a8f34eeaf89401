"""What users can set for training, generating and evaluating clips; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from engram_core import Overlap, Rule
from engram_video.families import WAN22
from engram_vision.families import Family
from engram_vision.settings import Device, GenerateSettings, Precision, TrainSettings, too_low

__all__ = ["Wan22ClipsSettings", "Wan22EvaluateSettings", "Wan22GenerateSettings", "Wan22TrainSettings"]


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
class Wan22EvaluateSettings:
    """What to measure clips on, and with what.

    Attributes:
        adapters: adapter files or hub repositories; `FILE@0.8` sets the strength of everything in it.
        strengths: `NAME=0.5` sets one concept's strength, `0.5` every concept's; on top of the adapters' own.
        base: also draw and measure without adapters.
        prompts: what to draw; with adapters, each holds a trigger.
        control_prompts: what to draw without a trigger, to see that adapters leave it as it is, byte for byte.
        seeds: each prompt is drawn once with each.
        clips: clips or pictures on disk, or folders of them, to measure as they are instead of drawing.
        references: folder of pictures of the subject.
        image_model: model of transformers whose features of frames are compared, hub id or folder, e.g. of CLIP,
            SigLIP, DINOv2 or ViT; `tiny` is the judge that ships for clips of `tiny`.
        text_model: model of transformers that compares frames with prompts, e.g. of CLIP or SigLIP; or `tiny`.
        described_as: words that the text model reads in place of the triggers, which it cannot know.
        warping: measure the warping error, which needs OpenCV; None means where that is installed.
        output: folder for the figures, the clips, a contact sheet and a plot; None keeps none.
        negative: negative prompt for all.
        model: hub id or folder of the base model, or `tiny`.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        width, height: pixels.
        frames: of each clip.
        fps: frames a second of the files.
        batch_size: clips drawn at once.
        precision: number type of the base model; the others compute in float32.
        device: where to draw and measure.
        low_memory: keep only the part that is at work on the device; slower.
        force_base: use adapters that were trained on another model of the family.
    """

    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    base: bool = True
    prompts: tuple[str, ...] = ()
    control_prompts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    clips: tuple[Path, ...] = ()
    references: Path | None = None
    image_model: str | None = None
    text_model: str | None = None
    described_as: str | None = None
    warping: bool | None = None
    output: Path | None = None
    negative: str = ""
    model: str = WAN22.default_model
    steps: int = 50
    guidance: float = 5.0
    width: int = 1280
    height: int = 704
    frames: int = 121
    fps: int = 24
    batch_size: int = 1
    precision: Precision = "bf16"
    device: Device = "auto"
    low_memory: bool = False
    force_base: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from too_low(self, {"steps": 1, "width": 8, "height": 8, "frames": 1, "fps": 1, "batch_size": 1})
        if not 0 <= self.guidance < float("inf"):
            yield f"guidance is {self.guidance}, expected a finite number of at least 0"
        if not self.seeds or min(self.seeds) < 0:
            yield f"seeds are {list(self.seeds)}, expected at least one, none below 0"
        yield from self._wrong_subjects()
        if self.references is not None and self.image_model is None:
            yield "references need a model to compare with; give --image-model, e.g. facebook/dinov2-base"
        if self.described_as is not None and (self.text_model is None or not self.adapters):
            yield "described_as stands for triggers when a text model reads them; give --text-model and --adapter"
        if not (self.image_model or self.text_model or self.control_prompts or self.warping):
            yield "there is nothing to measure; give --image-model, --text-model, --warping or --control-prompt"

    def _wrong_subjects(self) -> Iterator[str]:
        """Yield what is wrong with what is to be measured."""
        if self.clips and (self.prompts or self.control_prompts or self.adapters):
            yield "clips are measured as they are; leave out prompts, control prompts and adapters, or the clips"
        if not self.clips and not self.prompts and not self.control_prompts:
            yield "there is nothing to measure on; give --prompt, --control-prompt or --clips"
        if self.control_prompts and not (self.adapters and self.base):
            yield "control_prompts compare base and engram; give --adapter, and not --no-base"
        if not self.base and not self.adapters and not self.clips:
            yield "there is nothing to draw without the base model; give --adapter"
        both = [prompt for prompt in self.prompts if prompt in self.control_prompts]
        if both:
            yield f"{both[0]!r} is a prompt and a control prompt; make it one of them"
