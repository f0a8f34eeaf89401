"""`engram eval` for language models: perplexity of texts and tasks of lm-evaluation-harness, base against engram."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_core import EvaluateReport, InputError, Measure, TargetExistsError, Watcher
from engram_core.container import open_target, write_all
from engram_core.errors import one_line
from engram_llm.harness import TaskFigure, check_harness, check_tasks, run_tasks
from engram_llm.models import load_config, load_model, load_tokenizer, pick_device
from engram_llm.perplexity import Window, encode_document, measure_nats, plan_windows
from engram_llm.quiet import quiet_libraries
from engram_llm.selection import check_models, load_selected, select_memories, without_memories
from engram_llm.settings import EvaluateSettings
from engram_llm.texts import read_texts

__all__ = ["evaluate"]

_LONGEST_WINDOW = 1024  # logits of longer ones take much memory
_LORA_CONFIG = "adapter_config.json"


def evaluate(settings: EvaluateSettings, *, overwrite: bool = False, watcher: Watcher | None = None) -> EvaluateReport:
    """Measure the base model and the model with memories on the same texts and tasks.

    Args:
        settings: what to measure on.
        overwrite: replace the output file.
        watcher: hears how it goes.

    Raises:
        InputError: a text, a task, strengths or the model cannot be used, or the harness is not installed.
        IncompatibleAdaptersError: a memory was made for another model.
        AdapterReadError, AdapterFormatError: a file cannot be used.
        AdapterWriteError: the output cannot be written; TargetExistsError: it exists and `overwrite` is false.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    output = settings.output
    if output is not None and output.exists() and not overwrite:
        raise TargetExistsError(f"{output}: exists; pass --force to replace, or another --output")
    if settings.tasks:
        check_harness()
        check_tasks(settings.tasks, settings.task_folder)
    selected = select_memories(settings.adapters, settings.strengths)
    if not settings.force_base:
        check_models(selected, settings.model)
    device = pick_device(settings.device, settings.precision)
    tokenizer = load_tokenizer(settings.model)
    if settings.lora is not None and not (settings.lora / _LORA_CONFIG).is_file():
        raise InputError(f"{settings.lora}: is no folder of a PEFT adapter; it has no {_LORA_CONFIG}")
    length, stride = _window(settings)
    texts = {str(place): _Text(place, settings, tokenizer, length, stride) for place in settings.texts}
    watcher.begin(f"loading {settings.model}")
    model = load_model(settings.model, settings.precision, device)
    if settings.lora is not None:
        model = _load_lora(model, settings.lora)
    load_selected(model, tokenizer, selected, host_tables=settings.host_tables, force=settings.force_base)
    watcher.end()

    chosen = _list_variants(settings)
    measures = [
        measure
        for name, text in texts.items()
        for measure in _measure_text(name, text, model, chosen, settings.batch_size, watcher)
    ]
    details: dict[str, Any] = {
        "model": settings.model,
        "precision": settings.precision,
        "window": length,
        "stride": stride,
        "lora": None if settings.lora is None else str(settings.lora),
        "texts": {name: text.count() for name, text in texts.items()},
    }
    if settings.tasks:
        figures = _measure_tasks(model, tokenizer, chosen, settings, watcher)
        measures += _join_figures(figures)
        details["tasks"] = {
            figure.task: {"samples": figure.n_samples} for figure in next(iter(figures.values())) if figure.n_samples
        }
        details |= {"limit": settings.limit, "num_fewshot": settings.num_fewshot}
    report = EvaluateReport(
        measures=tuple(measures),
        adapters=tuple(one.used for one in selected),
        details=details,
        output=output,
        seconds=time.monotonic() - started,
    )
    if output is not None:
        with open_target(output, overwrite=overwrite) as file:
            text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
            write_all(file, memoryview(text.encode("utf-8", "surrogatepass")))
    return report


@dataclass(frozen=True, slots=True, kw_only=True)
class _Variant:
    """What is in force while something is measured."""

    name: str
    memories: bool
    lora: bool

    @contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Let a model be this variant while the block runs."""
        with contextlib.ExitStack() as stack:
            if not self.lora and hasattr(model, "disable_adapter"):
                stack.enter_context(model.disable_adapter())
            stack.enter_context(without_memories(model, wanted=self.memories))
            yield


def _list_variants(settings: EvaluateSettings) -> list[_Variant]:
    lora, memories = settings.lora is not None, bool(settings.adapters)
    wanted = {
        "base": (settings.base, False, False),
        "lora": (lora, False, True),
        "engram": (memories, True, False),
        "both": (lora and memories, True, True),
    }
    return [
        _Variant(name=name, memories=has_memories, lora=has_lora)
        for name, (is_wanted, has_memories, has_lora) in wanted.items()
        if is_wanted
    ]


def _load_lora(model: Any, folder: Path) -> Any:
    from peft import PeftModel

    try:
        with quiet_libraries():
            return PeftModel.from_pretrained(model, str(folder)).eval()
    except Exception as error:
        reason = one_line(error, 300)
        raise InputError(f"{folder}: cannot be loaded as a PEFT adapter: {type(error).__name__}: {reason}") from error


class _Text:
    """The documents of one place, cut into windows."""

    def __init__(self, place: Any, settings: EvaluateSettings, tokenizer: Any, length: int, stride: int) -> None:
        texts = read_texts(place, settings.text_column, settings.limit)
        documents = [encode_document(text, tokenizer) for text in texts]
        scored = [document for document in documents if len(document.ids) > 1]
        if not scored:
            raise InputError(f"{place}: no document has two tokens; there is nothing to predict")
        self.n_documents, self.n_skipped = len(documents), len(documents) - len(scored)
        self.n_tokens = sum(len(document.ids) - 1 for document in scored)
        self.n_bytes = sum(document.n_bytes for document in scored)
        self.windows: list[Window] = [
            window for document in scored for window in plan_windows(document.ids, length, stride)
        ]

    def count(self) -> dict[str, int]:
        """Return how much there is."""
        return {
            "documents": self.n_documents,
            "skipped_documents": self.n_skipped,
            "tokens": self.n_tokens,
            "bytes": self.n_bytes,
            "windows": len(self.windows),
        }


def _window(settings: EvaluateSettings) -> tuple[int, int]:
    """Return length and stride of windows."""
    config = load_config(settings.model)
    positions = getattr(config, "max_position_embeddings", None) or _LONGEST_WINDOW
    length = settings.window or min(positions, _LONGEST_WINDOW)
    if length > positions:
        raise InputError(f"window is {length}, {settings.model} reads at most {positions} tokens")
    stride = settings.stride or max(1, length // 2)
    if stride >= length:
        raise InputError(f"stride is {stride}, expected less than the window, which is {length}")
    return length, stride


def _measure_text(
    name: str, text: _Text, model: Any, chosen: Sequence[_Variant], batch_size: int, watcher: Watcher
) -> list[Measure]:
    nats: dict[str, float] = {}
    watcher.begin(f"reading {name}", len(text.windows) * len(chosen))
    for number, variant in enumerate(chosen):
        before = number * len(text.windows)
        with variant.of(model):
            nats[variant.name] = measure_nats(
                model,
                text.windows,
                batch_size,
                lambda done, before=before: watcher.advance(before + done),  # type: ignore[misc]
            )
    watcher.end()
    per_token = {name: value / text.n_tokens for name, value in nats.items()}
    # A perplexity too great for a number is no reason to fail.
    perplexity = {name: math.exp(min(value, 700.0)) for name, value in per_token.items()}
    figures = {"nats per token": per_token, "perplexity": perplexity}
    if text.n_bytes:
        figures["nats per byte"] = {name: value / text.n_bytes for name, value in nats.items()}
    return [
        Measure(subject=name, metric=metric, values=values, higher_is_better=False)
        for metric, values in figures.items()
    ]


def _measure_tasks(
    model: Any, tokenizer: Any, chosen: Sequence[_Variant], settings: EvaluateSettings, watcher: Watcher
) -> dict[str, list[TaskFigure]]:
    figures = {}
    for variant in chosen:
        watcher.begin(f"{variant.name}: {', '.join(settings.tasks)}")
        with variant.of(model):
            figures[variant.name] = run_tasks(
                model,
                tokenizer,
                settings.tasks,
                folder=settings.task_folder,
                limit=settings.limit,
                num_fewshot=settings.num_fewshot,
                batch_size=settings.batch_size,
            )
    watcher.end()
    return figures


def _join_figures(figures: dict[str, list[TaskFigure]]) -> list[Measure]:
    """Return the figures of all variants side by side."""
    rows: dict[tuple[str, str], dict[str, TaskFigure]] = {}
    for variant, found in figures.items():
        for figure in found:
            rows.setdefault((figure.task, figure.metric), {})[variant] = figure
    return [
        Measure(
            subject=task,
            metric=metric,
            values={variant: figure.value for variant, figure in row.items()},
            higher_is_better=next(iter(row.values())).higher_is_better,
            errors={variant: figure.error for variant, figure in row.items() if figure.error is not None},
        )
        for (task, metric), row in rows.items()
    ]
