"""What demos have in common around what they draw: the folder, the characters' cards, the facts and the report."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from engram_core import AdapterWriteError, DemoReport, TargetExistsError, TrainReport
from engram_core.container import open_target, write_all
from engram_core.training.metrics import read_metrics
from engram_vision.demo.curve import Curve
from engram_vision.demo.page import Character, Page, Reference, render_page
from engram_vision.training.trainer import METRICS

__all__ = ["MERGED", "PAGE", "describe_character", "list_facts", "prepare_folder", "write_page"]

PAGE = "index.html"
MERGED = "merged.safetensors"


def prepare_folder(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the folder, and refuse to replace what is in it unless told to.

    Args:
        folder: for all that a demo writes.
        names: of what it will write there.
        overwrite: whether they may be there already.

    Raises:
        TargetExistsError: one is there and may not be.
        AdapterWriteError: the folder cannot be made.
    """
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise TargetExistsError(f"{folder / there[0]}: exists; pass --force to replace it, or another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{folder}: cannot be made: {error.strerror}") from None


def describe_character(name: str, references: Sequence[Reference], report: TrainReport) -> Character:
    """Return what the page says of a character that was learned.

    Args:
        name: of the character, which is its trigger.
        references: what it was learned from.
        report: of the training.
    """
    lines = read_metrics(report.run_dir / METRICS)
    return Character(
        name=name,
        references=tuple(references),
        curve=Curve(
            steps=tuple(line["step"] for line in lines),
            losses=tuple(line["loss"] for line in lines),
            validation=tuple((line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line),
            kept_step=report.kept_step,
        ),
        seconds=report.seconds,
        n_bytes=report.n_bytes,
        identity=report.identity,
        entries=sum(report.entries.values()),
    )


def list_facts(model: str, seed: int, seconds: float, packages: Sequence[str]) -> dict[str, str]:
    """Return where and how a demo ran, by name.

    Args:
        model: what it ran on, in words.
        seed: of everything random.
        seconds: in all.
        packages: whose versions count.
    """
    return {
        "Model": model,
        "Seed": str(seed),
        "Time": f"{seconds:.0f} s",
        "Machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def write_page(page: Page, path: Path, seconds: float) -> DemoReport:
    """Write a page and return what `engram demo` reports of it.

    Args:
        page: all that was found.
        path: the file, which may exist.
        seconds: in all.
    """
    with open_target(path, overwrite=True) as file:
        write_all(file, memoryview(render_page(page).encode()))
    return DemoReport(
        page=path,
        figures={
            figure.label: figure.value + (f" (bar: {figure.bar})" if figure.bar else "") for figure in page.figures
        },
        passed=page.passed,
        failures=page.failures,
        seconds=seconds,
    )
