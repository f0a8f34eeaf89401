"""`engram demo`: learn two characters on the tiny checkpoint, merge them, draw, measure, and write one page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from engram_core import DemoReport, TrainReport, Watcher, merge_files, open_adapter
from engram_core.settings import Layer, resolve_settings
from engram_vision.backbone import ImageBackbone
from engram_vision.dataset import read_dataset
from engram_vision.demo.characters import DemoCharacter, read_characters
from engram_vision.demo.gallery import Gallery
from engram_vision.demo.judge import Judge
from engram_vision.demo.measures import list_failures, list_figures
from engram_vision.demo.outcome import MERGED, PAGE, describe_character, list_facts, prepare_folder, write_page
from engram_vision.demo.page import Character, Page, Reference
from engram_vision.images import load_picture
from engram_vision.models import load_pipeline
from engram_vision.shipped import TINY, judge_folder
from engram_vision.training.trainer import train

__all__ = ["MERGED", "PAGE", "run_demo"]

_PACKAGES = ("engram-vision", "engram-core", "torch", "diffusers", "transformers")


def run_demo(
    backbone: ImageBackbone,
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> DemoReport:
    """Train, merge and draw the two characters that ship, measure, and write the page.

    Args:
        backbone: for which `tiny` ships.
        output: folder for the page and the adapters.
        seed: of training and of the drawings.
        overwrite: replace what an earlier demonstration wrote there.
        watcher: hears how it goes.

    Raises:
        TargetExistsError: the folder holds a demonstration and `overwrite` is false.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    characters, phrases = read_characters()
    prepare_folder(output, [PAGE, MERGED, *(f"{character.slug}.safetensors" for character in characters)], overwrite)
    judge = Judge.load(judge_folder())
    reports = {character.name: _train(backbone, character, output, seed, watcher) for character in characters}
    files = {character.name: reports[character.name].output for character in characters}
    merge_files(files.values(), output / MERGED, overwrite=True)
    adapters = {name: open_adapter(path) for name, path in files.items()}
    merged = open_adapter(output / MERGED)

    watcher.begin("loading the model")
    gallery = Gallery(load_pipeline(backbone.family, TINY), judge, merged, seed=seed, watcher=watcher)
    sections = gallery.draw(characters, adapters, phrases)
    seconds = time.monotonic() - started
    failures = list_failures(gallery.measures)
    figures = list_figures(gallery.measures, reports, merged, seconds)
    page = Page(
        title="engram demo",
        lead=(
            "Two invented characters, five pictures each. Each becomes a small file that gives its name a meaning to a "
            "small frozen model. Everything else the model draws stays as it was, byte for byte."
        ),
        passed=not failures,
        failures=failures,
        figures=figures,
        characters=tuple(_character(character, reports[character.name]) for character in characters),
        sections=sections,
        facts=list_facts(
            f"tiny of {backbone.name} ({backbone.title}), which ships with engram-vision; frozen throughout",
            seed,
            seconds,
            _PACKAGES,
        ),
        commands=_commands(backbone, characters),
    )
    watcher.end()
    return write_page(page, output / PAGE, seconds)


def _train(backbone: ImageBackbone, character: DemoCharacter, output: Path, seed: int, watcher: Watcher) -> TrainReport:
    values = {
        "model": TINY,
        "data": character.folder,
        "trigger": character.name,
        "output": output / f"{character.slug}.safetensors",
        "seed": seed,
        "device": "cpu",
    }
    layers = [Layer(source="tiny", values=backbone.tiny_train), Layer(source="demo", values=values)]
    return train(resolve_settings(backbone.train_settings, layers), overwrite=True, watcher=watcher)


def _character(character: DemoCharacter, report: TrainReport) -> Character:
    data = read_dataset(character.folder, character.name)
    references = [Reference(image=load_picture(item.path), caption=item.caption) for item in data]
    return describe_character(character.name, references, report)


def _commands(backbone: ImageBackbone, characters: Sequence[DemoCharacter]) -> tuple[str, ...]:
    files = [f"{character.slug}.safetensors" for character in characters]
    lines = [
        f"engram train --backbone {backbone.name} --model tiny --data {character.slug} "
        f'--trigger "{character.name}" -o {file}'
        for character, file in zip(characters, files, strict=True)
    ]
    prompt = f"{characters[0].name} and {characters[1].name} in the forest"
    return (
        *lines,
        f"engram merge {' '.join(files)}",
        f'engram generate --backbone {backbone.name} --model tiny -a {MERGED} --prompt "{prompt}" --compare',
        f'engram inspect {MERGED} --prompt "{prompt}"',
    )
