"""How a character is learned from its clips: one entry of `METHODS` for each way, with the same clips and steps.

A further method is one more entry: how it learns, and how a pipeline with what it learned is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timed import count_values
from torch import Tensor

from engram_core import Watcher
from engram_core.settings import Layer, dump_settings, resolve_settings
from engram_core.training.schedule import rate_factor
from engram_video.families import WAN22 as FAMILY
from engram_video.settings import Wan22TrainSettings
from engram_video.training.clips import CLIPS, train
from engram_video.wan22 import WAN22
from engram_vision.loading import load_engram
from engram_vision.models import load_pipeline
from engram_vision.quiet import quiet_libraries
from engram_vision.training.batches import Batch, draw_batch, fixed_batches
from engram_vision.training.frozen import FrozenData
from engram_vision.training.preparation import load_model, prepare, read_data

ALL = tuple(f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
TEXT_ALONE = ("attn2.to_k", "attn2.to_v")  # that read the text
_RATES = ("vector_rate", "scale_rate")
PUBLISHED = Wan22TrainSettings(data=Path(), trigger="", output=Path("published.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What to learn.

    Attributes:
        model: the base model.
        clips: folder of the character's clips.
        trigger: its name.
        output: where to write what was learned, without a suffix.
        cache: folder for latents and text states, which all runs share.
        steps: optimizer steps; None means as many as `tiny`'s settings say.
        seed: of noise, times and first values.
        device: where to compute.
    """

    model: str
    clips: Path
    trigger: str
    output: Path
    cache: Path
    steps: int | None
    seed: int
    device: str

    def settings(self, changes: Mapping[str, Any]) -> Wan22TrainSettings:
        """Return `tiny`'s settings with some changed."""
        own: dict[str, Any] = {
            "model": self.model,
            "data": self.clips,
            "trigger": self.trigger,
            "output": self.output.with_suffix(".safetensors"),
            "cache_dir": self.cache,
            "seed": self.seed,
            "device": self.device,
        }
        if self.steps is not None:
            own |= {"steps": self.steps}
        layers = [Layer(source="tiny", values=WAN22.tiny_train), Layer(source="benchmark", values={**own, **changes})]
        return resolve_settings(Wan22TrainSettings, layers)


def _always(values: Mapping[str, Any], _: int) -> Mapping[str, Any]:
    """Return the same settings for any number of steps; unlike a lambda it can go to other processes."""
    return values


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way to learn.

    Attributes:
        name: for the table.
        settings: what differs from `tiny`'s, given the number of steps.
        learn: learns and writes; returns how many values learned.
        open: returns a pipeline with what was learned; None of it for the base model.
    """

    name: str
    settings: Callable[[int], Mapping[str, Any]] = field(default=partial(_always, {}))
    learn: Callable[[Task, Mapping[str, Any]], int]
    open: Callable[[Task], Any]

    def describe(self, task: Task) -> dict[str, Any]:
        """Return the settings of a run, as far as its outcome depends on them."""
        places = {"data", "output", "model", "cache_dir", "run_dir"}
        known, more = self._split(task)
        return {name: value for name, value in dump_settings(task.settings(known)).items() if name not in places} | more

    def run(self, task: Task) -> int:
        """Learn; returns how many values learned."""
        known, more = self._split(task)
        return self.learn(task, known | more)

    def _split(self, task: Task) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return what changes of the settings, and what the method knows beside them."""
        changes = self.settings(task.settings({}).steps)
        fields = Wan22TrainSettings.__dataclass_fields__
        return (
            {name: value for name, value in changes.items() if name in fields},
            {name: value for name, value in changes.items() if name not in fields},
        )


def learn_engram(task: Task, changes: Mapping[str, Any]) -> int:
    """Train with the project's own trainer; what a stopped run left is begun anew."""
    report = train(task.settings(changes), overwrite=True)
    return count_values(report.output)


def open_engram(task: Task) -> Any:
    """Return a pipeline with the adapter."""
    pipeline = open_base(task)
    load_engram(pipeline, task.output.with_suffix(".safetensors"))
    return pipeline


def open_base(task: Task) -> Any:
    """Return the pipeline as it is."""
    return load_pipeline(FAMILY, task.model, device=torch.device(task.device))


def learn_lora(task: Task, changes: Mapping[str, Any]) -> int:
    """Train LoRA on attention projections: the clips, batches, noise, times, clipping and choice of an engram.

    Its rank is that with which about as many values learn as of an engram, and at least 1.
    """
    rate, projections = changes["rate"], changes["projections"]
    settings = task.settings({})
    device = torch.device(task.device)
    model = load_model(settings, CLIPS, device, Watcher())
    prepared = prepare(settings, CLIPS, read_data(settings, CLIPS, Watcher()), model, device, task.cache, Watcher())
    objective = CLIPS.objective(settings, model.pipeline)
    transformer = model.pipeline.transformer.to(device)
    n_engram = sum(parameter.numel() for parameter in prepared.concept.parameters())
    torch.manual_seed(task.seed)
    learned = add_lora(transformer, n_engram, projections)
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=settings.weight_decay)

    def losses(batch: Batch, data: FrozenData) -> Tensor:
        states = data.texts["umt5"].states[batch.texts].to(device)
        latents, noise, times = (part.to(device) for part in (batch.latents, batch.noise, batch.times))
        return objective.losses(latents, noise, times, model.conditioner({"umt5": states}, {}))

    checks = fixed_batches(
        prepared.unseen, objective, draws=settings.validation_draws, size=settings.batch_size, seed=settings.seed
    )
    least = float("inf")
    for step in range(settings.steps):
        factor = rate_factor(step, steps=settings.steps, warm_up=settings.warm_up, schedule=settings.schedule)
        optimizer.param_groups[0]["lr"] = rate * factor
        batch = draw_batch(prepared.data, objective, size=settings.batch_size, number=step, seed=settings.seed)
        torch.autograd.backward(losses(batch, prepared.data).mean())
        torch.nn.utils.clip_grad_norm_(learned, settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        done = step + 1
        if done == settings.steps or (settings.validate_every and done % settings.validate_every == 0):
            with torch.no_grad():
                loss = float(torch.cat([losses(check, prepared.unseen) for check in checks]).mean())
            if loss < least:
                least = loss
                save_lora(transformer, task.output.with_suffix(".lora"))
    if least == float("inf"):
        raise RuntimeError(f"LoRA at {rate:g}: the loss is not finite")
    return sum(parameter.numel() for parameter in learned)


def add_lora(transformer: Any, n_values: int, projections: Sequence[str] = ALL) -> list[Tensor]:
    """Put LoRA of about so many values on a transformer's projections; returns what learns, in float32."""
    from diffusers.training_utils import cast_training_params
    from peft import LoraConfig

    transformer.requires_grad_(False)
    parts = {
        name: module
        for name, module in transformer.named_modules()
        if any(name.endswith(f".{ending}") for ending in projections)
    }
    n_rank_1 = sum(module.in_features + module.out_features for module in parts.values())
    rank = max(1, round(n_values / n_rank_1))
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(parts))
    transformer.add_adapter(config)
    cast_training_params(transformer, dtype=torch.float32)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]


def save_lora(transformer: Any, folder: Path) -> None:
    """Write a transformer's LoRA as diffusers' scripts do."""
    from diffusers import WanPipeline
    from peft import get_peft_model_state_dict

    WanPipeline.save_lora_weights(folder, transformer_lora_layers=get_peft_model_state_dict(transformer))


def open_lora(task: Task) -> Any:
    """Return a pipeline with LoRA in its transformer."""
    pipeline, folder = open_base(task), task.output.with_suffix(".lora")
    with quiet_libraries():
        pipeline.load_lora_weights(folder)
    (file,) = folder.glob("*.safetensors")
    kept = sum(float(value.double().abs().sum()) for value in load_file(file).values())
    loaded = (value for name, value in pipeline.transformer.named_parameters() if ".lora_" in name)
    there = sum(float(value.detach().double().abs().sum()) for value in loaded)
    if abs(there / kept - 1) > 1e-6:
        raise RuntimeError(f"{file}: diffusers did not load all of it")
    return pipeline


def publish(steps: int, *, stretch: bool) -> dict[str, Any]:
    """Return the published settings for fewer steps: all that these say but frames, size and clips a step.

    Args:
        steps: of the run.
        stretch: whether rates are higher by as much as steps are fewer, so that Adam can move values as far.
    """
    names = ("sites", "rule", "overlap", "init_std", "init_scale", "weight_decay", "schedule", *_RATES)
    values = {name: getattr(PUBLISHED, name) for name in names}
    share = steps / PUBLISHED.steps
    values |= {"activation": "spans", "keep": "last", "warm_up": round(PUBLISHED.warm_up * share)}
    if stretch:
        values |= {name: values[name] / share for name in _RATES}
    return values


def _lora(rate: float, where: str, projections: Sequence[str]) -> Method:
    return Method(
        name=f"LoRA{where}, rate {rate:g}",
        settings=partial(_always, {"rate": rate, "projections": list(projections)}),
        learn=learn_lora,
        open=open_lora,
    )


ENGRAM = Method(name="engram, a residual for each block", learn=learn_engram, open=open_engram)
_CLASS = {"init": "a monster"}  # what each character of the demo is, and the one that settings were chosen on
METHODS = (
    ENGRAM,
    replace(ENGRAM, name="engram, one residual", settings=partial(_always, {"sites": "text"})),
    replace(ENGRAM, name="engram, begun as words", settings=partial(_always, _CLASS)),
    replace(
        ENGRAM, name="engram, begun as words, half the rate", settings=partial(_always, {**_CLASS, "vector_rate": 0.15})
    ),
    replace(ENGRAM, name="published, rates to scale", settings=partial(publish, stretch=True)),
    replace(ENGRAM, name="published, rates as they are", settings=partial(publish, stretch=False)),
    *(_lora(rate, "", ALL) for rate in (1e-3, 3e-3, 1e-2)),
    *(_lora(rate, " of what reads the text", TEXT_ALONE) for rate in (3e-3, 1e-2)),
)
