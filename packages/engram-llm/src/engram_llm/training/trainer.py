"""A run: its folder, its beginning or continuation, its steps, and what it leaves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import tomli_w
import torch
from accelerate.utils import broadcast_object_list  # type: ignore[import-untyped]
from transformers import TrainingArguments

from engram_core import AdapterWriteError, InputError, TargetExistsError, TrainReport, Watcher
from engram_core.container import open_target, write_all
from engram_core.settings import dump_settings
from engram_core.training.checks import check_run_folder, check_tracker
from engram_core.training.interrupt import DeferredInterrupt
from engram_core.training.metrics import MetricsFile
from engram_llm.models import pick_device
from engram_llm.quiet import quiet_libraries
from engram_llm.settings import TrainSettings
from engram_llm.training.checkpoints import (
    capture_random,
    checkpoint_folder,
    drop_checkpoints,
    list_checkpoints,
    load_state,
    restore_random,
)
from engram_llm.training.course import Course
from engram_llm.training.engine import MemoryTrainer
from engram_llm.training.preparation import BACKBONE, Prepared, check_model, prepare
from engram_llm.training.results import check_outputs, write_outputs

__all__ = ["METRICS", "SETTINGS", "train"]

METRICS = "metrics.jsonl"
SETTINGS = "settings.toml"


def train(
    settings: TrainSettings, *, resume: bool = False, overwrite: bool = False, watcher: Watcher | None = None
) -> TrainReport:
    """Train a memory, LoRA, or both for a language model, and write them.

    Args:
        settings: what to do.
        resume: go on with an interrupted run; on the CPU what it writes is bit for bit that of an uninterrupted one.
        overwrite: replace the output, and begin anew in a run folder that is in use.
        watcher: hears how it goes.

    Raises:
        InputError: data, model or settings cannot be used.
        TargetExistsError: the output or a run exists, and neither `resume` nor `overwrite` was asked for.
        TrainingError: the loss became NaN or infinite; the last good checkpoint is kept.
        AdapterWriteError: something cannot be written, e.g. because the disk is full; the last checkpoint is kept.
        KeyboardInterrupt: after a checkpoint was saved.
    """
    started, watcher = time.monotonic(), watcher or Watcher()
    folder = settings.run_dir or settings.output.with_suffix(".run")
    check_tracker(settings.tracker)
    check_run_folder(folder)
    check_outputs(settings, is_allowed=resume or overwrite)
    if list_checkpoints(folder) and not (resume or overwrite):
        raise TargetExistsError(
            f"{folder}: holds a run; pass --resume to go on with it, --force to begin anew, or another --run-dir"
        )
    device = pick_device(settings.device, settings.precision)
    check_model(settings)
    randoms = capture_random()  # the Trainer sets the seeds of the whole process
    prepared: Prepared | None = None
    try:
        args = _arguments(settings, folder, device)
        prepared = prepare(settings, args.device, args.world_size, watcher)
        return _Run(prepared, args, folder, watcher, started, resume=resume).train()
    finally:
        if prepared is not None:
            prepared.learned.remove()
        restore_random(randoms)


class _Run:
    """One call of `train`, after everything is loaded."""

    def __init__(
        self,
        prepared: Prepared,
        args: TrainingArguments,
        folder: Path,
        watcher: Watcher,
        started: float,
        *,
        resume: bool,
    ) -> None:
        self.prepared, self.settings, self.args = prepared, prepared.settings, args
        self.folder, self.watcher, self.started = folder, watcher, started
        self.interrupt = DeferredInterrupt()
        self.course = Course(
            self.settings,
            prepared.learned,
            folder,
            watcher,
            self.interrupt,
            evaluates=prepared.unseen is not None,
        )
        self.checkpoint: Path | None = None
        self.step = 0
        if resume:
            self._find_checkpoint()
        if args.should_save:
            _make_folder(folder)
        with quiet_libraries():
            self.trainer = MemoryTrainer(
                self.settings,
                prepared.learned,
                self.course,
                args,
                samples=prepared.samples,
                unseen=prepared.unseen,
                collator=prepared.collator,
                manifest=prepared.manifest,
                record=prepared.record(),
                run=prepared.run,
                sparse=prepared.sparse,
            )

    def train(self) -> TrainReport:
        """Do the steps that are left and write what was learned."""
        try:
            if self.args.should_save:
                self._open_folder()
            if not self.course.ended:
                self._do_steps()
            return self._finish()
        finally:
            self.trainer.accelerator.end_training()

    def _do_steps(self) -> None:
        self.watcher.begin("training", self.settings.steps, self.step)
        with self.interrupt, quiet_libraries():
            self.trainer.train(resume_from_checkpoint=None if self.checkpoint is None else str(self.checkpoint))
        self.step = self.trainer.state.global_step
        if self.course.stopped:
            raise KeyboardInterrupt
        self.watcher.end()

    def _find_checkpoint(self) -> None:
        """Find the newest checkpoint, and refuse it if the run has changed since."""
        checkpoints = list_checkpoints(self.folder)
        if not checkpoints:
            if not (self.folder / SETTINGS).is_file():
                raise InputError(f"{self.folder}: holds no run; there is nothing to resume, leave --resume out")
            self.watcher.note(f"{self.folder}: the run was stopped before its first checkpoint; it begins at step 0")
            return
        self.step = max(checkpoints)
        self.checkpoint = checkpoints[self.step]
        progress = load_state(self.checkpoint).progress
        for name, value in self.prepared.run.items():
            if progress.run.get(name) != value:
                raise InputError(
                    f"{self.checkpoint}: {name} was {progress.run.get(name)} when the run was begun and is {value} "
                    f"now; use {self.folder / SETTINGS}, or begin anew with --force"
                )
        best = checkpoint_folder(self.folder, progress.best_step)
        if self.settings.keep == "best" and progress.best_step and not best.is_dir():
            raise InputError(f"{best}: is missing, and holds the best weights; go on with --keep last, or begin anew")
        self.course.go_on(progress)

    def _open_folder(self) -> None:
        """Write the settings, remove what an earlier run left, and begin or continue the metrics."""
        if self.checkpoint is None:
            drop_checkpoints(self.folder, newest=0)
        values = {"train": {"backbone": BACKBONE, **dump_settings(self.settings)}}
        with open_target(self.folder / SETTINGS, overwrite=True) as file:
            write_all(file, memoryview(tomli_w.dumps(values).encode()))
        self.course.open(MetricsFile(self.folder / METRICS, after_step=self.step))

    def _finish(self) -> TrainReport:
        settings, course, prepared = self.settings, self.course, self.prepared
        kept, loss = self.step, course.last_loss if prepared.unseen is not None else course.mean
        if settings.keep == "best" and course.best_step:
            kept, loss = course.best_step, course.best_loss
        kept_checkpoint = checkpoint_folder(self.folder, kept)
        prepared.learned.load(kept_checkpoint)
        figures: dict[str, Any] = {"kept_step": kept, "steps_done": self.step, "tokens": int(course.tokens)}
        figures["processes"] = self.args.world_size
        if prepared.unseen is not None:  # a mean over the last training steps would depend on where they began
            figures["validation_loss"] = loss
        written: list[Any] = [None]
        if self.args.should_save:
            written = [write_outputs(prepared, figures)]
        if self.args.world_size > 1:
            broadcast_object_list(written)
        identity, n_bytes = written[0]
        return TrainReport(
            output=settings.output,
            run_dir=self.folder,
            identity=identity,
            n_bytes=n_bytes,
            steps=self.step,
            kept_step=kept,
            loss=loss,
            seconds=time.monotonic() - self.started,
            entries=prepared.learned.rows(),
            contents=prepared.learned.describe(),
        )


def _arguments(settings: TrainSettings, folder: Path, device: torch.device) -> TrainingArguments:
    """Return the Trainer's arguments; making them finds the other processes, if there are any."""
    for name in ("DEEPSPEED", "FSDP"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise InputError(
                f"accelerate is set up for {name}; a frozen model with a small part that learns needs plain data "
                "parallelism: accelerate launch --multi_gpu"
            )
    with quiet_libraries():
        args = TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.accumulate,
            max_grad_norm=settings.max_grad_norm,
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=device.type == "cpu",
            # The course decides when.
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            logging_nan_inf_filter=False,
            report_to=[] if settings.tracker == "none" else [settings.tracker],
            run_name=settings.name or settings.output.stem,
            disable_tqdm=True,
            log_level="critical",
            log_level_replica="critical",
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=device.type == "cuda",
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,
        )
    # Whatever a user's accelerate configuration says of other scripts.
    args.mixed_precision = "no"
    if args.n_gpu > 1:
        args._n_gpu = 1  # else the Trainer would copy the model to each GPU in every step
    if args.device.type != device.type:
        raise InputError(f"this Python process works on {args.device.type} already; start another for {device.type}")
    return args


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{folder}: cannot be created: {error.strerror}; pass another --run-dir") from None
