"""`engram eval` for what diffusers draws: base and engram under the same noise, or files on disk, and their figures."""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from engram_core import (
    Adapter,
    EvaluateReport,
    InputError,
    Measure,
    TargetExistsError,
    UsedAdapter,
    Watcher,
    open_adapter,
)
from engram_core.container import open_target, write_all
from engram_core.hub import find_adapter
from engram_core.settings import split_strength
from engram_vision import generation
from engram_vision.dataset import caption_with, contains_trigger
from engram_vision.drawing import Drawing
from engram_vision.evaluation.judges import Judges, load_judges
from engram_vision.evaluation.kind import PICTURES, Kind
from engram_vision.evaluation.lora import Lora
from engram_vision.evaluation.measures import CONTROLS, Figure, compare_bytes, list_spread, sum_up
from engram_vision.evaluation.plot import draw_plot
from engram_vision.evaluation.settings import EvaluateSettings
from engram_vision.evaluation.shown import Shown, name_variant
from engram_vision.features import Features
from engram_vision.generation import Canvas, make_folder, save_png
from engram_vision.models import pick_device

__all__ = ["FIGURES", "PLOT", "evaluate"]

FIGURES = "figures.json"
PLOT = "identity.png"

_DRAWN_WITH = ("model", "width", "height", "frames", "fps", "steps", "guidance", "negative", "precision", "without_t5")

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Measured:
    """Pictures or clips with their figures.

    Attributes:
        shown: what was measured, in order.
        figures: of each.
        curves: identity of each frame by variant.
    """

    shown: list[dict[str, Any]] = field(default_factory=list)
    figures: dict[str, list[list[Figure]]] = field(default_factory=lambda: defaultdict(list))
    curves: dict[str, list[Features]] = field(default_factory=lambda: defaultdict(list))


class _RecordingCanvas:
    """Draws as another canvas does, and keeps what is drawn as it is before it is encoded."""

    def __init__(self, canvas: Canvas, kind: Kind, *, writes: bool) -> None:
        self._canvas, self._kind, self._writes = canvas, kind, writes
        self.suffix, self.overview, self.compare = canvas.suffix, canvas.overview, canvas.compare
        self.shown: list[Shown] = []
        self.engrams: list[dict[str, Any]] = []

    def check(self, settings: Any) -> None:
        """Refuse what the other refuses."""
        self._canvas.check(settings)

    def draw(self, pipeline: Any, drawings: Sequence[Drawing], settings: Any) -> Sequence[Any]:
        return self._canvas.draw(pipeline, drawings, settings)

    def save(self, thing: Any, path: Path, facts: Mapping[str, str], *, overwrite: bool) -> None:
        variant = name_variant(facts)
        self.engrams = json.loads(facts["engrams"]) or self.engrams
        self.shown.append(
            Shown(
                variant=variant,
                prompt=facts["prompt"],
                seed=int(facts["seed"]),
                file=path if self._writes else None,
                read=lambda: self._kind.to_frames(thing),
            )
        )
        if self._writes:
            self._canvas.save(thing, path, facts, overwrite=overwrite)


def evaluate(
    settings: EvaluateSettings,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    kind: Kind = PICTURES,
) -> EvaluateReport:
    """Measure what the base model draws and what the model with adapters draws, or files on disk.

    Everything is measured on the frames as they were drawn, before they are encoded.

    Args:
        settings: what to measure, on what and with what.
        overwrite: replace files of the same names in the output folder.
        watcher: hears how it goes.
        kind: what the family draws.

    Raises:
        InputError: prompts, pictures, sizes or a model cannot be used, or a library is not installed.
        IncompatibleAdaptersError: an adapter was made for another model.
        ConflictError: the adapters contradict one another.
        AdapterReadError, AdapterFormatError: an adapter file cannot be used.
        AdapterWriteError: a file cannot be written; TargetExistsError: one exists and `overwrite` is false. Except
            when the disk gets full, nothing was drawn.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    _check_targets(settings, overwrite)
    kind.check(settings, watcher)
    device = pick_device(settings.device, settings.precision)
    adapters = [_open(text) for text in settings.adapters]
    triggers = [record.trigger for _, _, adapter in adapters for record in adapter.records()]
    _check_prompts(settings, triggers)
    lora = None if settings.lora is None else Lora(settings.lora)
    watcher.begin("loading what measures")
    judges = load_judges(settings, kind.judge_folder, watcher)
    canvas = None
    if settings.files:
        watcher.begin(f"reading {kind.name}")
        shown = kind.open(settings.files)
    prompts = [one.prompt for one in shown if one.prompt] if settings.files else settings.prompts
    read_as = {prompt: _describe(prompt, triggers, settings.described_as) for prompt in prompts}
    for sentence in judges.list_notes(list(read_as.values())):
        watcher.note(sentence)
    if not settings.files:
        canvas = _draw(settings, kind, lora, overwrite, watcher)
        shown = canvas.shown
    controls = [one for one in shown if one.prompt in settings.control_prompts]
    others = [one for one in shown if one.prompt not in settings.control_prompts]
    judges.to(device)
    measured = _measure(others, read_as, judges, lambda frames: kind.measure(frames, settings), watcher)
    measures = sum_up(measured.figures)
    failures: list[str] = []
    if controls:
        found, failures = _measure_locality(controls, judges, kind.name)
        measures += found
    if settings.files and not measures:
        raise InputError(
            f"{settings.files[0]}: nothing can be measured: there is no prompt in a file or in metadata.jsonl to "
            "compare with, and single pictures have no neighbours; give --image-model and --references"
        )
    report = EvaluateReport(
        measures=tuple(measures),
        adapters=tuple(_use(*one, canvas.engrams if canvas else []) for one in adapters),
        details=_detail(settings, measured, failures, canvas),
        output=None if settings.output is None else settings.output / FIGURES,
        seconds=time.monotonic() - started,
    )
    watcher.end()
    if settings.output is not None:
        _write(settings.output, report, measured, overwrite=overwrite)
    return report


def _open(text: str) -> tuple[str, float, Adapter]:
    file, factor = split_strength(text)
    return file, factor, open_adapter(find_adapter(file))


def _check_targets(settings: EvaluateSettings, overwrite: bool) -> None:
    for path in [] if settings.output is None or overwrite else [settings.output / FIGURES, settings.output / PLOT]:
        if path.exists():
            raise TargetExistsError(f"{path}: exists; pass --force to replace, or another --output")


def _check_prompts(settings: EvaluateSettings, triggers: Sequence[str]) -> None:
    """Refuse prompts that stand in the wrong list."""
    if not triggers:
        return
    known = ", ".join(repr(trigger) for trigger in dict.fromkeys(triggers))
    for prompt in settings.prompts:
        if not any(contains_trigger(prompt, trigger) for trigger in triggers):
            raise InputError(
                f"prompt {prompt!r} holds no trigger, so base and engram draw the same; put {known} into it, or "
                "make it a control prompt (--control-prompt)"
            )
    for prompt in settings.control_prompts:
        for trigger in triggers:
            if contains_trigger(prompt, trigger):
                raise InputError(
                    f"control prompt {prompt!r} holds the trigger {trigger!r}, which changes what is drawn, as it "
                    "should; take it out, or make it a prompt (--prompt)"
                )


def _draw(
    settings: EvaluateSettings, kind: Kind, lora: Lora | None, overwrite: bool, watcher: Watcher
) -> _RecordingCanvas:
    """Draw all prompts with all seeds, every variant in the same batches."""
    with ExitStack() as stack:
        writes = settings.output is not None
        values = {
            each.name: getattr(settings, each.name) for each in fields(settings.drawing) if hasattr(settings, each.name)
        }
        values |= {
            "output": settings.output or Path(stack.enter_context(tempfile.TemporaryDirectory())),
            "prompts": (*settings.prompts, *settings.control_prompts),
            "compare": settings.base and (bool(settings.adapters) or lora is not None),
            "grid": writes,
        }
        chosen = settings.drawing(**values)
        canvas = _RecordingCanvas(kind.canvas(chosen), kind, writes=writes)
        generation.generate(chosen, overwrite=overwrite, watcher=watcher, canvas=canvas, beside=lora)
    gc.collect()  # of the pipeline, whose room on the device is needed now
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return canvas


def _describe(prompt: str, triggers: Sequence[str], words: str | None) -> str:
    """Return a prompt as the model for texts shall read it."""
    if words is None:
        return prompt
    for trigger in sorted(triggers, key=len, reverse=True):
        prompt = caption_with(prompt, trigger, words)
    return prompt


def _measure(
    shown: Sequence[Shown],
    read_as: Mapping[str, str],
    judges: Judges,
    measure_more: Callable[[Pixels], list[Figure]],
    watcher: Watcher,
) -> _Measured:
    measured = _Measured()
    watcher.begin("measuring", len(shown))
    for done, one in enumerate(shown, 1):
        frames = one.read()
        figures, identity = judges.measure(frames, read_as.get(one.prompt or ""))
        figures += measure_more(frames)
        measured.figures[one.variant].append(figures)
        if identity is not None:
            measured.curves[one.variant].append(identity)
        measured.shown.append(
            {
                "variant": one.variant,
                "prompt": one.prompt,
                "seed": one.seed,
                "file": None if one.file is None else str(one.file),
                "frames": len(frames),
                "figures": {figure.metric: figure.value for figure in figures},
                "identity by frame": None if identity is None else [round(float(value), 5) for value in identity],
            }
        )
        watcher.advance(done)
    return measured


def _measure_locality(controls: Sequence[Shown], judges: Judges, noun: str) -> tuple[list[Measure], list[str]]:
    """Return how much of what control prompts give is the base model's, and a sentence where an engram changed some."""
    base = [one.read() for one in controls if one.variant == "base"]
    same: dict[str, float] = {}
    moved: dict[str, list[list[Figure]]] = {}
    failures = []
    for variant in ("engram", "lora"):
        others = [one for one in controls if one.variant == variant]
        pairs = [
            (f"{one.prompt!r} (seed {one.seed})", before, one.read()) for before, one in zip(base, others, strict=False)
        ]
        if not pairs:
            continue
        count, differing = compare_bytes(pairs)
        same[variant] = float(count)
        moved[variant] = [judges.compare(before, after) for _, before, after in pairs]
        if differing and variant == "engram":
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            failures.append(
                f"{len(differing)} of {len(pairs)} {noun} of prompts without a trigger differ from the base model's: "
                f"{', '.join(differing[:3])}{more}"
            )
    identical = Measure(subject=CONTROLS, metric=f"identical {noun} of {len(base)}", values=same, higher_is_better=True)
    return [identical, *sum_up(moved)], failures


def _use(file: str, factor: float, adapter: Adapter, engrams: Sequence[Mapping[str, Any]]) -> UsedAdapter:
    """Return an adapter in use; where its concepts have unlike strengths, the details tell them."""
    identity = adapter.identity()
    strengths = next((set(one["strengths"].values()) for one in engrams if one["identity"] == identity), set())
    return UsedAdapter(file=file, identity=identity, strength=strengths.pop() if len(strengths) == 1 else factor)


def _detail(
    settings: EvaluateSettings, measured: _Measured, failures: Sequence[str], canvas: _RecordingCanvas | None
) -> dict[str, Any]:
    details: dict[str, Any] = {
        "image_model": settings.image_model,
        "text_model": settings.text_model,
        "references": None if settings.references is None else str(settings.references),
        "described_as": settings.described_as,
        "spread": list_spread(measured.figures),
        "shown": measured.shown,
        "failures": list(failures),
    }
    if canvas is not None:
        details |= {name: getattr(settings, name) for name in _DRAWN_WITH if hasattr(settings, name)}
        details |= {
            "seeds": list(settings.seeds),
            "prompts": list(settings.prompts),
            "control_prompts": list(settings.control_prompts),
            "lora": settings.lora,
            "engrams": canvas.engrams,
        }
    return details


def _write(folder: Path, report: EvaluateReport, measured: _Measured, *, overwrite: bool) -> None:
    make_folder(folder)
    text = json.dumps(report.to_json(), indent=2, ensure_ascii=False) + "\n"
    with open_target(folder / FIGURES, overwrite=overwrite) as file:
        write_all(file, memoryview(text.encode("utf-8", "surrogatepass")))
    if any(len(curve) > 1 for curves in measured.curves.values() for curve in curves):
        plot = draw_plot("similarity to the reference pictures", measured.curves)
        save_png(plot, folder / PLOT, {}, overwrite=overwrite)
