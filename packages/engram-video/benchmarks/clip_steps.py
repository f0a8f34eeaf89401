"""Training steps on clips, each way in a process of its own: the program that `clip_training.py` starts.

`python clip_steps.py JSON` does some steps in one way and prints how long each took and how much memory there was.

Shapes: B clips, L positions, d width; frames uint8 [F, H, W, 3].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from methods import add_lora
from timed import Sample, Step, Stopwatch, main, measure_model, time_steps
from torch import Tensor
from wan_models import TRIGGER

from engram_core import Watcher
from engram_core.torch import add_delta
from engram_video.clips import read_clip
from engram_video.families import WAN22 as FAMILY
from engram_video.frames import sample_indices
from engram_video.settings import Wan22TrainSettings
from engram_video.training.clips import CLIPS, encode_clips, train
from engram_vision.loading import pipeline_tokenizers
from engram_vision.models import load_pipeline
from engram_vision.training.frozen import FrozenTexts, TextReader
from engram_vision.training.placement import Placement
from engram_vision.training.preparation import Prepared, load_model, prepare, read_data
from engram_vision.training.state import load_state
from engram_vision.training.trainer import STATE

Draw = Callable[[], tuple[Tensor, FrozenTexts]]
"""Draws a batch: latents on the device, and the captions as the text encoder reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to measure.

    Attributes:
        way: a key of `clip_training.WAYS`, for messages.
        kind: `engram`, `LoRA` or `model`.
        cached: whether latents and text states are kept, and the frozen models gone.
        model: the base model's folder, or `tiny`.
        data: folder of clips with captions.
        scratch: an empty folder.
        width, height, frames, batch_size, precision, device: as in `Wan22TrainSettings`.
        gradient_checkpointing, low_memory: likewise.
        warm_up: steps that are not timed.
        steps: steps that are.
    """

    way: str
    kind: str
    cached: bool = True
    model: str
    data: str
    scratch: str
    width: int
    height: int
    frames: int
    batch_size: int
    precision: str
    device: str
    gradient_checkpointing: bool = False
    low_memory: bool = False
    warm_up: int
    steps: int

    @property
    def settings(self) -> Wan22TrainSettings:
        """The task as the project's own trainer takes it: without validation, and saving after what is timed."""
        n_steps = self.warm_up + self.steps + 1
        return Wan22TrainSettings(
            data=Path(self.data),
            trigger=TRIGGER,
            output=Path(self.scratch) / "concept.safetensors",
            model=self.model,
            width=self.width,
            height=self.height,
            frames=self.frames,
            batch_size=self.batch_size,
            precision=self.precision,  # type: ignore[arg-type]
            device=self.device,  # type: ignore[arg-type]
            gradient_checkpointing=self.gradient_checkpointing,
            low_memory=self.low_memory,
            steps=n_steps,
            validate_every=0,
            save_every=n_steps,
        )

    def load(self) -> Any:
        """Return the model on its device."""
        return load_pipeline(
            FAMILY,
            self.model,
            precision=self.precision,  # type: ignore[arg-type]
            device=torch.device(self.device),
        )


def measure(values: Mapping[str, Any]) -> Sample:
    """Do the steps of one way."""
    task = Task(**values)
    torch.manual_seed(0)
    if task.kind == "model":
        return measure_model(task.load, list(FAMILY.modules()), task.device)
    if task.kind == "engram" and task.cached:
        return measure_trainer(task)
    return time_steps(lambda sample: build_step(task, sample), task.device, warm_up=task.warm_up, steps=task.steps)


def measure_trainer(task: Task) -> Sample:
    """Do the steps of the project's own trainer."""
    watch = Stopwatch(task.device)
    report = train(task.settings, watcher=watch)
    sample = watch.sample(slice(task.warm_up, -1))  # the last one also writes the adapter
    # Of the file, an adapter of so few steps would lack the entries that no caption showed yet.
    _, groups = load_state(report.run_dir / STATE)
    sample.learned = sum(value.numel() for value in groups["model"].values())
    return sample


def build_step(task: Task, sample: Sample) -> Step:
    """Return the step of an engram without caches, or of LoRA with the same caches or none."""
    settings, device = task.settings, torch.device(task.device)
    samples = read_data(settings, CLIPS, Watcher())
    model = load_model(settings, CLIPS, device, Watcher())
    prepared = prepare(settings, CLIPS, samples, model, device, Path(task.scratch), Watcher())
    if task.cached:
        Placement(model.pipeline, settings, device, Watcher())
        draw = draw_kept(prepared, settings.batch_size, device)
    else:
        model.pipeline.to(device)
        draw = draw_anew(model.pipeline, settings, samples.learned, device)
    transformer, objective = model.pipeline.transformer, CLIPS.objective(settings, model.pipeline)
    # What lets LoRA's float32 numbers meet a half-precision model, as the scripts' Accelerator does.
    dtype, mixes = transformer.dtype, task.kind == "LoRA" and transformer.dtype != torch.float32
    if task.kind == "LoRA":
        learned = add_lora(transformer, sum(parameter.numel() for parameter in prepared.concept.parameters()))
        groups: list[dict[str, Any]] = [{"params": learned, "lr": 1e-4}]
    else:
        streams = prepared.streams.values()
        groups = [
            {"params": [stream.vectors for stream in streams], "lr": settings.vector_rate},
            {"params": [stream.scales for stream in streams], "lr": settings.scale_rate},
        ]
        learned = [parameter for group in groups for parameter in group["params"]]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
    sample.learned = sum(parameter.numel() for parameter in learned)
    random = torch.Generator().manual_seed(0)

    def step() -> None:
        latents, texts = draw()
        states = texts.states.to(device)
        if task.kind == "engram":
            states = add_delta(states, prepared.concept({"umt5": (states, texts.ids, texts.lengths)})["umt5"])
        times = objective.spread_times(len(latents), random).to(device)
        conditions = model.conditioner({"umt5": states}, {})
        with torch.autocast(device.type, dtype, enabled=mixes):
            loss = objective.losses(latents, torch.randn_like(latents), times, conditions).mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(learned, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    return step


def draw_kept(prepared: Prepared, size: int, device: torch.device) -> Draw:
    """Return what draws a batch out of kept latents and text states."""
    data, texts = prepared.data, prepared.data.texts["umt5"]
    first = torch.tensor([forms[0] for forms in data.captions])

    def draw() -> tuple[Tensor, FrozenTexts]:
        chosen = torch.randint(len(data.mean), (size,))
        latents = data.mean[chosen] + data.std[chosen] * torch.randn(size, *data.mean.shape[1:])
        rows = first[chosen]
        lengths = None if texts.lengths is None else texts.lengths[rows]
        return latents.to(device), FrozenTexts(ids=texts.ids[rows], states=texts.states[rows], lengths=lengths)

    return draw


def draw_anew(pipeline: Any, settings: Wan22TrainSettings, items: Sequence[Any], device: torch.device) -> Draw:
    """Return what draws a batch by the frozen models, as a script without caches does; frames are in memory."""
    size = settings.width, settings.height
    tokenizer = pipeline_tokenizers(pipeline)["umt5"]
    reader = TextReader(FAMILY, pipeline, "umt5", tokenizer, device)
    clips = [
        read_clip(item.path, frames=sample_indices(item.info.frames, settings.frames), size=size).frames
        for item in items
    ]

    def draw() -> tuple[Tensor, FrozenTexts]:
        chosen = torch.randint(len(clips), (settings.batch_size,)).tolist()
        mean, std = encode_clips(pipeline.vae, [clips[at] for at in chosen], device)
        latents = (mean + std * torch.randn_like(mean)).to(device)
        return latents, reader.read([items[at].caption for at in chosen])

    return draw


if __name__ == "__main__":
    main(measure)
