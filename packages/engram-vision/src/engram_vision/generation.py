"""`engram generate` for pictures: prompts and seeds to PNG files, with and without adapters."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from engram_core import (
    Adapter,
    AdapterWriteError,
    Generated,
    GenerateReport,
    IncompatibleAdaptersError,
    InputError,
    TargetExistsError,
    Watcher,
    open_adapter,
)
from engram_core.container import open_target, write_all
from engram_vision.drawing import Drawing, draw, find_cut, find_silent
from engram_vision.grid import draw_grid
from engram_vision.loading import list_engrams, load_engram, unload_engrams
from engram_vision.models import load_pipeline, model_fingerprint, pick_device
from engram_vision.settings import GenerateSettings

__all__ = ["generate", "make_folder", "save_png"]

_GRID = "grid.png"
_LONGEST_PROMPTS = 1 << 20  # bytes of a file with prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chosen:
    """An adapter as the user asked for it, with each concept's strength."""

    adapter: Adapter
    file: str
    strengths: Mapping[str, float]


def generate(settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None) -> GenerateReport:
    """Draw every prompt with every seed and write PNG files, which carry how they were made.

    Args:
        settings: what to draw.
        overwrite: replace files of the same names.
        watcher: hears how it goes, and which triggers do not fire.

    Raises:
        InputError: prompts, strengths or the model cannot be used.
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
    variants = (["base"] if settings.compare or not adapters else []) + (["engram"] if adapters else [])
    paths = {variant: _paths(settings, drawings, variant, alone=len(variants) == 1) for variant in variants}
    grid_path = settings.output / _GRID if settings.compare or settings.grid else None
    _check_targets(
        [*(path for group in paths.values() for path in group), *([grid_path] if grid_path else [])], overwrite
    )
    for chosen in adapters:
        _check_base(chosen.adapter, settings.model)
    device = pick_device(settings.device, settings.precision)
    watcher.begin(f"loading {settings.model}")
    pipeline = load_pipeline(settings.model, precision=settings.precision, device=device)
    # Loaded before anything is drawn, because they may not fit the model or one another.
    _load(pipeline, adapters)
    for sentence in _list_notes(pipeline, adapters, [drawing.prompt for drawing in drawings]):
        watcher.note(sentence)
    make_folder(settings.output)

    pictures: dict[str, list[Image.Image]] = {}
    files: list[Generated] = []
    watcher.begin("drawing", len(drawings) * len(variants))
    for number, variant in enumerate(variants):
        unload_engrams(pipeline)
        if variant == "engram":
            _load(pipeline, adapters)
        before = number * len(drawings)
        pictures[variant] = draw(
            pipeline,
            drawings,
            steps=settings.steps,
            guidance=settings.guidance,
            negative=settings.negative,
            width=settings.width,
            height=settings.height,
            batch_size=settings.batch_size,
            advance=lambda done, before=before: watcher.advance(before + done),  # type: ignore[misc]
        )
        engrams = _engrams(pipeline)
        identity = _identity(pipeline, engrams)
        for image, drawing, path in zip(pictures[variant], drawings, paths[variant], strict=True):
            save_png(image, path, _facts(settings, drawing, engrams), overwrite=overwrite)
            files.append(Generated(path=path, prompt=drawing.prompt, seed=drawing.seed, identity=identity))
    if grid_path:
        rows = [
            (f"{drawing.prompt}\n(seed {drawing.seed})", [pictures[variant][row] for variant in variants])
            for row, drawing in enumerate(drawings)
        ]
        save_png(draw_grid(variants, rows), grid_path, {}, overwrite=overwrite)
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
        file, factor = _split_strength(text)
        opened.append((file, open_adapter(file), factor))
    strengths = _strengths(settings.strengths, {name for _, adapter, _ in opened for name in adapter.names()})
    return [
        _Chosen(
            adapter=adapter,
            file=file,
            strengths={name: factor * strengths.get(name, strengths[""]) for name in adapter.names()},
        )
        for file, adapter, factor in opened
    ]


def _split_strength(text: str) -> tuple[str, float]:
    """Return file and strength of `FILE` or `FILE@STRENGTH`."""
    file, _, number = text.rpartition("@")
    if not file or Path(text).exists():
        return text, 1.0
    try:
        return file, float(number)
    except ValueError:
        if not Path(file).exists():
            return text, 1.0  # a file that does not exist and has an @ in its name, as opening it will tell
        raise InputError(f"{text}: {number!r} after @ is not a number; expected FILE@0.8") from None


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


def _load(pipeline: Any, adapters: Sequence[_Chosen]) -> None:
    for chosen in adapters:
        load_engram(pipeline, chosen.adapter, strength=chosen.strengths, name=chosen.file)


def _check_base(adapter: Adapter, model: str) -> None:
    expected, found = adapter.manifest.base_fingerprint, model_fingerprint(model)
    if expected and found and expected != found:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was trained on {adapter.manifest.base_model} with fingerprint {expected[:12]}, "
            f"{model} has {found[:12]}; it belongs to another version of the checkpoint, train it again"
        )


def _identity(pipeline: Any, engrams: str) -> str | None:
    """Return a digest of everything that is loaded; for one adapter at full strength its own identity."""
    loaded = list_engrams(pipeline)
    if not loaded:
        return None
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


def _paths(settings: GenerateSettings, drawings: Sequence[Drawing], variant: str, *, alone: bool) -> list[Path]:
    ending = "" if alone else f"-{variant}"
    return [
        settings.output / f"{number:03d}-{_slug(drawing.prompt)}-{drawing.seed}{ending}.png"
        for number, drawing in enumerate(drawings)
    ]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.casefold()).strip("-")[:48].rstrip("-") or "prompt"


def _check_targets(paths: Sequence[Path], overwrite: bool) -> None:
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        raise TargetExistsError(f"{there[0]}{more}: exists; pass --force to replace, or another --output")
