"""The training loop: one pass through the frozen denoiser a step, gradients for vectors and scales alone.

Several concepts may learn at once: their samples go through the denoiser together, and nothing else of them meets.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor

from engram_core import InputError, TrainReport, Watcher
from engram_core.torch import Delta, add_delta
from engram_core.training.interrupt import DeferredInterrupt
from engram_vision.generation import make_folder
from engram_vision.loading import load_engram, unload_engrams
from engram_vision.models import pick_device
from engram_vision.settings import TrainSettings
from engram_vision.shipped import TINY
from engram_vision.site_hooks import SiteReader, attach_sites, detach_sites
from engram_vision.training.batches import Batch
from engram_vision.training.checks import METRICS, SETTINGS, STATE, check_concepts, is_begun, run_folder
from engram_vision.training.frozen import FrozenData
from engram_vision.training.medium import Medium
from engram_vision.training.pictures import PICTURES
from engram_vision.training.placement import Placement, peak_memory_mb
from engram_vision.training.preparation import load_model, prepare, read_data
from engram_vision.training.pupil import Pupil, flat_settings

__all__ = ["METRICS", "PREVIEWS", "SETTINGS", "STATE", "train", "train_together"]

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
    check_concepts([settings], resume=resume, overwrite=overwrite)
    (report,) = _Run([settings], medium, watcher or Watcher(), resume=[resume]).train()
    return report


def train_together(
    settings: Sequence[TrainSettings],
    *,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    medium: Medium = PICTURES,
) -> list[TrainReport]:
    """Train several concepts at once, each as if it were alone, and write an adapter for each.

    The model is loaded once, and at each step the samples of all concepts pass through it together. What a concept
    learns is what it would learn alone, but for the rounding of matrix products of another size.

    Args:
        settings: of each concept; they differ in what is the concept's own (data, trigger, output, rates, seed ...).
        resume: go on with interrupted runs, each from where it stopped; concepts not begun yet begin.
        overwrite: as for `train`.
        watcher: hears how it goes.
        medium: what the family draws.

    Raises:
        InputError: also when the settings differ in more than that, or two write the same file.
        EngramError, KeyboardInterrupt: as for `train`.
    """
    check_concepts(settings, resume=resume, overwrite=overwrite)
    goes_on = [resume and is_begun(each) for each in settings]
    return _Run(settings, medium, watcher or Watcher(), resume=goes_on).train()


class _Run:
    """One call of `train_together`."""

    def __init__(
        self, settings: Sequence[TrainSettings], medium: Medium, watcher: Watcher, *, resume: Sequence[bool]
    ) -> None:
        self.started = time.monotonic()
        self.settings, self.medium, self.watcher = settings[0], medium, watcher
        device = pick_device(self.settings.device, self.settings.precision)
        samples = [read_data(each, medium, watcher) for each in settings]
        if self.settings.model != TINY:
            self._tell_memory(len(settings))
        self.accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision="no",  # whatever a user's accelerate configuration says of other scripts
            log_with=None if self.settings.tracker == "none" else self.settings.tracker,
            project_dir=run_folder(self.settings),
            # A caption may be cut before the trigger in one stream, whose vectors then have no part in a batch.
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.device = self.accelerator.device
        if self.device.type != device.type:  # accelerate settles it once for a process
            raise InputError(
                f"this Python process works on {self.device.type} already; start another for {device.type}"
            )
        self.model = load_model(self.settings, medium, self.device, watcher)
        self.pipeline = self.model.pipeline
        self.objective = medium.objective(self.settings, self.pipeline)
        main = self.accelerator.is_main_process
        self.pupils = []
        for each, data, goes_on in zip(settings, samples, resume, strict=True):
            cache = each.cache_dir or run_folder(each)
            prepared = prepare(each, medium, data, self.model, self.device, cache, watcher, keeps=main)
            self.pupils.append(Pupil(each, prepared, self.objective, self.accelerator, watcher, resume=goes_on))
        self.placement = Placement(self.pipeline, self.settings, self.device, watcher)
        self.reader = None
        if self.settings.sites == "blocks":
            self.reader = SiteReader(self.settings.family, self.model.corners, {})
            self._attach_sites()

    def _tell_memory(self, count: int) -> None:
        """Tell what the run will need before anything is loaded, where that can be known."""
        self.watcher.begin("estimating memory")
        estimate = self.medium.estimate(replace(self.settings, batch_size=self.settings.batch_size * count))
        if estimate is not None:
            self.watcher.note(" ".join(estimate.show().splitlines()))

    def train(self) -> list[TrainReport]:
        """Do the steps that are left and write the adapters."""
        try:
            self._do_steps()
            return [pupil.finish(time.monotonic() - self.started) for pupil in self.pupils]
        finally:
            self.accelerator.end_training()
            self.placement.end()
            detach_sites(self._denoiser)

    def _do_steps(self) -> None:
        settings, main = self.settings, self.accelerator.is_main_process
        begun = time.monotonic()
        if main:
            for pupil in self.pupils:
                pupil.open_folder()
        if settings.tracker != "none":
            self.accelerator.init_trackers("engram", config=flat_settings(settings))
        checks = {pupil: pupil.checks() for pupil in self.pupils}
        first = min(pupil.first for pupil in self.pupils)
        self.watcher.begin(_title("training", len(self.pupils)), settings.steps, first)
        losses: dict[Pupil, list[Tensor]] = {pupil: [] for pupil in self.pupils}
        with DeferredInterrupt() as interrupt:
            for done in range(first + 1, settings.steps + 1):
                # Of runs that were interrupted at different steps the others wait.
                pupils = [pupil for pupil in self.pupils if pupil.first < done]
                for pupil, loss in zip(pupils, self._step(pupils, done - 1), strict=True):
                    losses[pupil].append(loss)
                last, stops = done == settings.steps, self._asked_by_any(interrupt)
                validates = bool(settings.validate_every) and (last or done % settings.validate_every == 0)
                saves = last or stops or done % settings.save_every == 0
                figures: dict[str, float] = {}
                if saves or validates or done % _LOG_EVERY == 0:
                    speed = (done - first) / (time.monotonic() - begun)
                    shared = {"steps_per_second": speed, "memory_mb": peak_memory_mb(self.device)}
                    found = []
                    for pupil in pupils:
                        own = {"loss": pupil.report(losses[pupil], done), "rate": pupil.rate}
                        losses[pupil] = []
                        if validates:
                            own["validation_loss"] = self._validate(pupil, checks[pupil], done)
                        found.append(own)
                        pupil.write_metrics(done, {**own, **shared})
                    figures = {name: sum(own[name] for own in found) / len(found) for name in found[0]} | shared
                    self.accelerator.log(figures, step=done)
                if saves:
                    for pupil in pupils:
                        pupil.save(done)
                self.watcher.advance(done, figures)
                if stops:
                    raise KeyboardInterrupt
                if main and settings.preview_every and done % settings.preview_every == 0:
                    self._preview(pupils, done)
        self.watcher.end()

    def _asked_by_any(self, interrupt: DeferredInterrupt) -> bool:
        """Tell whether any process heard Ctrl-C: they must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return interrupt.requested
        asked = torch.tensor(float(interrupt.requested), device=self.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _step(self, pupils: Sequence[Pupil], step: int) -> list[Tensor]:
        """Do one optimizer step of each pupil and return their mean losses, on the device."""
        accelerator, parts = self.accelerator, self.settings.accumulate
        totals = [torch.zeros((), device=self.device) for _ in pupils]
        for part in range(parts):
            batches = [(pupil, pupil.draw(step, part), pupil.prepared.data) for pupil in pupils]
            with contextlib.ExitStack() as waiting:
                if part + 1 < parts:
                    for pupil in pupils:
                        waiting.enter_context(accelerator.no_sync(pupil.model))
                means = [losses.mean() / parts for losses in self._losses(batches)]
                scaled = [pupil.scaler.scale(mean) for pupil, mean in zip(pupils, means, strict=True)]
                # No sum of one: it would be another number in half precision.
                accelerator.backward(scaled[0] if len(scaled) == 1 else torch.stack(scaled).sum())
            totals = [total + mean.detach() for total, mean in zip(totals, means, strict=True)]
        for pupil in pupils:
            pupil.learn(step)
        return totals

    def _losses(self, parts: Sequence[tuple[Pupil, Batch, FrozenData]]) -> list[Tensor]:
        """Return the losses of some pupils' batches, [B] each, of one pass through the denoiser."""
        states: dict[str, list[Tensor]] = {stream: [] for stream in self.model.readers}
        pooled: dict[str, list[Tensor]] = {}
        deltas: dict[str, list[Delta]] = {stream: [] for stream in states}
        before = 0
        for pupil, batch, data in parts:
            rows = batch.texts
            frozen = {
                stream: (
                    texts.states[rows].to(self.device),
                    texts.ids[rows],
                    None if texts.lengths is None else texts.lengths[rows],
                )
                for stream, texts in data.texts.items()
            }
            for stream, delta in pupil.model(frozen).items():
                text = data.texts[stream]
                if text.pooled is not None:
                    pooled.setdefault(stream, []).append(text.pooled[rows].to(self.device))
                own = frozen[stream][0]
                states[stream].append(add_delta(own, delta) if self.reader is None else own)
                if delta is not None:
                    deltas[stream].append(replace(delta, row=delta.row + before))
            before += len(rows)
        conditions = self.model.conditioner(_join(states), _join(pooled))
        batches = [batch for _, batch, _ in parts]
        latents, noise, times = (
            torch.cat([getattr(batch, name) for batch in batches]).to(self.device)
            for name in ("latents", "noise", "times")
        )
        with contextlib.ExitStack() as reading:
            if self.reader is not None:
                reading.enter_context(self.reader.given({name: _join_deltas(each) for name, each in deltas.items()}))
            losses = self.objective.losses(latents, noise, times, conditions)
        return list(torch.split(losses, [len(batch.texts) for batch in batches]))

    @torch.no_grad()
    def _validate(self, pupil: Pupil, batches: Sequence[Batch], step: int) -> float:
        """Return a pupil's loss on its fixed batches."""
        visited = {name: stream.visited.clone() for name, stream in pupil.streams.items()}  # looking is not learning
        parts = [self._losses([(pupil, batch, pupil.prepared.unseen)]) for batch in batches]
        for name, stream in pupil.streams.items():
            stream.visited = visited[name]
        loss = float(torch.cat(list(chain.from_iterable(parts))).mean())
        pupil.validated(loss, step)
        return loss

    def _preview(self, pupils: Sequence[Pupil], step: int) -> None:
        """Draw with the present vectors, by the code that generation uses."""
        self.placement.bring_back()
        detach_sites(self._denoiser)
        for pupil in pupils:
            prompts = pupil.settings.preview_prompts or (pupil.settings.trigger,)
            folder = pupil.folder / PREVIEWS
            make_folder(folder)
            load_engram(self.pipeline, pupil.prepared.adapter(pupil.settings, step), name="preview")
            try:
                self.medium.preview(prompts, pupil.settings, self.pipeline, folder, step)
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
        """Let the denoiser's blocks read what the concepts in training add for each."""
        if self.reader is not None:
            attach_sites(self.settings.family, self._denoiser, self.reader)


def _join(parts: dict[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}


def _join_deltas(deltas: Sequence[Delta]) -> Delta | None:
    if len(deltas) < 2:
        return deltas[0] if deltas else None
    return Delta(
        **{name: torch.cat([getattr(each, name) for each in deltas]) for name in ("row", "position", "values")}
    )


def _title(work: str, count: int) -> str:
    return work if count == 1 else f"{work} {count} concepts"
