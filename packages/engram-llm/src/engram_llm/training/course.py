"""The course of a run: when to measure, save and stop, how far gates are open, and what is told on the way."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState

from engram_core import TrainingError, Watcher
from engram_core.training.interrupt import DeferredInterrupt
from engram_core.training.metrics import MetricsFile
from engram_llm.settings import TrainSettings
from engram_llm.training.checkpoints import Progress, list_checkpoints
from engram_llm.training.learned import Learned

__all__ = ["Course", "gate_floor"]

_LOG_EVERY = 10
_SOFT_FLOOR = 0.1  # TinyEngram, engram.py


def gate_floor(step: int, settings: TrainSettings) -> float:
    """Return how far gates are open at least in a step, from 0: all the way, then a little, then as they are."""
    if step < settings.engram_warmup_steps:
        return 1.0
    if step < settings.engram_warmup_steps + settings.engram_soft_constraint_steps:
        return _SOFT_FLOOR
    return 0.0


class Course(TrainerCallback):  # type: ignore[misc]
    """Steers transformers' Trainer, which asks at every turn what to do.

    Attributes:
        best_step, best_loss, last_loss, waited, tokens, ended: see `Progress`.
        stopped: whether Ctrl-C ended this call before the run's end.
        mean: newest mean training loss.
        accelerator: what tells the processes of each other.
    """

    accelerator: Any

    def __init__(
        self,
        settings: TrainSettings,
        learned: Learned,
        folder: Path,
        watcher: Watcher,
        interrupt: DeferredInterrupt,
        *,
        evaluates: bool,
    ) -> None:
        """Begin at the first step.

        Args:
            settings: of the run.
            learned: what learns.
            folder: of the run.
            watcher: hears how it goes.
            interrupt: hears Ctrl-C.
            evaluates: whether there is something to validate on.
        """
        self._settings, self._learned, self._folder = settings, learned, folder
        self._watcher, self._interrupt, self._evaluates = watcher, interrupt, evaluates
        self._metrics: MetricsFile | None = None
        self._first, self._begun, self._told = 0, time.monotonic(), 0
        self._figures: dict[str, float] = {}
        self.best_step, self.best_loss, self.last_loss, self.waited = 0, math.inf, math.nan, 0
        self.tokens: Any = 0  # a tensor on the device while steps go on: looking at it would wait for them
        self.ended = self.stopped = False
        self.mean = math.nan

    def go_on(self, progress: Progress) -> None:
        """Take over where a run stood."""
        self._first = self._told = progress.step
        self.best_step, self.best_loss = progress.best_step, progress.best_loss
        self.last_loss, self.waited, self.tokens = progress.last_loss, progress.waited, progress.tokens
        self.ended = progress.ended

    def open(self, metrics: MetricsFile | None) -> None:
        """Begin to write figures, to a file where this process writes one."""
        self._metrics, self._begun = metrics, time.monotonic()
        if metrics is not None:
            self.mean = metrics.loss

    def progress(self, step: int, run: Mapping[str, str]) -> Progress:
        """Return where the run stands."""
        return Progress(
            step=step,
            best_step=self.best_step,
            best_loss=self.best_loss,
            last_loss=self.last_loss,
            waited=self.waited,
            tokens=int(self.tokens),
            ended=self.ended,
            run=run,
        )

    # What the Trainer calls

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Tell of the step before, and open the gates as far as this one needs."""
        self._tell(state.global_step)
        self._learned.set_gate_floor(gate_floor(state.global_step, self._settings))

    def on_step_end(
        self,
        args: Any,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        **_: Any,
    ) -> TrainerControl:
        """Decide what happens after a step."""
        step, settings = state.global_step, self._settings
        last = step >= settings.steps
        self.ended = last
        self.stopped = self._asked_by_any()
        control.should_evaluate = self._evaluates and (last or step % settings.evaluate_every == 0)
        control.should_save = last or self.stopped or step % settings.save_every == 0
        control.should_log = control.should_evaluate or control.should_save or step % _LOG_EVERY == 0
        control.should_training_stop = last or self.stopped
        return control

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Keep the figures of the steps since the last ones."""
        if not logs or "loss" not in logs:
            return
        loss = logs["loss"]
        if not math.isfinite(loss):
            raise self._error(state.global_step, f"the loss is {loss:g}")
        self.mean = loss
        seconds = time.monotonic() - self._begun
        self._figures |= {
            "loss": loss,
            "rate": logs["learning_rate"],
            "gradient_norm": logs["grad_norm"],
            "steps_per_second": (state.global_step - self._first) / max(seconds, 1e-9),
            "memory_mb": _peak_memory_mb(args.device),
        }
        if not control.should_evaluate:
            self._write(state.global_step)

    def on_evaluate(
        self,
        args: Any,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **_: Any,
    ) -> TrainerControl:
        """Compare a validation with the best one, and end the run when none is better for long."""
        step, loss = state.global_step, (metrics or {})["eval_loss"]
        if not math.isfinite(loss):
            raise self._error(step, f"the validation loss is {loss:g}")
        self.last_loss = self._figures["validation_loss"] = loss
        self._write(step)
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.waited = step, loss, 0
            # The best weights are those of its checkpoint.
            control.should_save |= self._settings.keep == "best"
        else:
            self.waited += 1
        if self._settings.patience and self.waited >= self._settings.patience and not self.ended:
            self.ended = control.should_save = control.should_training_stop = True
            self._watcher.note(
                f"step {step}: no validation was better than that of step {self.best_step} ({self.best_loss:.4g}) for "
                f"{self.waited} validations; training ends here"
            )
        return control

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """Tell of the last step."""
        self._tell(state.global_step)

    def check_finite(self, step: int) -> None:
        """Raise TrainingError unless every value that learns is a number."""
        if not self._learned.is_finite():
            raise self._error(step, "weights are not finite")

    def _asked_by_any(self) -> bool:
        """Tell whether any process heard Ctrl-C: they must stop at the same step."""
        if self.accelerator.num_processes == 1:
            return self._interrupt.requested
        asked = torch.tensor(float(self._interrupt.requested), device=self.accelerator.device)
        return bool(self.accelerator.reduce(asked, "sum") > 0)

    def _write(self, step: int) -> None:
        if self._metrics is not None:
            self._metrics.write(step, self._figures)

    def _tell(self, step: int) -> None:
        if step > self._told:
            self._told, figures, self._figures = step, self._figures, {}
            self._watcher.advance(step, figures)

    def _error(self, step: int, fact: str) -> TrainingError:
        checkpoints = list_checkpoints(self._folder)
        kept = f"{checkpoints[max(checkpoints)]} is the last good state" if checkpoints else "no state was saved before"
        rates = f"learning_rate below {self._settings.learning_rate:g}"
        return TrainingError(f"step {step}: {fact}; {kept}; begin anew with --force and a {rates}")


def _peak_memory_mb(device: torch.device) -> float:
    """Return the peak memory of this process on a device, in megabytes; 0 where that is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "win32":
        return 0.0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3
