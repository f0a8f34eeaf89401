"""transformers' Trainer for what learns here: sparse gradients, token-weighted validation, whole checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback, Trainer, TrainingArguments

from engram_core import InputError, Manifest, MemoryRecord
from engram_core.training.schedule import rate_factor
from engram_llm.data import Collator, Samples
from engram_llm.settings import TrainSettings
from engram_llm.training.checkpoints import (
    State,
    capture_random,
    drop_checkpoints,
    load_state,
    new_checkpoint,
    restore_random,
    save_state,
)
from engram_llm.training.course import Course
from engram_llm.training.learned import Learned
from engram_llm.training.loss import make_batches, sum_losses, token_loss
from engram_llm.training.optimizer import clip_gradients, make_optimizer, optimizer_tensors, restore_optimizer

__all__ = ["MemoryTrainer"]

_TRAINER_STATE = "trainer_state.json"


class MemoryTrainer(Trainer):  # type: ignore[misc]
    """Trains a memory, LoRA, or both, and leaves steering to a `Course`."""

    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        settings: TrainSettings,
        learned: Learned,
        course: Course,
        args: TrainingArguments,
        *,
        samples: Samples,
        unseen: Samples | None,
        collator: Collator,
        manifest: Manifest,
        record: MemoryRecord | None,
        run: Mapping[str, str],
        sparse: bool,
    ) -> None:
        """Make a trainer; the model moves to the device.

        Args:
            settings: of the run.
            learned: what learns.
            course: steers.
            args: of the Trainer.
            samples: to train on.
            unseen: to validate on.
            collator: makes batches.
            manifest: what a memory belongs to.
            record: what a memory says of itself; None where none learns.
            run: what must not change when the run goes on.
            sparse: whether gradients of tables are sparse.
        """
        super().__init__(
            model=learned.model,
            args=args,
            data_collator=collator,
            train_dataset=samples,
            compute_loss_func=token_loss,
            callbacks=[course],
        )
        self.remove_callback(PrinterCallback)
        course.accelerator = self.accelerator
        self._settings, self._learned, self._course, self._folder = settings, learned, course, Path(args.output_dir)
        self._unseen, self._collator, self._sparse = unseen, collator, sparse
        self._manifest, self._record, self._run = manifest, record, run
        self._loaded: State | None = None

    # Steps

    def create_optimizer(self, model: Any = None) -> Optimizer:  # noqa: ARG002 - the Trainer's signature
        """Make the optimizer, once."""
        if self.optimizer is None:
            self.optimizer = make_optimizer(self._learned.parameters(), self._settings, sparse=self._sparse)
        optimizer: Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> Any:
        """Make the learning rates, once."""
        if self.lr_scheduler is None:
            factor = partial(
                rate_factor,
                steps=num_training_steps,
                warm_up=self._settings.warm_up,
                schedule=self._settings.schedule,
            )
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
        return self.lr_scheduler

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Return the batches of a step and how many tokens they teach in all processes, and count these."""
        batches, n_tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if n_tokens is not None:
            # Whole numbers: the Trainer's are float32, which cannot count far.
            self._course.tokens = self._course.tokens + torch.as_tensor(n_tokens).long()
        return batches, n_tokens

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:  # noqa: ARG002 - the Trainer's signature
        """Return nothing: counting would walk over the whole model in each step."""
        return 0

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        return clip_gradients(model.parameters(), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        return clip_gradients(model.parameters(), float("inf")) if grad_norm is None else grad_norm

    # Validation

    def evaluate(
        self,
        eval_dataset: Any = None,  # noqa: ARG002 - the Trainer's signature
        ignore_keys: list[str] | None = None,  # noqa: ARG002
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return the mean loss over all learned tokens of the validation set.

        Gates are as they are in use, also while training keeps them open: the figure is that of the file.
        """
        if self._unseen is None:
            raise InputError("there is nothing to validate on")
        size, processes = self._settings.batch_size, self.accelerator.num_processes
        batches = make_batches(
            self._unseen, self._collator, size, process=self.accelerator.process_index, processes=processes
        )
        with self._learned.in_use():
            total, count = sum_losses(self.model, batches)
        if processes > 1:
            both = torch.tensor([total, count], dtype=torch.float64, device=self.args.device)
            total, count = self.accelerator.reduce(both, "sum").tolist()
        metrics = {f"{metric_key_prefix}_loss": total / count}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:  # noqa: ARG002 - the Trainer's signature
        step = self.state.global_step
        self._course.check_finite(step)
        randoms = gather_object([capture_random()])
        if self.args.should_save:
            self.state.log_history.clear()  # the metrics file has it
            with new_checkpoint(self._folder, step) as folder:
                self._learned.save(folder, self._manifest, self._record)
                self.state.save_to_json(str(folder / _TRAINER_STATE))
                state = State(
                    progress=self._course.progress(step, self._run),
                    moments=optimizer_tensors(self.optimizer),
                    scheduler=self.lr_scheduler.state_dict(),
                    randoms=randoms,
                )
                save_state(folder, state)
            drop_checkpoints(self._folder, keep=[self._course.best_step])
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        self._learned.load(Path(resume_from_checkpoint))
        self._loaded = load_state(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._loaded is None:
            return
        try:
            restore_optimizer(self.optimizer, self._loaded.moments)
            self.lr_scheduler.load_state_dict(dict(self._loaded.scheduler))
            rates = self.lr_scheduler.get_last_lr()
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        except (ValueError, KeyError) as error:
            raise InputError(f"{checkpoint}: does not fit the run: {error}; begin anew with --force") from None

    def _load_rng_state(self, checkpoint: str | None) -> None:  # noqa: ARG002 - the Trainer's signature
        if self._loaded is not None:
            restore_random(self._loaded.randoms[self.args.process_index])
