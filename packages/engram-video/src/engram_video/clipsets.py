"""The clip-set builder: one clip for each captioned picture, by a frozen image-to-video model (report, section 3.2).

Each clip is written whole or not at all, and what is there already is not made again, so a stopped builder goes on
where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from engram_core import ClipsReport, InputError, TargetExistsError, Watcher
from engram_core.container import open_target, write_all
from engram_video.clips import probe_clip, read_clip, read_facts
from engram_video.drawing import read_length, save_clip, to_pixels
from engram_video.frames import fit_frames
from engram_video.models import check_shape, load_image_to_video
from engram_video.settings import Wan22ClipsSettings
from engram_video.sheet import draw_sheet
from engram_vision.dataset import CaptionedImage, caption_with, read_dataset
from engram_vision.generation import make_folder, save_png
from engram_vision.images import load_picture
from engram_vision.models import pick_device
from engram_vision.quiet import quiet_libraries

__all__ = ["METADATA", "SHEET", "build_clips"]

METADATA = "metadata.jsonl"
SHEET = "sheet.png"

_MADE_BY, _BUILDER = "made by", "engram data clips"  # what a contact sheet says of itself
_MADE_WITH = ("model", "frames", "fps", "width", "height", "steps", "guidance", "negative", "seed")

Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """One clip to have.

    Attributes:
        item: the picture it begins with.
        path: the clip's file.
        row: what the metadata will say of it.
    """

    item: CaptionedImage
    path: Path
    row: Row


def build_clips(
    settings: Wan22ClipsSettings, *, overwrite: bool = False, watcher: Watcher | None = None
) -> ClipsReport:
    """Make a clip of each picture, with metadata and a contact sheet.

    Args:
        settings: what to make.
        overwrite: make anew what was made otherwise, or of another picture or caption.
        watcher: hears how it goes.

    Raises:
        InputError: pictures, captions, sizes or the model cannot be used.
        TargetExistsError: the folder holds another clip of that name, and `overwrite` is false.
        AdapterWriteError: a file cannot be written; what was made before is kept.
        KeyboardInterrupt: what was made before is kept.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    check_shape(settings.model, settings.width, settings.height, settings.frames)
    watcher.begin("reading pictures")
    tasks = _tasks(settings, watcher)
    there = _read_metadata(settings.output / METADATA)
    _check_sheet(settings.output / SHEET, overwrite=overwrite)
    rows = {task.row["file_name"]: task.row for task in tasks if _is_made(task, there, overwrite=overwrite)}
    missing = [task for task in tasks if task.row["file_name"] not in rows]
    device = pick_device(settings.device, settings.precision)
    if missing:
        watcher.begin(f"loading {settings.model}")
        pipeline = _open_model(settings, device, watcher)
        make_folder(settings.output)
        watcher.begin("making clips", len(tasks), len(rows))
        for task in missing:
            clip = _animate(pipeline, task, settings)
            save_clip(clip, task.path, _facts(task.row), fps=settings.fps, overwrite=overwrite)
            rows[task.row["file_name"]] = task.row
            _write_metadata(settings.output / METADATA, there | rows)
            watcher.advance(len(rows))
    _write_metadata(settings.output / METADATA, there | rows)
    others = there.keys() - rows.keys()
    if others:
        watcher.note(f"{settings.output / METADATA}: also lists {', '.join(sorted(others))}, not of these pictures")
    sheet = draw_sheet([(f"{task.path.name}: {task.item.caption}", read_clip(task.path).frames) for task in tasks])
    save_png(sheet, settings.output / SHEET, {_MADE_BY: _BUILDER}, overwrite=True)
    watcher.end()
    return ClipsReport(
        folder=settings.output,
        clips=tuple(task.path for task in tasks),
        n_made=len(missing),
        sheet=settings.output / SHEET,
        seconds=time.monotonic() - started,
    )


def _tasks(settings: Wan22ClipsSettings, watcher: Watcher) -> list[_Task]:
    """Return the clips to have, in the order of the pictures."""
    if settings.output.exists() and settings.output.samefile(settings.data):
        raise InputError(f"{settings.output}: holds the pictures and their captions; pass another --output")
    items = read_dataset(settings.data, settings.trigger, note=watcher.note)
    made_with = {name: getattr(settings, name) for name in _MADE_WITH}
    tasks: dict[str, _Task] = {}
    for item in items:
        source = item.path.relative_to(settings.data)
        name = "-".join(source.with_suffix("").parts) + ".mp4"
        if name in tasks:
            raise InputError(
                f"{item.path}: its clip would be {name}, as that of {tasks[name].item.path}; rename one of them"
            )
        digest = hashlib.sha256(item.path.read_bytes()).hexdigest()
        words = settings.described_as
        prompt = item.caption if words is None else caption_with(item.caption, settings.trigger, words)
        row = {"file_name": name, "text": item.caption, "prompt": prompt}
        row |= {"source": source.as_posix(), "source_sha256": digest}
        tasks[name] = _Task(item=item, path=settings.output / name, row={**row, **made_with})
    return list(tasks.values())


def _is_made(task: _Task, there: Mapping[str, Row], *, overwrite: bool) -> bool:
    """Tell whether a clip need not be made; a file that is something else is refused, unless it may be replaced."""
    if not task.path.exists():
        return False
    known, frames = _look(task.path)
    # A stopped builder may have left a clip that the metadata does not know yet: the file says itself what it is.
    known = there.get(task.row["file_name"]) or known
    if known == task.row and frames == task.row["frames"]:
        return True
    if overwrite:
        return False
    differing = [name for name, value in task.row.items() if known.get(name) != value]
    raise TargetExistsError(
        f"{task.path}: exists, and was made otherwise ({', '.join(differing) or 'it is damaged'}); pass --force to "
        "make it anew, or another --output"
    )


def _check_sheet(path: Path, *, overwrite: bool) -> None:
    """Refuse to replace a picture that is no contact sheet."""
    if overwrite or not path.exists():
        return
    try:
        with Image.open(path) as image:
            known = image.info.get(_MADE_BY) == _BUILDER
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        known = False
    if not known:
        raise TargetExistsError(f"{path}: exists, and is no contact sheet; pass --force to replace it")


def _look(path: Path) -> tuple[Row, int]:
    """Return what a clip says of itself, and its frames; nothing of a file that is damaged or no clip."""
    try:
        return _parse(read_facts(path).get("clip")), probe_clip(path).frames
    except InputError:
        return {}, 0


def _parse(text: str | None) -> Row:
    try:
        row = json.loads(text or "{}")
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}


def _facts(row: Row) -> dict[str, str]:
    return {"prompt": str(row["prompt"]), "clip": json.dumps(row, ensure_ascii=False, sort_keys=True)}


def _open_model(settings: Wan22ClipsSettings, device: torch.device, watcher: Watcher) -> Any:
    offloads = settings.low_memory and device.type != "cpu"
    if settings.low_memory and not offloads:
        watcher.note("low_memory has no effect on the CPU: there is no other memory to move parts to")
    pipeline = load_image_to_video(settings.model, precision=settings.precision, device=None if offloads else device)
    if offloads:
        pipeline.enable_model_cpu_offload(device=device)
    return pipeline


def _animate(pipeline: Any, task: _Task, settings: Wan22ClipsSettings) -> Any:
    """Return a clip that begins with the task's picture, uint8 [F, H, W, 3]."""
    picture = np.asarray(load_picture(task.item.path))[None]
    first = Image.fromarray(fit_frames(picture, settings.width, settings.height)[0])
    with quiet_libraries():
        frames = pipeline(
            image=first,
            prompt=[str(task.row["prompt"])],
            negative_prompt=[settings.negative],
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance,
            width=settings.width,
            height=settings.height,
            num_frames=settings.frames,
            generator=[torch.Generator("cpu").manual_seed(settings.seed)],
            max_sequence_length=read_length(pipeline),
            output_type="np",
        ).frames[0]
    return to_pixels(frames)


def _read_metadata(file: Path) -> dict[str, Row]:
    """Return the rows of an earlier call, and those of the user's own clips, by file name."""
    if not file.is_file():
        return {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {error}; remove it, or pass another --output") from None
    rows = {number: _parse(line) for number, line in enumerate(lines, start=1) if line.strip()}
    wrong = [number for number, row in rows.items() if "file_name" not in row]
    if wrong:
        raise InputError(f"{file}: line {wrong[0]} names no file; mend or remove it, or pass another --output")
    return {str(row["file_name"]): row for row in rows.values()}


def _write_metadata(file: Path, rows: Mapping[str, Row]) -> None:
    """Write rows in the order of their names, as the pictures are."""
    text = "".join(json.dumps(rows[name], ensure_ascii=False) + "\n" for name in sorted(rows))
    with open_target(file, overwrite=True) as target:
        write_all(target, memoryview(text.encode()))
