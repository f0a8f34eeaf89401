"""Tasks of lm-evaluation-harness, an optional extra, on a model with memories or without."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from engram_core import InputError
from engram_core.errors import one_line
from engram_llm.quiet import quiet_libraries
from engram_llm.selection import beyond_vocabulary

__all__ = ["TaskFigure", "check_harness", "check_tasks", "run_tasks"]

_EXTRA = "evaluation"


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskFigure:
    """One figure of a task.

    Attributes:
        task: of the task or group of tasks.
        metric: with its filter where that is not the usual one.
        value: the figure.
        error: its standard error, when known.
        higher_is_better: None when unknown.
        n_samples: samples it was measured on; None when unknown.
    """

    task: str
    metric: str
    value: float
    error: float | None
    higher_is_better: bool | None
    n_samples: int | None


def check_harness() -> None:
    """Refuse to go on without the library.

    Raises:
        InputError: it is not installed.
    """
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise InputError(
            "tasks need lm-evaluation-harness, which is not installed; in a checkout of engram's repository run "
            f"`uv sync --all-packages --extra {_EXTRA}`, or install lm-eval 0.4.9 or later"
        ) from None


def check_tasks(tasks: Sequence[str], folder: Path | None) -> None:
    """Refuse tasks that do not exist, before a model is loaded.

    Raises:
        InputError: naming the first that is unknown.
    """
    if folder is not None and not folder.is_dir():
        raise InputError(f"{folder}: is no folder with tasks")
    with _quiet():
        known = set(_manager(folder).all_tasks)
    for task in tasks:
        if task not in known:
            near = difflib.get_close_matches(task, known, n=2, cutoff=0.7)
            hint = f"; did you mean {', '.join(near)}?" if near else ""
            raise InputError(f"lm-evaluation-harness has no task {task!r}{hint}; `lm-eval ls tasks` lists all")


def run_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 1,
) -> list[TaskFigure]:
    """Run tasks and return their figures.

    Args:
        model: a decoder language model; memories in it take part.
        tokenizer: its tokenizer.
        tasks: names that the harness knows.
        folder: with further tasks.
        limit: samples of each task at most.
        num_fewshot: examples before each sample; None means as the task says.
        batch_size: samples at once.

    Raises:
        InputError: a task fails, because its data cannot be had for example.
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    model.generation_config.suppress_tokens = beyond_vocabulary(model, tokenizer)
    with _quiet():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        try:
            results = simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                task_manager=_manager(folder),
                limit=limit,
                num_fewshot=num_fewshot,
                batch_size=batch_size,
                log_samples=False,
            )
        except Exception as error:
            reason = one_line(error, 300)
            raise InputError(
                f"tasks {', '.join(tasks)}: failed in lm-evaluation-harness: {type(error).__name__}: {reason}"
            ) from error
    return _read_figures(results)


@cache  # it reads thousands of files
def _manager(folder: Path | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=None if folder is None else str(folder))


def _read_figures(results: Any) -> list[TaskFigure]:
    figures = []
    samples: Mapping[str, Any] = results.get("n-samples") or {}
    better: Mapping[str, Any] = results.get("higher_is_better") or {}
    for task, found in results["results"].items():
        for name, value in found.items():
            metric, _, kind = name.partition(",")
            if not kind or metric.endswith("_stderr") or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue  # names, and errors that are no number
            error = found.get(f"{metric}_stderr,{kind}")
            counts = samples.get(task)
            figures.append(
                TaskFigure(
                    task=task,
                    metric=metric if kind == "none" else f"{metric} ({kind})",
                    value=float(value),
                    error=float(error) if isinstance(error, (int, float)) else None,
                    higher_is_better=(better.get(task) or {}).get(metric),
                    n_samples=counts.get("effective") if isinstance(counts, Mapping) else None,
                )
            )
    return figures


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness and the data library from talking; its bars stay, because tasks take long."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "lm-eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    try:
        with quiet_libraries():
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if before is None:  # the harness sets it for the whole process
            os.environ.pop("TOKENIZERS_PARALLELISM", None)
