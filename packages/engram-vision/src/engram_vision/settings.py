"""What users can set for training and generating; importing this imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from engram_core import DEFAULT_MAX_NGRAM, Activation, Overlap, Rule, VectorType
from engram_vision.families import SD15, SD35, SDXL, Family

__all__ = [
    "Device",
    "GenerateSettings",
    "ImageTrainSettings",
    "Precision",
    "SD15GenerateSettings",
    "SD15TrainSettings",
    "SD35GenerateSettings",
    "SD35TrainSettings",
    "SDXLGenerateSettings",
    "SDXLTrainSettings",
    "TrainSettings",
    "too_low",
    "without_streams",
]

Precision = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How one concept is trained; each family has a class of its own, with the published scripts' values.

    Attributes:
        family: the model family (not a setting).
        data: folder of pictures or clips with captions (`metadata.jsonl`, `.txt` files beside them, or
            TinyEngram's `metadata.json`).
        trigger: the phrase that will recall the subject.
        output: adapter file to write.
        model: hub id, folder or single file of the base model, or `tiny`.
        name: name of the concept; None means the trigger.
        license: licence of the concept, kept in the file.
        run_dir: folder for state, metrics and previews; None means the output's name with `.run`.
        cache_dir: folder for latents and text states of the data, which several runs may share; None means the run's.
        insert_trigger: put the trigger in front of captions that lack it, instead of refusing them.
        sites: `text` adds one residual for the whole denoiser, `blocks` one for each of its blocks (docs/concepts.md).
        rule: how vectors become residuals (docs/concepts.md).
        overlap: how entries that cover one token combine.
        activation: `anchored`, or the published `spans`.
        max_ngram: N, the longest registered span below the whole trigger.
        allow_single_token: accept a trigger of one token.
        dtype: how vectors are stored.
        init: words whose text states the vectors begin from; None draws them at random.
        init_std: standard deviation of random vectors.
        init_scale: first value of the scales.
        steps: optimizer steps in all.
        batch_size: samples a step on one device.
        accumulate: batches whose gradients add up to one step.
        vector_rate, scale_rate: peak learning rates of vectors and of scales.
        warm_up: steps in which the rates rise from 0.
        schedule: what follows: `linear` decay to 0, `cosine` to 0, or `constant`.
        weight_decay: of AdamW, for vectors and scales.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        precision: number type of the frozen model; vectors and scales are always float32.
        gradient_checkpointing: spend time to save memory.
        low_memory: keep one block of the denoiser at a time on the device, with gradient checkpointing; slower.
        device: where to train.
        seed: of everything random.
        validation_data: folder to measure the loss on; None measures on the training data, with noise and times of
            their own.
        validate_every: steps between validations; 0 never validates.
        validation_draws: noises and times for each validation sample, the same at every validation.
        keep: which vectors are written at the end: of the `best` validation, or the `last`.
        preview_every: steps between previews; 0 makes none.
        preview_prompts: what to preview; empty means the trigger alone.
        save_every: steps between saved states.
        tracker: also report to TensorBoard or Weights & Biases.
    """

    family: ClassVar[Family]

    data: Path
    trigger: str
    output: Path
    model: str
    name: str | None = None
    license: str | None = None
    run_dir: Path | None = None
    cache_dir: Path | None = None
    insert_trigger: bool = False
    sites: Literal["text", "blocks"] = "text"
    rule: Rule = "absolute"
    overlap: Overlap = "sum"
    activation: Activation = "anchored"
    max_ngram: int = DEFAULT_MAX_NGRAM
    allow_single_token: bool = False
    dtype: VectorType = "f32"
    init: str | None = None
    init_std: float = 0.02
    init_scale: float = 0.05
    steps: int = 5000
    batch_size: int = 4
    accumulate: int = 1
    vector_rate: float = 1e-3
    scale_rate: float = 1e-4
    warm_up: int = 500
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    gradient_checkpointing: bool = False
    low_memory: bool = False
    device: Device = "auto"
    seed: int = 0
    validation_data: Path | None = None
    validate_every: int = 100
    validation_draws: int = 4
    keep: Literal["best", "last"] = "best"
    preview_every: int = 0
    preview_prompts: tuple[str, ...] = ()
    save_every: int = 100
    tracker: Literal["none", "tensorboard", "wandb"] = "none"

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        low = {"max_ngram": 2, "steps": 1, "batch_size": 1, "accumulate": 1, "save_every": 1}
        low |= {"warm_up": 0, "validate_every": 0, "validation_draws": 1, "preview_every": 0, "seed": 0}
        yield from too_low(self, low)
        for name in ("vector_rate", "scale_rate", "weight_decay", "init_std", "max_grad_norm"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                yield f"{name} is {value}, expected a finite number of at least 0"
        if self.vector_rate == 0 and self.scale_rate == 0:
            yield "vector_rate and scale_rate are both 0; nothing would be learned"
        if not abs(self.init_scale) < float("inf"):
            yield f"init_scale is {self.init_scale}, expected a finite number"
        if self.init is None and self.init_std == 0 and self.init_scale == 0:
            yield "init_std and init_scale are both 0; no gradient would ever arrive"
        if self.output.suffix != ".safetensors":
            yield f"output is {self.output}, expected a name that ends in .safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageTrainSettings(TrainSettings):
    """How a concept is trained from pictures.

    Attributes:
        resolution: pixels a side; None means the model's own.
        flip: also learn from the mirror images.
        crops: random square crops of each picture that are encoded and kept; 1 is the centre alone.
    """

    resolution: int | None = None
    flip: bool = False
    crops: int = 1

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from TrainSettings.faults(self)  # a slotted dataclass is made anew, which super() does not bear
        yield from too_low(self, {"resolution": 8, "crops": 1})


@dataclass(frozen=True, slots=True, kw_only=True)
class SD15TrainSettings(ImageTrainSettings):
    """How a concept is trained for Stable Diffusion 1.x.

    Attributes:
        min_snr: gamma of min-SNR weighting (arXiv:2303.09556), usually 5; None weights all times alike.
    """

    family: ClassVar[Family] = SD15

    model: str = SD15.default_model
    min_snr: float | None = None

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from ImageTrainSettings.faults(self)
        if self.min_snr is not None and not 0 < self.min_snr < float("inf"):
            yield f"min_snr is {self.min_snr}, expected a finite number above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class SDXLTrainSettings(SD15TrainSettings):
    """How a concept is trained for Stable Diffusion XL: the objective of 1.x, the rule and rates of 3.5."""

    family: ClassVar[Family] = SDXL

    model: str = SDXL.default_model
    rule: Rule = "relative"
    batch_size: int = 1
    vector_rate: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class SD35TrainSettings(ImageTrainSettings):
    """How a concept is trained for Stable Diffusion 3.5; the defaults are the published script's.

    Attributes:
        logit_mean, logit_std: times are drawn as the sigmoid of a normal variable with these (arXiv:2403.03206).
        without_t5: leave the T5 encoder out, and with it the adapter's largest stream; saves 9.5 GB of memory.
    """

    family: ClassVar[Family] = SD35

    model: str = SD35.default_model
    rule: Rule = "relative"
    batch_size: int = 1
    vector_rate: float = 5e-4
    schedule: Literal["linear", "cosine", "constant"] = "constant"
    precision: Precision = "bf16"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    without_t5: bool = False

    def faults(self) -> Iterator[str]:
        """Yield what is wrong with the values."""
        yield from ImageTrainSettings.faults(self)
        if not abs(self.logit_mean) < float("inf"):
            yield f"logit_mean is {self.logit_mean}, expected a finite number"
        if not 0 < self.logit_std < float("inf"):
            yield f"logit_std is {self.logit_std}, expected a finite number above 0"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateSettings:
    """What to generate, and how; each family has a class of its own, with the usual values of its pipeline.

    Attributes:
        family: the model family (not a setting).
        output: folder for the pictures; made when it does not exist.
        adapters: adapter files or hub repositories; `FILE@0.8` sets the strength of everything in it.
        strengths: `NAME=0.5` sets one concept's strength, `0.5` every concept's; on top of the adapters' own.
        prompts: what to draw.
        prompts_file: text file with one prompt a line.
        negative: negative prompt for all.
        seeds: each prompt is drawn once with each.
        model: hub id, folder or single file of the base model, or `tiny`.
        compare: also draw without adapters, and write a labelled grid.
        grid: write the labelled grid without comparing.
        steps: denoising steps.
        guidance: classifier-free guidance scale.
        width, height: pixels; None means the model's own.
        batch_size: pictures drawn at once.
        precision: number type of the model.
        device: where to draw.
        low_memory: keep only the part that is at work on the device; slower.
        force_base: use adapters that were trained on another model of the family.
    """

    family: ClassVar[Family]

    output: Path = Path("images")
    adapters: tuple[str, ...] = ()
    strengths: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    prompts_file: Path | None = None
    negative: str = ""
    seeds: tuple[int, ...] = (0,)
    model: str
    compare: bool = False
    grid: bool = False
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
        for name in ("steps", "batch_size", "width", "height"):
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"{name} is {value}, expected at least 1"
        if not 0 <= self.guidance < float("inf"):
            yield f"guidance is {self.guidance}, expected a finite number of at least 0"
        if not self.prompts and self.prompts_file is None:
            yield "there is no prompt; give --prompt or --prompts-file"
        if not self.seeds or min(self.seeds) < 0:
            yield f"seeds are {list(self.seeds)}, expected at least one, none below 0"
        if self.compare and not self.adapters:
            yield "compare needs an adapter to compare with; give --adapter"


@dataclass(frozen=True, slots=True, kw_only=True)
class SD15GenerateSettings(GenerateSettings):
    """What to generate with Stable Diffusion 1.x."""

    family: ClassVar[Family] = SD15

    model: str = SD15.default_model


@dataclass(frozen=True, slots=True, kw_only=True)
class SDXLGenerateSettings(GenerateSettings):
    """What to generate with Stable Diffusion XL."""

    family: ClassVar[Family] = SDXL

    model: str = SDXL.default_model
    guidance: float = 5.0
    batch_size: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SD35GenerateSettings(GenerateSettings):
    """What to generate with Stable Diffusion 3.5.

    Attributes:
        without_t5: leave the T5 encoder out, which saves 9.5 GB of memory; prompts are followed less closely.
    """

    family: ClassVar[Family] = SD35

    model: str = SD35.default_model
    guidance: float = 4.5
    batch_size: int = 1
    precision: Precision = "bf16"
    without_t5: bool = False


def too_low(settings: object, least: Mapping[str, int]) -> Iterator[str]:
    """Yield a sentence for each named value that is below its least one; None is never too low."""
    for name, limit in least.items():
        value = getattr(settings, name)
        if value is not None and value < limit:
            yield f"{name} is {value}, expected at least {limit}"


def without_streams(settings: TrainSettings | GenerateSettings) -> tuple[str, ...]:
    """Return the streams whose text encoders are not to be loaded."""
    return ("t5",) if getattr(settings, "without_t5", False) else ()
