"""`engram generate` for what diffusers draws: prompts and seeds to files, with and without adapters."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engram_core import (
    Adapter,
    AdapterWriteError,
    Generated,
    GenerateReport,
    InputError,
    TargetExistsError,
    Watcher,
    open_adapter,
)
from engram_core.container import open_target, write_all
from engram_core.hub import find_adapter
from engram_core.settings import split_strength
from engram_vision.drawing import Drawing, draw, find_cut, find_silent
from engram_vision.grid import draw_grid
from engram_vision.loading import (
    check_base,
    check_family,
    disable_engrams,
    enable_engrams,
    list_engrams,
    load_engram,
)
from engram_vision.models import load_pipeline, pick_device
from engram_vision.settings import GenerateSettings, without_streams
from engram_vision.shipped import model_place

__all__ = ["CANVAS", "Beside", "Canvas", "generate", "make_folder", "save_png"]

_LONGEST_PROMPTS = 1 << 20  # bytes of a file with prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chosen:
    """An adapter as the user asked for it, with each concept's strength."""

    adapter: Adapter
    file: str
    strengths: Mapping[str, float]


class Canvas(Protocol):
    """How one kind of thing is drawn, written and compared.

    Attributes:
        suffix: of its files.
        overview: name of the picture that shows everything side by side.
    """

    @property
    def suffix(self) -> str:
        """What its files end in."""

    @property
    def overview(self) -> str:
        """Name of the picture that shows everything side by side."""

    def check(self, settings: Any) -> None:
        """Raise InputError where it can be told before the model is loaded that the size does not suit it."""

    def draw(self, pipeline: Any, drawings: Sequence[Drawing], settings: Any) -> Sequence[Any]:
        """Return what is drawn in one batch with whatever is loaded; raises InputError as `check` does."""

    def save(self, thing: Any, path: Path, facts: Mapping[str, str], *, overwrite: bool) -> None:
        """Write one, with facts about it; it appears whole or not at all."""

    def compare(self, variants: Sequence[str], rows: Sequence[tuple[str, Sequence[Any]]]) -> Image.Image:
        """Return a picture of labelled rows, each with a thing for every variant."""


class Beside(Protocol):
    """What is drawn with after base and engram, when no engram is in force.

    Attributes:
        name: of the variant, in names of files too.
        source: where it is from, which files tell under the variant's name.
    """

    @property
    def name(self) -> str:
        """Name of the variant."""

    @property
    def source(self) -> str:
        """Where it is from."""

    def load(self, pipeline: Any) -> Sequence[str]:
        """Load it and return what to tell of it; raises InputError when it does not fit the pipeline."""

    def unload(self, pipeline: Any) -> None:
        """Take it out; the pipeline is as it was."""


class _PictureCanvas:
    suffix, overview = ".png", "grid.png"

    def check(self, settings: GenerateSettings) -> None:
        pass  # it depends on parts that are loaded with the weights

    def draw(self, pipeline: Any, drawings: Sequence[Drawing], settings: GenerateSettings) -> list[Image.Image]:
        return draw(
            pipeline,
            drawings,
            steps=settings.steps,
            guidance=settings.guidance,
            negative=settings.negative,
            width=settings.width,
            height=settings.height,
            batch_size=len(drawings),
        )

    def save(self, thing: Image.Image, path: Path, facts: Mapping[str, str], *, overwrite: bool) -> None:
        save_png(thing, path, facts, overwrite=overwrite)

    def compare(self, variants: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image]]]) -> Image.Image:
        return draw_grid(variants, rows)


CANVAS: Canvas = _PictureCanvas()
"""Draws pictures."""


def generate(
    settings: GenerateSettings,
    *,
    overwrite: bool = False,
    watcher: Watcher | None = None,
    canvas: Canvas = CANVAS,
    beside: Beside | None = None,
) -> GenerateReport:
    """Draw every prompt with every seed and write files, which carry how they were made.

    Args:
        settings: what to draw.
        overwrite: replace files of the same names.
        watcher: hears how it goes, and which triggers do not fire.
        canvas: what is drawn.
        beside: what else is drawn with.

    Raises:
        InputError: prompts, strengths, the model or what is beside cannot be used.
        IncompatibleAdaptersError: an adapter was made for another model.
        ConflictError: the adapters contradict one another.
        AdapterReadError, AdapterFormatError: an adapter file cannot be used.
        AdapterWriteError: a file cannot be written; TargetExistsError: one exists and `overwrite` is false. Except
            when the disk gets full, nothing was drawn.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    drawings = [Drawing(prompt=prompt, seed=seed) for prompt in _prompts(settings) for seed in settings.seeds]
    adapters = _adapters(settings)
    variants = (["engram"] if adapters else []) + ([beside.name] if beside else [])
    if settings.compare or not variants:
        variants.insert(0, "base")
    endings = {variant: canvas.suffix if len(variants) == 1 else f"-{variant}{canvas.suffix}" for variant in variants}
    paths = {variant: _paths(settings, drawings, endings[variant]) for variant in variants}
    grid_path = settings.output / canvas.overview if settings.compare or settings.grid else None
    _check_targets(
        [*(path for group in paths.values() for path in group), *([grid_path] if grid_path else [])], overwrite
    )
    _check_models(adapters, settings)
    canvas.check(settings)
    device = pick_device(settings.device, settings.precision)
    watcher.begin(f"loading {settings.model}")
    pipeline = _open_model(settings, device, watcher)
    # Loaded before anything is drawn, because they may not fit the model or one another.
    if beside:
        for sentence in beside.load(pipeline):
            watcher.note(sentence)
        beside.unload(pipeline)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _load(pipeline, adapters, settings)
    for warning in warned:
        watcher.note(str(warning.message))
    for sentence in _list_notes(pipeline, adapters, [drawing.prompt for drawing in drawings]):
        watcher.note(sentence)
    make_folder(settings.output)

    drawn: dict[str, list[Any]] = {variant: [] for variant in variants}
    files: list[Generated] = []
    watcher.begin("drawing", len(drawings) * len(variants))
    for variant in variants:
        if variant == "engram":
            enable_engrams(pipeline)
        else:
            disable_engrams(pipeline)
        if beside and variant == beside.name:
            beside.load(pipeline)
        more = {beside.name: beside.source} if beside and variant == beside.name else {}
        engrams = _engrams(pipeline) if variant == "engram" else "[]"
        identity = _identity(pipeline, engrams) if variant == "engram" else None
        # Written batch by batch: what was drawn before somebody stops it is kept.
        for first in range(0, len(drawings), settings.batch_size):
            batch = drawings[first : first + settings.batch_size]
            things = canvas.draw(pipeline, batch, settings)
            for thing, drawing, path in zip(things, batch, paths[variant][first:], strict=False):
                canvas.save(thing, path, _facts(settings, drawing, engrams) | more, overwrite=overwrite)
                files.append(Generated(path=path, prompt=drawing.prompt, seed=drawing.seed, identity=identity))
            drawn[variant] += things
            watcher.advance(len(files))
    if grid_path:
        rows = [
            (f"{drawing.prompt}\n(seed {drawing.seed})", [drawn[variant][row] for variant in variants])
            for row, drawing in enumerate(drawings)
        ]
        save_png(canvas.compare(variants, rows), grid_path, {}, overwrite=overwrite)
    watcher.end()
    return GenerateReport(files=tuple(files), grid=grid_path, seconds=time.monotonic() - started)


def _list_notes(pipeline: Any, adapters: Sequence[_Chosen], prompts: Sequence[str]) -> list[str]:
    """Return what to tell about prompts: triggers that stay silent, and other ends that are cut off."""
    silent = [sentence for chosen in adapters for sentence in find_silent(pipeline, chosen.adapter, prompts)]
    others = [prompt for prompt in prompts if not any(repr(prompt) in sentence for sentence in silent)]
    return silent + find_cut(pipeline, others)


def save_png(image: Image.Image, path: Path, facts: Mapping[str, str], *, overwrite: bool) -> None:
    """Write a PNG with facts as text chunks; it appears whole or not at all.

    Raises:
        TargetExistsError: the file exists and `overwrite` is false.
        AdapterWriteError: the file cannot be written.
    """
    info = PngInfo()
    for name, text in facts.items():
        info.add_itxt(name, text)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    with open_target(path, overwrite=overwrite) as file:
        write_all(file, buffer.getbuffer())


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, unless it exists.

    Raises:
        AdapterWriteError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{folder}: cannot be made: {error.strerror}") from None


def _prompts(settings: GenerateSettings) -> list[str]:
    prompts = list(settings.prompts)
    if settings.prompts_file is not None:
        file = settings.prompts_file
        try:
            if file.stat().st_size > _LONGEST_PROMPTS:
                raise InputError(f"{file}: has {file.stat().st_size} bytes; expected prompts, one a line")
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{file}: is not UTF-8 text; expected prompts, one a line") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{settings.prompts_file}: holds no prompt; write one a line")
    return prompts


def _adapters(settings: GenerateSettings) -> list[_Chosen]:
    """Open the adapters and settle the strength of each concept."""
    opened = []
    for text in settings.adapters:
        file, factor = split_strength(text)
        opened.append((file, open_adapter(find_adapter(file)), factor))
    strengths = _strengths(settings.strengths, {name for _, adapter, _ in opened for name in adapter.names()})
    return [
        _Chosen(
            adapter=adapter,
            file=file,
            strengths={name: factor * strengths.get(name, strengths[""]) for name in adapter.names()},
        )
        for file, adapter, factor in opened
    ]


def _strengths(texts: Sequence[str], known: Collection[str]) -> dict[str, float]:
    """Return strengths by concept name; under the empty name that of all others."""
    strengths = {"": 1.0}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"strength {text!r} is not a number or NAME=number") from None
        if not known:
            raise InputError(f"strength {text!r}: there is no adapter to apply it to; give --adapter")
        if name and name not in known:
            raise InputError(f"strength {text!r}: there is no concept {name!r}; there is {', '.join(sorted(known))}")
        strengths[name] = value
    return strengths


def _open_model(settings: GenerateSettings, device: torch.device, watcher: Watcher) -> Any:
    """Return the pipeline on its device; in low memory only the part that is at work will be there."""
    offloads = settings.low_memory and device.type != "cpu"
    if settings.low_memory and not offloads:
        watcher.note("low_memory has no effect on the CPU: there is no other memory to move parts to")
    pipeline = load_pipeline(
        settings.family,
        settings.model,
        precision=settings.precision,
        device=None if offloads else device,
        without=without_streams(settings),
    )
    if offloads:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def _check_models(adapters: Sequence[_Chosen], settings: GenerateSettings) -> None:
    """Refuse adapters of other models before this one is loaded."""
    place = model_place(settings.family.name, settings.model)
    for chosen in adapters:
        check_family(chosen.adapter, settings.family)
        if not settings.force_base:
            check_base(chosen.adapter, place)


def _load(pipeline: Any, adapters: Sequence[_Chosen], settings: GenerateSettings) -> None:
    for chosen in adapters:
        load_engram(pipeline, chosen.adapter, strength=chosen.strengths, name=chosen.file, force=settings.force_base)


def _identity(pipeline: Any, engrams: str) -> str:
    """Return a digest of everything that is loaded; for one adapter at full strength its own identity."""
    loaded = list_engrams(pipeline)
    if len(loaded) == 1 and set(loaded[0].factors().values()) == {1.0}:
        return loaded[0].adapter.identity()
    return hashlib.sha256(engrams.encode()).hexdigest()


def _engrams(pipeline: Any) -> str:
    return json.dumps(
        [
            {"file": Path(one.name).name, "identity": one.adapter.identity(), "strengths": one.factors()}
            for one in list_engrams(pipeline)
        ],
        ensure_ascii=False,
    )


def _facts(settings: GenerateSettings, drawing: Drawing, engrams: str) -> dict[str, str]:
    return {
        "prompt": drawing.prompt,
        "negative_prompt": settings.negative,
        "seed": str(drawing.seed),
        "model": settings.model,
        "steps": str(settings.steps),
        "guidance": str(settings.guidance),
        "engrams": engrams,
    }


def _paths(settings: GenerateSettings, drawings: Sequence[Drawing], ending: str) -> list[Path]:
    return [
        settings.output / f"{number:03d}-{_slug(drawing.prompt)}-{drawing.seed}{ending}"
        for number, drawing in enumerate(drawings)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")[:48].rstrip("-") or "prompt"


def _check_targets(paths: Sequence[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise TargetExistsError(f"{there[0]}{more}: exists; pass --force to replace, or another --output")
