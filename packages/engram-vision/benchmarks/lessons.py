"""What every method learns from: the same pictures, captions, latents, batches, noise and times.

The project's own preparation makes them, so that latents and text states are computed once and kept for all methods.

Shapes: B samples, V views of the pictures, L positions, d width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engram_core import Watcher
from engram_core.settings import Layer, dump_settings, resolve_settings
from engram_vision.demo.characters import DemoCharacter, read_characters
from engram_vision.models import load_pipeline
from engram_vision.sd15 import SD15
from engram_vision.settings import TrainSettings
from engram_vision.shipped import TINY
from engram_vision.training.batches import Batch, draw_batch, fixed_batches
from engram_vision.training.frozen import FrozenData
from engram_vision.training.pictures import PICTURES
from engram_vision.training.preparation import load_model, prepare, read_data

CHARACTERS = Path(__file__).with_name("characters")
STREAM = "clip_l"

Conditions = Mapping[str, Any]
"""Keyword arguments of the denoiser."""


def read_cast() -> tuple[list[DemoCharacter], DemoCharacter, dict[str, str]]:
    """Return the characters to evaluate with, the one for development, and each scene's phrase."""
    shipped, phrases = read_characters()
    values = json.loads((CHARACTERS / "characters.json").read_text(encoding="utf-8"))["characters"]
    own = {
        one["use"]: DemoCharacter(
            name=one["name"],
            folder=CHARACTERS / one["folder"],
            description=one["description"],
            attributes=one["attributes"],
            shown=tuple(one["scenes"]),
        )
        for one in values
    }
    return [*shipped, own["evaluation"]], own["development"], phrases


def open_model(device: str, backbone: Any = SD15) -> Any:
    """Return the base model of a backbone as it ships, on a device."""
    return load_pipeline(backbone.family, TINY, device=torch.device(device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to learn.

    Attributes:
        data: folder of captioned pictures.
        trigger: the name.
        output: what to write, without a suffix.
        cache: folder for latents and text states, which all runs share.
        steps: optimizer steps.
        seed: of batches, noise, times and first values.
        device: where to compute.
        backbone: whose `tiny` learns.
    """

    data: Path
    trigger: str
    output: Path
    cache: Path
    steps: int
    seed: int
    device: str
    backbone: Any = SD15

    def settings(self, changes: Mapping[str, Any] | None = None) -> TrainSettings:
        """Return `tiny`'s settings with some changed."""
        own: dict[str, Any] = {"model": TINY, "data": self.data, "trigger": self.trigger, "cache_dir": self.cache}
        own |= {"output": self.output.with_suffix(".safetensors"), "seed": self.seed, "device": self.device}
        own |= {"steps": self.steps}
        layers = [
            Layer(source="tiny", values=self.backbone.default_train_settings(TINY)),
            Layer(source="comparison", values={**own, **(changes or {})}),
        ]
        settings: TrainSettings = resolve_settings(self.backbone.train_settings, layers)
        return settings

    def facts(self, changes: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the settings on which the outcome depends."""
        places = {"data", "output", "model", "cache_dir", "run_dir", "device"}
        return {name: value for name, value in dump_settings(self.settings(changes)).items() if name not in places}


class Lessons:
    """The frozen model and its view of the pictures, for methods that the project's own trainer does not know."""

    def __init__(self, task: Task) -> None:
        """Load the model and compute latents and text states, unless they are kept."""
        self.settings, self.device = task.settings(), torch.device(task.device)
        samples = read_data(self.settings, PICTURES, Watcher())
        model = load_model(self.settings, PICTURES, self.device, Watcher())
        prepared = prepare(self.settings, PICTURES, samples, model, self.device, task.cache, Watcher())
        self.items = samples.learned
        self.pipeline: Any = model.pipeline.to(self.device)
        for part in self.pipeline.components.values():
            if isinstance(part, nn.Module):
                part.requires_grad_(False)
        self.data: FrozenData = prepared.data
        self.objective = PICTURES.objective(self.settings, self.pipeline)
        self._conditioner = model.conditioner

    def batch(self, number: int) -> Batch:
        """Return the batch of a step: the one that an engram's step of this number and seed has."""
        size, seed = self.settings.batch_size, self.settings.seed
        return draw_batch(self.data, self.objective, size=size, number=number, seed=seed)

    def checks(self) -> Sequence[Batch]:
        """Return the batches with which the best step is chosen, as for an engram."""
        settings = self.settings
        return fixed_batches(
            self.data,
            self.objective,
            draws=settings.validation_draws,
            size=settings.batch_size,
            seed=settings.seed,
        )

    def conditions(self, rows: Tensor) -> Conditions:
        """Return what the denoiser reads of rows of the frozen texts."""
        texts = self.data.texts
        states = {name: text.states[rows].to(self.device) for name, text in texts.items()}
        pooled = {name: text.pooled[rows].to(self.device) for name, text in texts.items() if text.pooled is not None}
        return self._conditioner(states, pooled)

    def condition_on(self, states: Tensor) -> Conditions:
        """Return what the denoiser reads of the text states of a single encoder, [B, L, d]."""
        return self._conditioner({STREAM: states}, {})

    def ids(self, rows: Tensor) -> Tensor:
        """Return the token ids of rows, int64 [B, L]."""
        return self.data.texts[STREAM].ids[rows].to(self.device)

    def losses(self, batch: Batch, conditions: Conditions) -> Tensor:
        """Return each sample's loss, [B], given what the denoiser reads of its text."""
        latents, noise, times = (part.to(self.device) for part in (batch.latents, batch.noise, batch.times))
        return self.objective.losses(latents, noise, times, conditions)

    def retell(self, change: Callable[[str], str]) -> Tensor:
        """Return token ids of the captions in other words, int64 [rows, L], one for each row of the frozen texts.

        A row with the trigger in another form has the caption that it is a form of.

        Args:
            change: makes the other words of a caption.
        """
        known = {tuple(self.tokenize([item.caption])[0].tolist()): item.caption for item in self.items}
        frozen = self.data.texts[STREAM].ids
        captions = [""] * len(frozen)
        for rows in self.data.captions:
            caption = known[tuple(frozen[rows[0]].tolist())]
            for row in rows:
                captions[row] = caption
        return self.tokenize([change(caption) for caption in captions])

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Return texts as the pipeline reads them, int64 [N, L]."""
        words = self.pipeline.tokenizer
        options = {"padding": "max_length", "max_length": words.model_max_length, "truncation": True}
        ids: Tensor = words(list(texts), return_tensors="pt", **options)["input_ids"]
        return ids
