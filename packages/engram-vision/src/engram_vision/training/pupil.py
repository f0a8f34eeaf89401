"""One concept in training: what of a run is its own, whatever else learns beside it.

Concepts do not touch: each has its own data, vectors, optimizer, rates and files, and what one learns in a pass through
the denoiser depends on its own samples alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tomli_w
import torch
from accelerate import Accelerator
from torch import Tensor

from engram_core import InputError, TrainingError, TrainReport, Watcher
from engram_core.container import open_target, write_all
from engram_core.errors import one_line
from engram_core.settings import dump_settings
from engram_core.training.metrics import MetricsFile
from engram_core.training.schedule import rate_factor
from engram_vision.generation import make_folder
from engram_vision.settings import TrainSettings
from engram_vision.training.batches import Batch, draw_batch, fixed_batches
from engram_vision.training.checks import METRICS, SETTINGS, STATE, run_folder
from engram_vision.training.objectives import Objective
from engram_vision.training.preparation import Prepared
from engram_vision.training.state import Progress, load_state, restore_optimizer, save_state

__all__ = ["Pupil", "flat_settings"]


@dataclass(frozen=True, slots=True, eq=False)
class _Best:
    step: int
    loss: float
    values: Mapping[str, Tensor]


class Pupil:
    """One concept, from its first step to its adapter."""

    def __init__(
        self,
        settings: TrainSettings,
        prepared: Prepared,
        objective: Objective,
        accelerator: Accelerator,
        watcher: Watcher,
        *,
        resume: bool,
    ) -> None:
        """Make the optimizer, and go on where an interrupted run stopped.

        Args:
            settings: of the concept.
            prepared: its data and first values.
            objective: for the times of its batches.
            accelerator: of the run.
            watcher: told when there was nothing to go on from.
            resume: whether to go on.

        Raises:
            InputError: the state does not fit.
        """
        self.settings, self.prepared, self.folder = settings, prepared, run_folder(settings)
        self._objective, self._accelerator = objective, accelerator
        self.streams = prepared.streams
        groups = [
            {"params": [stream.vectors for stream in self.streams.values()], "peak": settings.vector_rate},
            {"params": [stream.scales for stream in self.streams.values()], "peak": settings.scale_rate},
        ]
        self._optimizer = torch.optim.AdamW(groups, weight_decay=settings.weight_decay)
        self.model = accelerator.prepare(prepared.concept)
        self.scaler = torch.amp.GradScaler(accelerator.device.type, enabled=settings.precision == "fp16")
        self.identity = prepared.describe(settings)
        self.first, self._best = 0, _Best(0, math.inf, {})
        self._metrics: MetricsFile | None = None
        self.loss = math.nan
        if resume:
            self._resume(watcher)

    def open_folder(self) -> None:
        """Make the run's folder, write the settings, and begin or continue the metrics."""
        make_folder(self.folder)
        if not self.first:
            (self.folder / STATE).unlink(missing_ok=True)  # of a run that is begun anew
        values = {"train": {"backbone": self.settings.family.name, **dump_settings(self.settings)}}
        with open_target(self.folder / SETTINGS, overwrite=True) as file:
            write_all(file, memoryview(tomli_w.dumps(values).encode()))
        self._metrics = MetricsFile(self.folder / METRICS, after_step=self.first)
        self.loss = self._metrics.loss

    def checks(self) -> Sequence[Batch]:
        """Return the batches that validation measures the loss on; none where it never does."""
        settings = self.settings
        if not settings.validate_every:
            return ()
        return fixed_batches(
            self.prepared.unseen,
            self._objective,
            draws=settings.validation_draws,
            size=settings.batch_size,
            seed=settings.seed,
        )

    def draw(self, step: int, part: int) -> Batch:
        """Return what this process learns from in one part of a step."""
        settings, accelerator = self.settings, self._accelerator
        return draw_batch(
            self.prepared.data,
            self._objective,
            size=settings.batch_size * accelerator.num_processes,
            number=step * settings.accumulate + part,
            seed=settings.seed,
        ).part(accelerator.process_index * settings.batch_size, settings.batch_size)

    @property
    def rate(self) -> float:
        """The present learning rate of the vectors."""
        return float(self._optimizer.param_groups[0]["lr"])

    def learn(self, step: int) -> None:
        """Do an optimizer step with the gradients that have come together."""
        settings = self.settings
        factor = rate_factor(step, steps=settings.steps, warm_up=settings.warm_up, schedule=settings.schedule)
        self.scaler.unscale_(self._optimizer)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak"] * factor
            for parameter in group["params"] if settings.max_grad_norm else ():
                torch.nn.utils.clip_grad_norm_(parameter, settings.max_grad_norm)
        self.scaler.step(self._optimizer)
        self.scaler.update()
        self._optimizer.zero_grad()

    def report(self, losses: Sequence[Tensor], step: int) -> float:
        """Return the mean of some steps' losses over all processes, and keep it.

        Raises:
            TrainingError: it is not finite, or the vectors are not.
        """
        mean = float(self._accelerator.gather(torch.stack(list(losses)).mean()).float().mean())
        finite = all(bool(value.isfinite().all()) for value in self.values().values())
        if not (math.isfinite(mean) and finite):
            raise self._error(step, f"the loss is {mean:g}{'' if finite else ' and the vectors are not finite'}")
        self.loss = mean
        return mean

    def validated(self, loss: float, step: int) -> None:
        """Hear the loss of a validation, and remember the values if it is the lowest so far.

        Raises:
            TrainingError: it is not finite.
        """
        if not math.isfinite(loss):
            raise self._error(step, f"the validation loss is {loss:g}")
        if loss < self._best.loss:
            self._best = _Best(step, loss, self.values())

    def write_metrics(self, step: int, figures: Mapping[str, float]) -> None:
        """Write a line of metrics."""
        if self._metrics is not None:
            self._metrics.write(step, figures)

    def values(self) -> dict[str, Tensor]:
        """Return copies of vectors and scales, by name."""
        return {name: value.detach().cpu().clone() for name, value in self.prepared.concept.state_dict().items()}

    def save(self, step: int) -> None:
        """Write the state from which the run can go on."""
        accelerator = self._accelerator
        if accelerator.num_processes > 1:  # every process showed other captions
            for stream in self.streams.values():
                seen = accelerator.reduce(stream.visited.float().to(accelerator.device), "sum")
                stream.visited = seen.cpu() > 0
        if accelerator.is_main_process:
            save_state(
                self.folder / STATE,
                Progress(step=step, best_step=self._best.step, best_loss=self._best.loss, run=self.identity),
                self.values(),
                self._best.values,
                {name: stream.visited for name, stream in self.streams.items()},
                self._optimizer,
            )

    def finish(self, seconds: float) -> TrainReport:
        """Write the adapter."""
        settings = self.settings
        step, loss = settings.steps, self.loss
        if settings.keep == "best" and self._best.values:
            step, loss = self._best.step, self._best.loss
            self.prepared.concept.load_state_dict(dict(self._best.values))
        adapter = self.prepared.adapter(settings, step)
        if self._accelerator.is_main_process:
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
            seconds=seconds,
            entries={name: len(table.concept) for name, table in adapter.streams.items()},
        )

    def _error(self, step: int, fact: str) -> TrainingError:
        state = self.folder / STATE
        kept = f"{state} keeps the last good state" if state.is_file() else "no state was saved before"
        remedy = f"begin anew with --force and a vector_rate below {self.settings.vector_rate:g}, or in precision fp32"
        return TrainingError(f"step {step}: {fact}; {kept}; {remedy}")

    def _resume(self, watcher: Watcher) -> None:
        state = self.folder / STATE
        if not state.is_file() and (self.folder / SETTINGS).is_file():
            watcher.note(f"{self.folder}: the run was stopped before its first state; it begins at step 0")
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
            restore_optimizer(self._optimizer, groups["optimizer"])
            for name, stream in self.streams.items():
                stream.visited[:] = groups["visited"][name]
        except (RuntimeError, ValueError, KeyError) as error:
            reason = one_line(error)
            raise InputError(f"{state}: does not fit the run: {reason}; begin anew with --force") from None
        self.first = progress.step
        self._best = _Best(progress.best_step, progress.best_loss, groups["best"])


def flat_settings(settings: Any) -> dict[str, Any]:
    """Return settings as trackers take them."""
    values = dump_settings(settings)
    return {name: ", ".join(value) if isinstance(value, list) else value for name, value in values.items()}
