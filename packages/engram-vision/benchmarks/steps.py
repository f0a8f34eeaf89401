"""Training steps, each way in a process of its own: the program that `training.py` starts.

`python steps.py JSON` does some steps in one way and prints how long each took and how much memory there was.

Shapes: B samples, V pictures, L positions, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import TRIGGER
from timed import Sample, Step, Stopwatch, count_values, main, measure_model, time_steps
from torch import Tensor

from engram_core import Watcher
from engram_core.torch import add_delta
from engram_vision.backbone import ImageBackbone
from engram_vision.conditions import Conditioner
from engram_vision.dataset import CaptionedImage
from engram_vision.families import Family, family_of
from engram_vision.images import fit_square, load_picture
from engram_vision.loading import pipeline_tokenizers
from engram_vision.models import load_pipeline
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35
from engram_vision.settings import TrainSettings
from engram_vision.training.frozen import TextReader
from engram_vision.training.objectives import make_objective
from engram_vision.training.pictures import PICTURES, encode_views
from engram_vision.training.preparation import load_model, prepare, read_data
from engram_vision.training.trainer import train

WORD = "<concept>"  # textual inversion's new word
RANK = 4
BACKBONES: Mapping[str, ImageBackbone] = {each.name: each for each in (SD15, SD35)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        way: a key of `WAYS`, `engram` or `model`.
        backbone: a key of `BACKBONES`.
        model: the base model's folder, or `tiny`.
        data: folder of pictures with captions.
        scratch: an empty folder.
        resolution, batch_size, precision, device: as in `TrainSettings`.
        warm_up: steps that are not timed.
        steps: steps that are.
    """

    way: str
    backbone: str
    model: str
    data: str
    scratch: str
    resolution: int
    batch_size: int
    precision: str
    device: str
    warm_up: int
    steps: int

    @property
    def family(self) -> Family:
        """Of the backbone."""
        return BACKBONES[self.backbone].family

    @property
    def settings(self) -> TrainSettings:
        """The task as the project's own trainer takes it: with its defaults, and without validation and saving."""
        n_steps = self.warm_up + self.steps
        return BACKBONES[self.backbone].train_settings(
            data=Path(self.data),
            trigger=TRIGGER,
            output=Path(self.scratch) / "concept.safetensors",
            model=self.model,
            resolution=self.resolution,
            batch_size=self.batch_size,
            precision=self.precision,  # type: ignore[arg-type]
            device=self.device,  # type: ignore[arg-type]
            steps=n_steps,
            validate_every=0,
            save_every=n_steps,
        )

    def load(self) -> Any:
        """Return the model on its device."""
        return load_pipeline(
            self.family,
            self.model,
            precision=self.precision,  # type: ignore[arg-type]
            device=torch.device(self.device),
        )


class Samples:
    """Pictures and captions in memory, out of which batches are drawn."""

    def __init__(self, task: Task, items: Sequence[CaptionedImage]) -> None:
        self.views = [fit_square(load_picture(item.path), task.resolution, (0.5, 0.5)) for item in items]
        self.captions = [item.caption for item in items]
        self.pixels = torch.from_numpy(np.stack([np.asarray(view) for view in self.views])).permute(0, 3, 1, 2)
        self.pixels = self.pixels.float().div(127.5).sub(1)
        self._size = task.batch_size

    def draw(self) -> Tensor:
        """Return which pictures are next, int64 [B]."""
        return torch.randint(len(self.views), (self._size,))


class Frozen:
    """The base model, and what the ways have in common: the project's own loss at random times."""

    def __init__(self, task: Task, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.device = torch.device(task.device)
        self.mixed = task.precision != "fp32"
        family = family_of(pipeline)
        self.denoiser = getattr(pipeline, family.denoiser)
        for name in family.modules():
            getattr(pipeline, name).to(self.device).requires_grad_(False)
        self._objective = make_objective(task.settings, pipeline)
        self._conditioner = Conditioner(family, pipeline, task.resolution)
        self._random = torch.Generator().manual_seed(0)

    def autocast(self) -> AbstractContextManager[object]:
        """Return what lets learned float32 numbers meet a half-precision model, as the scripts' Accelerator does."""
        return torch.autocast(self.device.type, self.denoiser.dtype, enabled=self.mixed)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return scaled latents of pictures, drawn from their distributions."""
        vae = self.pipeline.vae
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.sample().float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def loss(self, latents: Tensor, states: Mapping[str, Tensor], pooled: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss of a batch at random times."""
        times = self._objective.spread_times(len(latents), self._random).to(self.device)
        conditions = self._conditioner(states, pooled or {})
        return self._objective.losses(latents, torch.randn_like(latents), times, conditions).mean()


def read_texts(readers: Mapping[str, TextReader], texts: Sequence[str], device: torch.device) -> tuple[Any, Any]:
    """Return states with ids, and pooled states, by stream."""
    found = {stream: reader.read(texts) for stream, reader in readers.items()}
    pooled = {stream: each.pooled.to(device) for stream, each in found.items() if each.pooled is not None}
    return {stream: (each.states.to(device), each.ids, each.lengths) for stream, each in found.items()}, pooled


def build_uncached_engram(task: Task, sample: Sample) -> Step:
    """Return the step of an engram as TinyEngram's scripts do it: VAE and text encoders run each time."""
    settings = task.settings
    device, samples = torch.device(task.device), read_data(settings, PICTURES, Watcher())
    model = load_model(settings, PICTURES, device, Watcher())
    prepared = prepare(settings, PICTURES, samples, model, device, Path(task.scratch), Watcher())
    frozen, data = Frozen(task, model.pipeline), Samples(task, samples.learned)
    concept, streams = prepared.concept, prepared.streams.values()
    readers = {
        stream: TextReader(task.family, frozen.pipeline, stream, tokenizer, frozen.device)
        for stream, tokenizer in pipeline_tokenizers(frozen.pipeline).items()
    }
    learned = [stream.vectors for stream in streams], [stream.scales for stream in streams]
    groups = [
        {"params": learned[0], "lr": settings.vector_rate},
        {"params": learned[1], "lr": settings.scale_rate},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    sample.learned = sample.optimised = sum(each.numel() for group in learned for each in group)

    def step() -> None:
        chosen = data.draw()
        latents = frozen.encode(data.pixels[chosen])
        states, pooled = read_texts(readers, [data.captions[at] for at in chosen.tolist()], frozen.device)
        deltas = concept(states)
        edited = {stream: add_delta(parts[0], deltas[stream]) for stream, parts in states.items()}
        frozen.loss(latents, edited, pooled).backward()
        for parameter in (*learned[0], *learned[1]):
            torch.nn.utils.clip_grad_norm_(parameter, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_inversion(task: Task, sample: Sample, *, cached: bool) -> Step:
    """Return the step of diffusers' `textual_inversion.py`: one new word; `cached` keeps the latents."""
    frozen, data, latents_of = load(task, cached=cached)
    pipeline = frozen.pipeline
    tokenizer, encoder = pipeline.tokenizer, pipeline.text_encoder
    tokenizer.add_tokens(WORD)
    encoder.float()  # the word's embedding learns in float32, and the script keeps the whole encoder so
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    encoder.requires_grad_(False)
    table = encoder.get_input_embeddings().weight
    table.requires_grad_(True)
    encoder.train()
    before = table.detach().clone()
    others = torch.arange(len(table), device=table.device) != tokenizer.convert_tokens_to_ids(WORD)
    ids = tokenize(pipeline, [caption.replace(TRIGGER, WORD) for caption in data.captions])
    optimizer = torch.optim.AdamW([table], lr=5e-4)
    sample.learned, sample.optimised = table.shape[1], table.numel()

    def step() -> None:
        chosen = data.draw()
        latents = latents_of(chosen)
        with frozen.autocast():
            states = encoder(ids[chosen].to(frozen.device))[0]
        frozen.loss(latents, {"clip_l": states}).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[others] = before[others]

    return step


def build_lora(task: Task, sample: Sample, *, cached: bool) -> Step:
    """Return the step of diffusers' `train_text_to_image_lora.py`; `cached` keeps latents and text states."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    frozen, data, latents_of = load(task, cached=cached)
    pipeline, unet = frozen.pipeline, frozen.pipeline.unet
    targets = ["to_k", "to_q", "to_v", "to_out.0"]
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(unet, dtype=torch.float32)
    unet.train()
    learned = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=1e-4)
    sample.learned = sample.optimised = sum(parameter.numel() for parameter in learned)
    ids = tokenize(pipeline, data.captions)
    reader = TextReader(task.family, pipeline, "clip_l", pipeline_tokenizers(pipeline)["clip_l"], frozen.device)
    states_of = reader.read(data.captions).states if cached else None
    if cached:
        pipeline.text_encoder = reader = None

    def step() -> None:
        chosen = data.draw()
        latents = latents_of(chosen)
        if states_of is None:
            states = pipeline.text_encoder(ids[chosen].to(frozen.device))[0]
        else:
            states = states_of[chosen].to(frozen.device)
        with frozen.autocast():
            loss = frozen.loss(latents, {"clip_l": states})
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def load(task: Task, *, cached: bool) -> tuple[Frozen, Samples, Callable[[Tensor], Tensor]]:
    """Return the model, the data, and what gives latents: the VAE, or where they are cached their distributions."""
    items = read_data(task.settings, PICTURES, Watcher()).learned
    pipeline = task.load()
    frozen, data = Frozen(task, pipeline), Samples(task, items)
    if not cached:
        return frozen, data, lambda chosen: frozen.encode(data.pixels[chosen])
    mean, std = encode_views(pipeline.vae, data.views, frozen.device)
    pipeline.vae = None

    def draw_latents(chosen: Tensor) -> Tensor:
        return (mean[chosen] + std[chosen] * torch.randn(len(chosen), *mean.shape[1:])).to(frozen.device)

    return frozen, data, draw_latents


def tokenize(pipeline: Any, captions: Sequence[str]) -> Tensor:
    """Return the captions' token ids, int64 [V, L]."""
    tokenizer = pipeline.tokenizer
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    return tokenizer(list(captions), return_tensors="pt", **options)["input_ids"]


WAYS: Mapping[str, Callable[[Task, Sample], Step]] = {
    "engram, nothing cached": build_uncached_engram,
    "textual inversion": lambda task, sample: build_inversion(task, sample, cached=False),
    "textual inversion, latents cached": lambda task, sample: build_inversion(task, sample, cached=True),
    "LoRA": lambda task, sample: build_lora(task, sample, cached=False),
    "LoRA, latents and texts cached": lambda task, sample: build_lora(task, sample, cached=True),
}


def measure(values: Mapping[str, Any]) -> Sample:
    """Do the steps of one way."""
    task = Task(**values)
    torch.manual_seed(0)
    if task.way == "model":
        return measure_model(task.load, list(task.family.modules()), task.device)
    if task.way == "engram":
        return measure_trainer(task)
    return time_steps(lambda sample: WAYS[task.way](task, sample), task.device, warm_up=task.warm_up, steps=task.steps)


def measure_trainer(task: Task) -> Sample:
    """Do the steps of the project's own trainer."""
    watch = Stopwatch(task.device)
    report = train(task.settings, watcher=watch)
    sample = watch.sample(slice(task.warm_up, None))
    sample.learned = sample.optimised = count_values(report.output)
    return sample


if __name__ == "__main__":
    main(measure)
