"""The training loop: one pass through the frozen denoiser a step, gradients for vectors and scales alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from engram_core import InputError, TargetExistsError, TrainingError, TrainReport, Watcher
from engram_core.container import open_target, write_all
from engram_core.errors import one_line
from engram_core.settings import dump_settings
from engram_core.torch import add_delta
from engram_core.training.interrupt import DeferredInterrupt
from engram_core.training.metrics import MetricsFile
from engram_core.training.schedule import rate_factor
from engram_vision.generation import make_folder
from engram_vision.loading import load_engram, unload_engrams
from engram_vision.models import pick_device
from engram_vision.settings import TrainSettings
from engram_vision.shipped import TINY
from engram_vision.site_hooks import SiteReader, attach_sites, detach_sites
from engram_vision.training.batches import Batch, draw_batch, fixed_batches
from engram_vision.training.frozen import FrozenData
from engram_vision.training.medium import Medium
from engram_vision.training.pictures import PICTURES
from engram_vision.training.placement import Placement, peak_memory_mb
from engram_vision.training.preparation import prepare, read_data
from engram_vision.training.state import Progress, load_state, restore_optimizer, save_state

__all__ = ["METRICS", "PREVIEWS", "SETTINGS", "STATE", "train"]

STATE = "state.safetensors"
METRICS = "metrics.jsonl"
SETTINGS = "settings.toml"
PREVIEWS = "previews"

_LOG_EVERY = 10


def train(
    settings: TrainSettings,
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    medium: Medium = PICTURES,
) -> TrainReport:
    """Train one concept for a model that draws, and write its adapter.

    Args:
        settings: what to do; their class says for which model family.
        resume: go on with an interrupted run; on the CPU the adapter is bit for bit that of an uninterrupted one.
        overwrite: replace the adapter file, and begin anew in a run folder that is in use.
        watcher: hears how it goes.
        medium: what the family draws.

    Raises:
        InputError: samples, captions, model or settings cannot be used.
        TriggerError: the trigger cannot be registered.
        TargetExistsError: the output or a run exists, and neither `resume` nor `overwrite` was asked for.
        TrainingError: the loss became NaN or infinite; the last good state is kept.
        AdapterWriteError: something cannot be written, e.g. because the disk is full; the last state is kept.
        KeyboardInterrupt: after the state was saved.
    """
    run = _Run(settings, medium, watcher or Watcher(), resume=resume, overwrite=overwrite)
    return run.train()


@dataclass(frozen=True, slots=True, eq=False)
class _Best:
    step: int
    loss: float
    values: Mapping[str, Tensor]


class _Run:
    """One call of `train`."""

    def __init__(
        self, settings: TrainSettings, medium: Medium, watcher: Watcher, *, resume: bool, overwrite: bool
    ) -> None:
        self.started = time.monotonic()
        self.settings, self.medium, self.watcher = settings, medium, watcher
        self.folder = settings.run_dir or settings.output.with_suffix(".run")
        _check_tracker(settings.tracker)
        _check_targets(settings, self.folder, resume=resume, overwrite=overwrite)
        device = pick_device(settings.device, settings.precision)
        data, unseen = read_data(settings, medium, watcher)
        if settings.model != TINY:
            self._tell_memory()
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # whatever a user's accelerate configuration says of other scripts
            log_with=None if settings.tracker == "none" else settings.tracker,
            project_dir=self.folder,
            # A caption may be cut before the trigger in one stream, whose vectors then have no part in a batch.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.device = self.accelerator.device
        if self.device.type != device.type:  # accelerate settles it once for a process
            raise InputError(
                f"this Python process works on {self.device.type} already; start another for {device.type}"
            )
        cache, main = settings.cache_dir or self.folder, self.accelerator.is_main_process
        self.prepared = prepare(settings, medium, data, unseen, self.device, cache, watcher, keeps=main)
        self.pipeline, self.streams = self.prepared.pipeline, self.prepared.streams
        self.objective = medium.objective(settings, self.pipeline)
        self.placement = Placement(self.pipeline, settings, self.device, watcher)
        self.reader = None
        if settings.sites == "blocks":
            self.reader = SiteReader(settings.family, self.prepared.corners, {})
            self._attach_sites()
        groups = [
            {"params": [stream.vectors for stream in self.streams.values()], "peak": settings.vector_rate},
            {"params": [stream.scales for stream in self.streams.values()], "peak": settings.scale_rate},
        ]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.model = self.accelerator.prepare(self.prepared.concept)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self.identity = self.prepared.describe(settings)
        self.first, self.best = 0, _Best(0, math.inf, {})
        if resume:
            self._resume()

    def _tell_memory(self) -> None:
        """Tell what the run will need before anything is loaded, where that can be known."""
        self.watcher.begin("estimating memory")
        estimate = self.medium.estimate(self.settings)
        if estimate is not None:
            self.watcher.note(" ".join(estimate.show().splitlines()))

    def train(self) -> TrainReport:
        """Do the steps that are left and write the adapter."""
        try:
            return self._finish(self._do_steps())
        finally:
            self.accelerator.end_training()
            self.placement.end()
            detach_sites(self._denoiser)

    def _do_steps(self) -> float:
        """Return the last mean training loss."""
        settings, main = self.settings, self.accelerator.is_main_process
        mean, begun = math.nan, time.monotonic()
        if main:
            metrics = self._open_folder()
            mean = metrics.loss
        if settings.tracker != "none":
            self.accelerator.init_trackers("engram", config=_flat(dump_settings(settings)))
        checks: Sequence[Batch] = ()
        if settings.validate_every:
            checks = fixed_batches(
                self.prepared.unseen,
                self.objective,
                draws=settings.validation_draws,
                size=settings.batch_size,
                seed=settings.seed,
            )
        self.watcher.begin("training", settings.steps, self.first)
        losses: list[Tensor] = []
        with DeferredInterrupt() as interrupt:
            for done in range(self.first + 1, settings.steps + 1):
                losses.append(self._step(done - 1))
                last, stops = done == settings.steps, self._asked_by_any(interrupt)
                validates = bool(checks) and (last or done % settings.validate_every == 0)
                saves = last or stops or done % settings.save_every == 0
                figures: dict[str, float] = {}
                if saves or validates or done % _LOG_EVERY == 0:
                    mean = figures["loss"] = self._mean_loss(losses, done)
                    losses = []
                    figures["rate"] = self.optimizer.param_groups[0]["lr"]
                    if validates:
                        figures["validation_loss"] = self._validate(checks, done)
                    figures["steps_per_second"] = (done - self.first) / (time.monotonic() - begun)
                    figures["memory_mb"] = peak_memory_mb(self.device)
                    if main:
                        metrics.write(done, figures)
                    self.accelerator.log(figures, step=done)
                if saves:
                    self._save(done)
                self.watcher.advance(done, figures)
                if stops:
                    raise KeyboardInterrupt
                if main and settings.preview_every and done % settings.preview_every == 0:
                    self._preview(done)
        self.watcher.end()
        return mean

    def _open_folder(self) -> MetricsFile:
        """Make the run's folder, write the settings, and begin or continue the metrics."""
        make_folder(self.folder)
        if not self.first:
            (self.folder / STATE).unlink(missing_ok=True)  # of a run that is begun anew
        values = {"train": {"backbone": self.settings.family.name, **dump_settings(self.settings)}}
        with open_target(self.folder / SETTINGS, overwrite=True) as file:
            write_all(file, memoryview(tomli_w.dumps(values).encode()))
        return MetricsFile(self.folder / METRICS, after_step=self.first)

    def _asked_by_any(self, interrupt: DeferredInterrupt) -> bool:
        """Tell whether any process heard Ctrl-C: they must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return interrupt.requested
        asked = torch.tensor(float(interrupt.requested), device=self.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _step(self, step: int) -> Tensor:
        """Do one optimizer step and return its mean loss, on the device."""
        settings, accelerator = self.settings, self.accelerator
        factor = rate_factor(step, steps=settings.steps, warm_up=settings.warm_up, schedule=settings.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        total = torch.zeros((), device=self.device)
        for part in range(settings.accumulate):
            batch = draw_batch(
                self.prepared.data,
                self.objective,
                size=settings.batch_size * accelerator.num_processes,
                number=step * settings.accumulate + part,
                seed=settings.seed,
            ).part(accelerator.process_index * settings.batch_size, settings.batch_size)
            waits = part + 1 < settings.accumulate
            with accelerator.no_sync(self.model) if waits else contextlib.nullcontext():
                loss = self._losses(batch, self.prepared.data).mean() / settings.accumulate
                accelerator.backward(self.scaler.scale(loss))
            total += loss.detach()
        self.scaler.unscale_(self.optimizer)
        if settings.max_grad_norm:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    torch.nn.utils.clip_grad_norm_(parameter, settings.max_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        return total

    def _losses(self, batch: Batch, data: FrozenData) -> Tensor:
        rows = batch.texts
        frozen = {
            stream: (
                texts.states[rows].to(self.device),
                texts.ids[rows],
                None if texts.lengths is None else texts.lengths[rows],
            )
            for stream, texts in data.texts.items()
        }
        pooled = {
            stream: texts.pooled[rows].to(self.device)
            for stream, texts in data.texts.items()
            if texts.pooled is not None
        }
        deltas = self.model(frozen)
        states = {stream: parts[0] for stream, parts in frozen.items()}
        if self.reader is None:
            states = {stream: add_delta(each, deltas[stream]) for stream, each in states.items()}
        conditions = self.prepared.conditioner(states, pooled)
        latents, noise, times = (part.to(self.device) for part in (batch.latents, batch.noise, batch.times))
        with contextlib.nullcontext() if self.reader is None else self.reader.given(deltas):
            return self.objective.losses(latents, noise, times, conditions)

    @torch.no_grad()
    def _validate(self, batches: Sequence[Batch], step: int) -> float:
        """Return the loss on the fixed batches, and remember the values if it is the lowest so far."""
        visited = {name: stream.visited.clone() for name, stream in self.streams.items()}  # looking is not learning
        losses = torch.cat([self._losses(batch, self.prepared.unseen) for batch in batches])
        for name, stream in self.streams.items():
            stream.visited = visited[name]
        loss = float(losses.mean())
        if not math.isfinite(loss):
            raise self._error(step, f"the validation loss is {loss:g}")
        if loss < self.best.loss:
            self.best = _Best(step, loss, self._values())
        return loss

    def _mean_loss(self, losses: Sequence[Tensor], step: int) -> float:
        """Return the mean of some steps' losses over all processes.

        Raises:
            TrainingError: it is not finite, or the vectors are not.
        """
        mean = float(self.accelerator.gather(torch.stack(list(losses)).mean()).float().mean())
        finite = all(bool(value.isfinite().all()) for value in self._values().values())
        if not (math.isfinite(mean) and finite):
            raise self._error(step, f"the loss is {mean:g}{'' if finite else ' and the vectors are not finite'}")
        return mean

    def _error(self, step: int, fact: str) -> TrainingError:
        state = self.folder / STATE
        kept = f"{state} keeps the last good state" if state.is_file() else "no state was saved before"
        remedy = f"begin anew with --force and a vector_rate below {self.settings.vector_rate:g}, or in precision fp32"
        return TrainingError(f"step {step}: {fact}; {kept}; {remedy}")

    def _values(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.prepared.concept.state_dict().items()}

    def _save(self, step: int) -> None:
        if self.accelerator.num_processes > 1:  # every process showed other captions
            for stream in self.streams.values():
                seen = self.accelerator.reduce(stream.visited.float().to(self.device), "sum")
                stream.visited = seen.cpu() > 0
        if self.accelerator.is_main_process:
            save_state(
                self.folder / STATE,
                Progress(step=step, best_step=self.best.step, best_loss=self.best.loss, run=self.identity),
                self._values(),
                self.best.values,
                {name: stream.visited for name, stream in self.streams.items()},
                self.optimizer,
            )

    def _resume(self) -> None:
        state = self.folder / STATE
        if not state.is_file() and (self.folder / SETTINGS).is_file():
            self.watcher.note(f"{self.folder}: the run was stopped before its first state; it begins at step 0")
            return
        progress, groups = load_state(state)
        for name, value in self.identity.items():
            if progress.run.get(name) != value:
                raise InputError(
                    f"{state}: {name} was {progress.run.get(name)} when the run was begun and is {value} now; "
                    f"use {self.folder / SETTINGS}, or begin anew with --force"
                )
        try:
            for values in filter(None, (groups["best"], groups["model"])):  # the last stays
                self.prepared.concept.load_state_dict(values)
            restore_optimizer(self.optimizer, groups["optimizer"])
            for name, stream in self.streams.items():
                stream.visited[:] = groups["visited"][name]
        except (RuntimeError, ValueError, KeyError) as error:
            reason = one_line(error)
            raise InputError(f"{state}: does not fit the run: {reason}; begin anew with --force") from None
        self.first = progress.step
        self.best = _Best(progress.best_step, progress.best_loss, groups["best"])

    def _preview(self, step: int) -> None:
        """Draw with the present vectors, by the code that generation uses."""
        prompts = self.settings.preview_prompts or (self.settings.trigger,)
        folder = self.folder / PREVIEWS
        make_folder(folder)
        self.placement.bring_back()
        detach_sites(self._denoiser)
        load_engram(self.pipeline, self.prepared.adapter(self.settings, step), name="preview")
        try:
            self.medium.preview(prompts, self.settings, self.pipeline, folder, step)
        finally:
            unload_engrams(self.pipeline, "preview")
            self._attach_sites()
        self.placement.free_encoders()

    @property
    def _denoiser(self) -> torch.nn.Module:
        denoiser: torch.nn.Module
        (denoiser,) = self.settings.family.denoisers(self.pipeline).values()
        return denoiser

    def _attach_sites(self) -> None:
        """Let the denoiser's blocks read what the concept in training adds for each."""
        if self.reader is not None:
            attach_sites(self.settings.family, self._denoiser, self.reader)

    def _finish(self, mean: float) -> TrainReport:
        settings = self.settings
        step, loss = settings.steps, mean
        if settings.keep == "best" and self.best.values:
            step, loss = self.best.step, self.best.loss
            self.prepared.concept.load_state_dict(dict(self.best.values))
        adapter = self.prepared.adapter(settings, step)
        if self.accelerator.is_main_process:
            # Whether it may be replaced was asked before anything was done.
            adapter.save(settings.output, overwrite=True)
        return TrainReport(
            output=settings.output,
            run_dir=self.folder,
            identity=adapter.identity(),
            n_bytes=adapter.nbytes(),
            steps=settings.steps,
            kept_step=step,
            loss=loss,
            seconds=time.monotonic() - self.started,
            entries={name: len(table.concept) for name, table in adapter.streams.items()},
        )


def _check_targets(settings: TrainSettings, folder: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse early what would fail or overwrite at the end."""
    output, state = settings.output, folder / STATE
    if not output.parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}; create it first")
    if output.is_dir():
        raise InputError(f"{output}: is a folder; give the name of a file")
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, and the run needs a folder of that name; pass another --run-dir")
    if resume or overwrite:
        return
    if output.exists():
        raise TargetExistsError(f"{output}: exists; pass --force to replace it, or another --output")
    if state.exists():
        raise TargetExistsError(f"{folder}: holds an interrupted run; pass --resume to go on, or --force to begin anew")


def _check_tracker(tracker: str) -> None:
    """Refuse a tracker that is not installed, which accelerate would leave out in silence."""
    packages = {"none": (), "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}[tracker]
    if packages and not any(map(find_spec, packages)):
        raise InputError(f"tracker {tracker} needs the package {packages[0]}; install it, or leave --tracker out")


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as trackers take them."""
    return {name: ", ".join(value) if isinstance(value, list) else value for name, value in values.items()}
