"""`engram generate` for pictures: prompts and seeds to PNG files, with and without adapters."""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Mapping, Sequence
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
from engram_vision.drawing import Drawing, draw, find_silent
from engram_vision.grid import draw_grid
from engram_vision.loading import list_engrams, load_engram
from engram_vision.models import load_pipeline, model_fingerprint, pick_device
from engram_vision.settings import GenerateSettings

__all__ = ["generate", "save_png"]

_GRID = "grid.png"
_LONGEST_PROMPTS = 1 << 20  # bytes of a file with prompts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Chosen:
    """An adapter as the user asked for it."""

    adapter: Adapter
    file: str
    strength: float


def generate(settings: GenerateSettings, *, overwrite: bool = False, watcher: Watcher | None = None) -> GenerateReport:
    """Draw every prompt with every seed and write PNG files, which carry how they were made.

    Args:
        settings: what to draw.
        overwrite: replace files of the same names.
        watcher: hears how it goes, and which triggers do not fire.

    Raises:
        InputError: prompts, strengths or the model cannot be used.
        IncompatibleAdaptersError: an adapter was made for another model.
        TargetExistsError: a file exists and `overwrite` is false; nothing was drawn.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    drawings = [Drawing(prompt=prompt, seed=seed) for prompt in _prompts(settings) for seed in settings.seeds]
    adapters = [_choose(text) for text in settings.adapters]
    strengths = _strengths(settings.strengths, adapters)
    variants = (["base"] if settings.compare or not adapters else []) + (["engram"] if adapters else [])
    paths = {variant: _paths(settings, drawings, variant, alone=len(variants) == 1) for variant in variants}
    grid_path = settings.output / _GRID if settings.compare or settings.grid else None
    _check_targets(
        [*(path for group in paths.values() for path in group), *([grid_path] if grid_path else [])], overwrite
    )
    _make_folder(settings.output)

    device = pick_device(settings.device, settings.precision)
    watcher.begin(f"loading {settings.model}")
    pipeline = load_pipeline(settings.model, precision=settings.precision, device=device)
    for chosen in adapters:
        _check_base(chosen.adapter, settings.model)
    pictures: dict[str, list[Image.Image]] = {}
    files: list[Generated] = []
    watcher.begin("drawing", len(drawings) * len(variants))
    for number, variant in enumerate(variants):
        identity = None
        if variant == "engram":
            for chosen in adapters:
                factors = {
                    name: chosen.strength * strengths.get(name, strengths[""]) for name in chosen.adapter.names()
                }
                load_engram(pipeline, chosen.adapter, strength=factors, name=chosen.file)
            identity = _identity(pipeline)
            for chosen in adapters:
                for sentence in find_silent(pipeline, chosen.adapter, [drawing.prompt for drawing in drawings]):
                    watcher.note(sentence)
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
        for image, drawing, path in zip(pictures[variant], drawings, paths[variant], strict=True):
            save_png(image, path, _facts(settings, drawing, pipeline if identity else None), overwrite=overwrite)
            files.append(Generated(path=path, prompt=drawing.prompt, seed=drawing.seed, identity=identity))
    if grid_path:
        rows = [
            (f"{drawing.prompt}\n(seed {drawing.seed})", [pictures[variant][row] for variant in variants])
            for row, drawing in enumerate(drawings)
        ]
        save_png(draw_grid(variants, rows), grid_path, {}, overwrite=overwrite)
    watcher.end()
    return GenerateReport(files=tuple(files), grid=grid_path, seconds=time.monotonic() - started)


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


def _prompts(settings: GenerateSettings) -> list[str]:
    prompts = list(settings.prompts)
    if settings.prompts_file is not None:
        file = settings.prompts_file
        try:
            if file.stat().st_size > _LONGEST_PROMPTS:
                raise InputError(f"{file}: has {file.stat().st_size} bytes; expected prompts, one a line")
            lines = file.read_text(encoding="utf-8").splitlines()
        except OSError as error:
            raise InputError(f"{file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise InputError(f"{file}: is not UTF-8 text; expected prompts, one a line") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise InputError(f"{settings.prompts_file}: holds no prompt; write one a line")
    return prompts


def _choose(text: str) -> _Chosen:
    """Return the adapter of `FILE` or `FILE@STRENGTH`."""
    file, sign, number = text.rpartition("@")
    if sign and not Path(text).exists():
        try:
            return _Chosen(adapter=open_adapter(file), file=file, strength=float(number))
        except ValueError as error:
            if not isinstance(error, InputError) and "float" in str(error):
                raise InputError(f"{text}: {number!r} after @ is not a number; expected FILE@0.8") from None
            raise
    return _Chosen(adapter=open_adapter(text), file=text, strength=1.0)


def _strengths(texts: Sequence[str], adapters: Sequence[_Chosen]) -> dict[str, float]:
    """Return strengths by concept name; under the empty name that of all others."""
    known = {name for chosen in adapters for name in chosen.adapter.names()}
    strengths = {"": 1.0}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            raise InputError(f"strength {text!r} is not a number or NAME=number") from None
        if name and name not in known:
            raise InputError(f"strength {text!r}: there is no concept {name!r}; there is {', '.join(sorted(known))}")
        strengths[name] = value
    return strengths


def _check_base(adapter: Adapter, model: str) -> None:
    expected, found = adapter.manifest.base_fingerprint, model_fingerprint(model)
    if expected and found and expected != found:
        raise IncompatibleAdaptersError(
            f"{adapter.label}: was trained on {adapter.manifest.base_model} with fingerprint {expected[:12]}, "
            f"{model} has {found[:12]}; it belongs to another version of the checkpoint, train it again"
        )


def _identity(pipeline: Any) -> str:
    """Return a digest of everything that is loaded; for one adapter at full strength its own identity."""
    loaded = list_engrams(pipeline)
    if len(loaded) == 1 and set(loaded[0].factors().values()) == {1.0}:
        return loaded[0].adapter.identity()
    return hashlib.sha256(_engrams(pipeline).encode()).hexdigest()


def _engrams(pipeline: Any) -> str:
    return json.dumps(
        [
            {"file": Path(one.name).name, "identity": one.adapter.identity(), "strengths": one.factors()}
            for one in list_engrams(pipeline)
        ],
        ensure_ascii=False,
    )


def _facts(settings: GenerateSettings, drawing: Drawing, pipeline: Any) -> dict[str, str]:
    return {
        "prompt": drawing.prompt,
        "negative_prompt": settings.negative,
        "seed": str(drawing.seed),
        "model": settings.model,
        "steps": str(settings.steps),
        "guidance": str(settings.guidance),
        "engrams": "[]" if pipeline is None else _engrams(pipeline),
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


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{folder}: cannot be made: {error.strerror}") from None
