"""`engram demo --backbone wan22`: pictures become clips, clips become memories, and one page shows and measures it."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from engram_core import ClipsReport, DemoReport, TrainReport, Watcher, merge_files, open_adapter
from engram_core.container import open_target, write_all
from engram_core.settings import Layer, resolve_settings
from engram_video.clips import read_clip
from engram_video.clipsets import METADATA
from engram_video.demo.gallery import Gallery, Plan
from engram_video.demo.measures import list_failures, list_figures
from engram_video.demo.motions import MOTION_PHRASES, MotionJudge, shown_motions
from engram_video.shipped import checkpoint_folder, judge_folder, motion_judge_folder
from engram_vision.dataset import read_dataset
from engram_vision.demo.characters import DemoCharacter, read_characters
from engram_vision.demo.judge import Judge
from engram_vision.demo.outcome import MERGED, PAGE, describe_character, list_facts, prepare_folder, write_page
from engram_vision.demo.page import Page, Reference
from engram_vision.generation import make_folder
from engram_vision.images import load_picture
from engram_vision.models import load_pipeline
from engram_vision.shipped import TINY

if TYPE_CHECKING:
    from engram_video.wan22 import Wan22

__all__ = ["run_demo", "write_pictures"]

_PACKAGES = ("engram-video", "engram-vision", "engram-core", "torch", "diffusers", "transformers", "av")
_PLAN = Plan()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Places:
    """Where a character's files are."""

    pictures: Path
    clips: Path
    adapter: Path

    @classmethod
    def of(cls, character: DemoCharacter, output: Path) -> _Places:
        """Return those in the folder of a demo."""
        return cls(
            pictures=output / f"{character.slug}-pictures",
            clips=output / f"{character.slug}-clips",
            adapter=output / f"{character.slug}.safetensors",
        )


def run_demo(
    backbone: Wan22,
    output: Path,
    *,
    seed: int = 0,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> DemoReport:
    """Make clips of two characters' pictures, train, merge and draw them, measure, and write the page.

    Args:
        backbone: that this is.
        output: folder for the page, the clips and the adapters.
        seed: of the clips, of training and of the drawings.
        overwrite: replace what an earlier demonstration wrote there.
        watcher: hears how it goes.

    Raises:
        TargetExistsError: the folder holds a demonstration and `overwrite` is false.
        InputError: what ships is missing.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    checkpoint_folder()
    judge, motions = Judge.load(judge_folder()), MotionJudge.load(motion_judge_folder())
    characters, phrases = read_characters()
    places = {character.name: _Places.of(character, output) for character in characters}
    own = [path.name for each in places.values() for path in (each.pictures, each.clips, each.adapter)]
    prepare_folder(output, [PAGE, MERGED, *own], overwrite)

    clips: dict[str, ClipsReport] = {}
    reports: dict[str, TrainReport] = {}
    for number, character in enumerate(characters):
        place = places[character.name]
        write_pictures(character, shown_motions(number), place.pictures)
        clips[character.name] = _make_clips(backbone, character, place, seed, watcher)
        reports[character.name] = _train(backbone, character, place, seed, watcher)
    merge_files([place.adapter for place in places.values()], output / MERGED, overwrite=True)
    adapters = {name: open_adapter(place.adapter) for name, place in places.items()}
    merged = open_adapter(output / MERGED)

    watcher.begin("loading the model")
    pipeline = load_pipeline(backbone.family, TINY)
    look = backbone.tiny_generate
    gallery = Gallery(pipeline, judge, motions, merged, look=look, plan=_PLAN, seed=seed, watcher=watcher)
    made = {
        character.name: [read_clip(path).frames for path in clips[character.name].clips] for character in characters
    }
    for character in characters:
        gallery.judge_made(character, made[character.name])
    sections = gallery.draw(characters, adapters, phrases)
    cards = []
    for character in characters:
        # In the order of their files, as those of the clips are.
        items = read_dataset(places[character.name].pictures, character.name)
        references = [
            Reference(image=load_picture(item.path), caption=item.caption, clip=gallery.make_movie(clip))
            for item, clip in zip(items, made[character.name], strict=True)
        ]
        cards.append(describe_character(character.name, references, reports[character.name]))
    seconds = time.monotonic() - started
    failures = list_failures(gallery.measures)
    page = Page(
        title="engram demo: clips",
        lead=(
            "Two invented characters, five still pictures each. The frozen model makes clips of the pictures, and from "
            "these each character becomes a small file that gives its name a meaning. Everything else the model draws "
            "stays as it was, byte for byte."
        ),
        passed=not failures,
        failures=failures,
        figures=list_figures(gallery.measures, clips, reports, merged, seconds),
        learning=(
            "Above each clip is the picture that it was made of: the clip's first frame. The caption, which names a "
            "motion, is what the clip is learned with. The model that made the clips could not know the name and read "
            "the character's looks in its place. Each character is kept in a small file of its own. The model itself "
            "did not change."
        ),
        characters=tuple(cards),
        sections=sections,
        facts=list_facts(
            f"tiny of {backbone.name} ({backbone.title}), which ships with engram-video; frozen throughout",
            seed,
            seconds,
            _PACKAGES,
        ),
        commands=_commands(backbone, characters, output),
    )
    watcher.end()
    return write_page(page, output / PAGE, seconds)


def write_pictures(character: DemoCharacter, motions: Sequence[str], folder: Path) -> None:
    """Write a character's pictures with captions that name a motion, so that their clips show different ones.

    Args:
        character: whose.
        motions: one for each picture.
        folder: to be made.
    """
    make_folder(folder)
    lines = []
    for item, motion in zip(read_dataset(character.folder, character.name), motions, strict=True):
        shutil.copyfile(item.path, folder / item.path.name)
        rest = item.caption.removeprefix(character.name).strip()
        text = f"{character.name} {MOTION_PHRASES[motion]} {rest}"
        lines.append(json.dumps({"file_name": item.path.name, "text": text}) + "\n")
    with open_target(folder / METADATA, overwrite=True) as file:
        write_all(file, memoryview("".join(lines).encode()))


def _make_clips(backbone: Wan22, character: DemoCharacter, place: _Places, seed: int, watcher: Watcher) -> ClipsReport:
    values = {
        "model": TINY,
        "data": place.pictures,
        "trigger": character.name,
        "described_as": character.description,
        "output": place.clips,
        "seed": seed,
        "device": "cpu",
    }
    layers = [
        Layer(source="tiny", values=backbone.default_clips_settings(TINY)),
        Layer(source="demo", values=values),
    ]
    # Those of an earlier demonstration say that they were made by `tiny`, which may have been another one.
    for path in sorted(place.clips.glob("*.mp4")):
        path.unlink()
    return backbone.build_clips(resolve_settings(backbone.clips_settings, layers), overwrite=True, watcher=watcher)


def _train(backbone: Wan22, character: DemoCharacter, place: _Places, seed: int, watcher: Watcher) -> TrainReport:
    values = {
        "model": TINY,
        "data": place.clips,
        "trigger": character.name,
        "output": place.adapter,
        "seed": seed,
        "device": "cpu",
    }
    layers = [Layer(source="tiny", values=backbone.tiny_train), Layer(source="demo", values=values)]
    return backbone.train(resolve_settings(backbone.train_settings, layers), overwrite=True, watcher=watcher)


def _commands(backbone: Wan22, characters: Sequence[DemoCharacter], output: Path) -> tuple[str, ...]:
    """Return lines that make everything anew in the folder where the demo was started, beside its own."""
    tool = f"--backbone {backbone.name} --model tiny"
    lines = []
    for character in characters:
        pictures = shlex.quote(str(_Places.of(character, output).pictures))
        trigger = f'--trigger "{character.name}"'
        looks = f'--described-as "{character.description}"'
        lines += [
            f"engram data clips {tool} --data {pictures} {trigger} {looks} -o {character.slug}-clips",
            f"engram train {tool} --data {character.slug}-clips {trigger} -o {character.slug}.safetensors",
        ]
    one, other = (character.name for character in characters)
    scene = f"{MOTION_PHRASES['jump']} in the forest"
    references = shlex.quote(str(_Places.of(characters[0], output).pictures))
    measured = f'-p "{one} {scene}" --control-prompt "a fox {scene}" -o {characters[0].slug}-figures'
    prompt = f"{one} and {other} {scene}"
    return (
        *lines,
        f"engram eval {tool} -a {characters[0].slug}.safetensors --references {references} {measured}",
        f"engram merge {' '.join(f'{character.slug}.safetensors' for character in characters)}",
        f'engram generate {tool} -a {MERGED} --prompt "{prompt}" --compare',
        f'engram inspect {MERGED} --prompt "{prompt}"',
    )
