"""`engram demo`: learn two characters on the tiny checkpoint, merge them, draw, measure, and write one page."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from engram_core import (
    Adapter,
    AdapterWriteError,
    DemoReport,
    PromptAudit,
    TargetExistsError,
    TrainReport,
    Watcher,
    merge_files,
    open_adapter,
)
from engram_core.container import open_target, write_all
from engram_core.settings import Layer, resolve_settings
from engram_vision.dataset import read_dataset
from engram_vision.demo.curve import Curve
from engram_vision.demo.judge import Judge
from engram_vision.demo.page import Character, Figure, Page, Picture, Reference, Row, Section, Token, render_page
from engram_vision.drawing import Drawing, draw
from engram_vision.images import load_picture
from engram_vision.loading import load_engram, pipeline_tokenizers, unload_engrams
from engram_vision.models import load_pipeline
from engram_vision.settings import TrainSettings
from engram_vision.shipped import TINY, characters_folder, judge_folder
from engram_vision.training.metrics import read_metrics
from engram_vision.training.trainer import METRICS, train

__all__ = ["run_demo"]

PAGE = "index.html"
MERGED = "merged.safetensors"

_STEPS, _GUIDANCE, _BATCH = 20, 4.0, 10
_SEEDS = 3
_STREAM = "clip_l"
# Without a trigger: other subjects, words that describe the characters, and single words of their names.
_CONTROLS = (
    "a fox in the forest",
    "a robot at night",
    "a cat and a penguin in the snow",
    "a purple spotted round monster with one eye and horns on the beach",
    "a green striped tall monster with two eyes and a crown in space",
    "zorbit in the city",
    "a quell under water",
    "wumble fenny in a meadow",
    "in the desert",
    "",
)
_IDENTITY_BAR, _BASE_BAR, _SCENE_BAR = 0.8, 0.1, 0.1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Subject:
    """A demo character."""

    name: str
    folder: Path
    attributes: Mapping[str, str]
    shown: Sequence[str]

    @property
    def slug(self) -> str:
        return self.folder.name


@dataclass(slots=True, eq=False)
class _Tally:
    """How often something was right."""

    right: int = 0
    count: int = 0

    def add(self, is_right: bool) -> None:
        self.right += is_right
        self.count += 1

    @property
    def share(self) -> float:
        return self.right / self.count if self.count else float("nan")

    def __str__(self) -> str:
        return f"{self.share:.2f} ({self.right} of {self.count})"


@dataclass(slots=True, eq=False)
class _Measures:
    """Everything that is counted, by (variant, held out)."""

    identity: dict[tuple[str, bool], _Tally] = field(default_factory=dict)
    scene: dict[tuple[str, bool], _Tally] = field(default_factory=dict)
    pair: dict[str, _Tally] = field(default_factory=dict)
    merged_equal: _Tally = field(default_factory=_Tally)
    control_equal: _Tally = field(default_factory=_Tally)
    states_equal: _Tally = field(default_factory=_Tally)


def run_demo(
    output: Path, *, seed: int = 0, overwrite: bool = False, watcher: Watcher | None = None, defaults: Mapping[str, Any]
) -> DemoReport:
    """Train, merge and draw the two characters that ship, measure, and write the page.

    Args:
        output: folder for the page and the adapters.
        seed: of training and of the drawings.
        overwrite: replace what an earlier demonstration wrote there.
        watcher: hears how it goes.
        defaults: training settings that suit the tiny checkpoint.

    Raises:
        TargetExistsError: the folder holds a demonstration and `overwrite` is false.
    """
    started = time.monotonic()
    watcher = watcher or Watcher()
    if (output / PAGE).exists() and not overwrite:
        raise TargetExistsError(f"{output / PAGE}: exists; pass --force to replace it, or another --output")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AdapterWriteError(f"{output}: cannot be made: {error.strerror}") from None
    subjects, phrases = _read_characters()
    judge = Judge.load(judge_folder())
    reports = {subject.name: _train(subject, output, seed, defaults, watcher) for subject in subjects}
    files = {subject.name: reports[subject.name].output for subject in subjects}
    merge_files(files.values(), output / MERGED, overwrite=True)
    adapters = {name: open_adapter(path) for name, path in files.items()}
    merged = open_adapter(output / MERGED)

    watcher.begin("loading the model")
    pipeline = load_pipeline(TINY)
    measures = _Measures()
    sections = _draw_all(pipeline, judge, subjects, phrases, adapters, merged, measures, seed, watcher)
    seconds = time.monotonic() - started
    failures = _failures(measures)
    figures = _figures(measures, reports, merged, seconds)
    page = Page(
        title="engram demo",
        lead=(
            "Two invented characters, five pictures each. A small frozen model learned both names in a few hundred "
            "bytes a word, and everything else it draws stayed as it was, byte for byte."
        ),
        passed=not failures,
        failures=failures,
        figures=figures,
        characters=tuple(_character(subject, reports[subject.name]) for subject in subjects),
        sections=sections,
        facts=_facts(seed, seconds),
        commands=_commands(subjects),
    )
    with open_target(output / PAGE, overwrite=True) as file:
        write_all(file, memoryview(render_page(page).encode()))
    watcher.end()
    return DemoReport(
        page=output / PAGE,
        figures={figure.label: figure.value + (f" (bar: {figure.bar})" if figure.bar else "") for figure in figures},
        passed=not failures,
        failures=failures,
        seconds=seconds,
    )


def _read_characters() -> tuple[list[_Subject], dict[str, str]]:
    """Return the characters, and each scene's phrase."""
    folder = characters_folder()
    values = json.loads((folder / "characters.json").read_text(encoding="utf-8"))
    subjects = [
        _Subject(
            name=one["name"], folder=folder / one["folder"], attributes=one["attributes"], shown=tuple(one["scenes"])
        )
        for one in values["characters"]
    ]
    return subjects, values["scenes"]


def _train(subject: _Subject, output: Path, seed: int, defaults: Mapping[str, Any], watcher: Watcher) -> TrainReport:
    values = {
        "model": TINY,
        "data": subject.folder,
        "trigger": subject.name,
        "output": output / f"{subject.slug}.safetensors",
        "seed": seed,
        "device": "cpu",
    }
    layers = [Layer(source="tiny", values=defaults), Layer(source="demo", values=values)]
    return train(resolve_settings(TrainSettings, layers), overwrite=True, watcher=watcher)


def _draw_all(
    pipeline: Any,
    judge: Judge,
    subjects: Sequence[_Subject],
    phrases: Mapping[str, str],
    adapters: Mapping[str, Adapter],
    merged: Adapter,
    measures: _Measures,
    seed: int,
    watcher: Watcher,
) -> tuple[Section, ...]:
    """Draw everything with and without adapters, count what is right, and return the page's sections."""
    audit = PromptAudit(merged, pipeline_tokenizers(pipeline))
    names = [subject.name for subject in subjects]
    solo = {
        subject.name: [
            (scene, Drawing(prompt=f"{subject.name} {phrase}", seed=seed + number))
            for scene, phrase in phrases.items()
            for number in range(_SEEDS)
        ]
        for subject in subjects
    }
    orders = (names, names[::-1])
    both = [
        (order, scene, Drawing(prompt=f"{order[0]} and {order[1]} {phrases[scene]}", seed=seed + number))
        for number, scene in enumerate(phrases)
        for order in orders
    ]
    control = [Drawing(prompt=prompt, seed=seed + number) for prompt in _CONTROLS for number in range(2)]
    total = sum(map(len, solo.values())) * 3 + 2 * len(both) + 2 * len(control)
    watcher.begin("drawing", total)
    done = 0

    def picture(drawings: Sequence[Drawing], adapter: Adapter | None) -> list[Image.Image]:
        nonlocal done
        if adapter is not None:
            load_engram(pipeline, adapter, name="demo")
        try:
            images = draw(
                pipeline,
                drawings,
                steps=_STEPS,
                guidance=_GUIDANCE,
                batch_size=_BATCH,
                advance=lambda part, before=done: watcher.advance(before + part),  # type: ignore[misc]
            )
        finally:
            if adapter is not None:
                unload_engrams(pipeline, "demo")
        done += len(images)
        return images

    shown_rows: list[Row] = []
    held_out_rows: list[Row] = []
    for subject in subjects:
        drawings = [drawing for _, drawing in solo[subject.name]]
        images = {
            "base": picture(drawings, None),
            "engram": picture(drawings, adapters[subject.name]),
            "merged": picture(drawings, merged),
        }
        verdicts = {variant: judge.name_subjects(group) for variant, group in images.items()}
        scenes = {variant: judge.name_scenes(group) for variant, group in images.items()}
        for number, (scene, drawing) in enumerate(solo[subject.name]):
            held_out = scene not in subject.shown
            pictures = []
            for variant, group in images.items():
                is_right = _is(verdicts[variant][number], subject)
                key = (variant, held_out)
                measures.identity.setdefault(key, _Tally()).add(is_right)
                measures.scene.setdefault(key, _Tally()).add(scenes[variant][number] == scene)
                verdict = subject.name if is_right else _describe(verdicts[variant][number])
                # The base model owes nobody this character, so its pictures are neither right nor wrong.
                good = None if variant == "base" else is_right
                pictures.append(Picture(image=group[number], verdict=verdict, good=good))
            same = _same(images["engram"][number], images["merged"][number])
            measures.merged_equal.add(same)
            row = _row(audit, drawing, pictures, None if same else "the merged file draws other bytes than the single")
            if drawing.seed == seed:
                (held_out_rows if held_out else shown_rows).append(row)

    drawings = [drawing for _, _, drawing in both]
    images = {"base": picture(drawings, None), "merged": picture(drawings, merged)}
    places = {
        (variant, place): judge.name_subjects(group, place)
        for variant, group in images.items()
        for place in ("left", "right")
    }
    by_name = {subject.name: subject for subject in subjects}
    pair_rows = []
    for number, (order, _, drawing) in enumerate(both):
        pictures = []
        for variant, group in images.items():
            seen = [
                name
                for name, place in zip(order, ("left", "right"), strict=True)
                if _is(places[variant, place][number], by_name[name])
            ]
            measures.pair.setdefault(variant, _Tally()).add(len(seen) == len(order))
            good = None if variant == "base" else len(seen) == len(order)
            pictures.append(Picture(image=group[number], verdict=" and ".join(seen) or "neither", good=good))
        pair_rows.append(_row(audit, drawing, pictures))

    images = {"base": picture(control, None), "merged": picture(control, merged)}
    _compare_states(pipeline, merged, [drawing.prompt for drawing in control], measures)
    control_rows = []
    for drawing, *pair in zip(control, *images.values(), strict=True):
        same = _same(*pair)
        measures.control_equal.add(same)
        if drawing.seed == seed:
            pictures = [Picture(image=pair[0]), Picture(image=pair[1], identical=same)]
            control_rows.append(_row(audit, drawing, pictures))
    columns = ("base", "engram", "merged")
    return (
        Section(
            title="New scenes",
            text=(
                "The scenes that a character's five pictures did not show. The name recalls the character, and the "
                "rest of the prompt still decides the scene. The merged file holds both characters and draws the same."
            ),
            columns=columns,
            rows=tuple(held_out_rows),
        ),
        Section(
            title="Both in one prompt",
            text="One merged file, two names in one sentence, in either order. Subjects stand from left to right.",
            columns=("base", "merged"),
            rows=tuple(pair_rows),
        ),
        Section(
            title="Scenes from the pictures",
            text="The scenes that the five pictures did show, drawn anew.",
            columns=columns,
            rows=tuple(shown_rows),
        ),
        Section(
            title="Nothing else changes",
            text=(
                "No full name, no change: other subjects, the characters described in plain words, single words of "
                "their names, and no words at all. Both columns are compared byte by byte."
            ),
            columns=("base", "merged"),
            rows=tuple(control_rows),
        ),
    )


def _compare_states(pipeline: Any, merged: Adapter, prompts: Sequence[str], measures: _Measures) -> None:
    """Compare the text states themselves, which pictures of 8 bits could hide."""
    with torch.no_grad():
        base, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, False)
        load_engram(pipeline, merged, name="demo")
        try:
            edited, _ = pipeline.encode_prompt(list(prompts), "cpu", 1, False)
        finally:
            unload_engrams(pipeline, "demo")
    for one, other in zip(base, edited, strict=True):
        measures.states_equal.add(one.numpy().tobytes() == other.numpy().tobytes())


def _is(named: Mapping[str, str], subject: _Subject) -> bool:
    return named["kind"] == "monster" and all(named[name] == value for name, value in subject.attributes.items())


def _describe(named: Mapping[str, str]) -> str:
    if named["kind"] != "monster":
        return named["kind"]
    headgear = "" if named["headgear"] == "none" else f", {named['headgear']}"
    return f"{named['color']} {named['pattern']} {named['shape']} monster, {named['eyes']} eyed{headgear}".replace(
        "one eyed", "one eye"
    ).replace("two eyed", "two eyes")


def _same(one: Image.Image, other: Image.Image) -> bool:
    return one.tobytes() == other.tobytes()


def _row(audit: PromptAudit, drawing: Drawing, pictures: Sequence[Picture], note: str | None = None) -> Row:
    return Row(
        prompt=drawing.prompt or "(no words)",
        tokens=_tokens(audit, drawing.prompt),
        seed=drawing.seed,
        pictures=tuple(pictures),
        note=note,
    )


def _tokens(audit: PromptAudit, prompt: str) -> tuple[Token, ...]:
    """Return a prompt's tokens with the concept that fires at each."""
    reading = audit.examine(prompt).streams[_STREAM]
    owner = {at: name for name, spans in reading.fired for start, stop in spans for at in range(start, stop)}
    texts = audit.show(_STREAM, reading.ids)
    return tuple(Token(text=text.removesuffix("</w>"), concept=owner.get(at)) for at, text in enumerate(texts))


def _failures(measures: _Measures) -> tuple[str, ...]:
    """Return the exact promises that did not hold; the shares are figures, not promises."""
    promises = {
        "pictures without a trigger differ from the base model's": measures.control_equal,
        "text states without a trigger differ from the base model's": measures.states_equal,
        "pictures of the merged file differ from those of the single one": measures.merged_equal,
    }
    return tuple(
        f"{tally.count - tally.right} of {tally.count} {text}"
        for text, tally in promises.items()
        if tally.right != tally.count
    )


def _figures(
    measures: _Measures, reports: Mapping[str, TrainReport], merged: Adapter, seconds: float
) -> tuple[Figure, ...]:
    engram, base = measures.identity["engram", True], measures.identity["base", True]
    scene, base_scene = measures.scene["engram", True], measures.scene["base", True]
    control, states, same = measures.control_equal, measures.states_equal, measures.merged_equal
    return (
        Figure(
            label="Identity in new scenes",
            value=str(engram),
            bar=f"at least {_IDENTITY_BAR:.2f}",
            met=engram.share >= _IDENTITY_BAR,
            explanation="Pictures in which the judge finds the character, every attribute right.",
        ),
        Figure(
            label="The same without the engram",
            value=str(base),
            bar=f"at most {_BASE_BAR:.2f}",
            met=base.share <= _BASE_BAR,
            explanation="The base model does not know the name and draws some subject or other.",
        ),
        Figure(
            label="Scene obeyed",
            value=f"{scene.share:.2f} (base {base_scene.share:.2f})",
            bar=f"within {_SCENE_BAR:.2f} of the base",
            met=abs(scene.share - base_scene.share) <= _SCENE_BAR,
            explanation="Pictures in which the judge finds the scene that the prompt asks for.",
        ),
        Figure(
            label="Nothing else changes",
            value=f"{control.right} of {control.count} pictures, {states.right} of {states.count} text states",
            bar="all byte-identical",
            met=control.right == control.count and states.right == states.count,
            explanation="Prompts without a full name, with the merged file loaded, against the base model.",
        ),
        Figure(
            label="Merging changes nothing",
            value=f"{same.right} of {same.count} pictures",
            bar="all byte-identical",
            met=same.right == same.count,
            explanation="One name in the prompt: the merged file against that character's own file.",
        ),
        Figure(
            label="Both in one prompt",
            value=str(measures.pair["merged"]),
            explanation="Pictures in which the judge finds both, each in its place.",
        ),
        Figure(
            label="Identity in the scenes shown",
            value=str(measures.identity["engram", False]),
            explanation="The scenes of the reference pictures, drawn anew.",
        ),
        Figure(
            label="Training",
            value=", ".join(f"{report.seconds:.0f} s" for report in reports.values()),
            explanation="One character after the other, pictures to file.",
        ),
        Figure(
            label="Size of the merged file",
            value=f"{merged.nbytes() / 1000:.1f} kB",
            explanation="Both characters: vectors, scales and addresses.",
        ),
        Figure(label="In all", value=f"{seconds:.0f} s", explanation="Training, merging, drawing and measuring."),
    )


def _character(subject: _Subject, report: TrainReport) -> Character:
    data = read_dataset(subject.folder, subject.name)
    lines = read_metrics(report.run_dir / METRICS)
    return Character(
        name=subject.name,
        references=tuple(Reference(image=load_picture(item.path), caption=item.caption) for item in data),
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


def _facts(seed: int, seconds: float) -> dict[str, str]:
    packages = ("engram-vision", "engram-core", "torch", "diffusers", "transformers")
    return {
        "Model": "tiny, the checkpoint that ships with engram-vision; frozen throughout",
        "Seed": str(seed),
        "Time": f"{seconds:.0f} s",
        "Machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, {platform.machine()}",
        "Python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _commands(subjects: Sequence[_Subject]) -> tuple[str, ...]:
    files = [f"{subject.slug}.safetensors" for subject in subjects]
    lines = [
        f'engram train --backbone sd15 --model tiny --data {subject.slug} --trigger "{subject.name}" -o {file}'
        for subject, file in zip(subjects, files, strict=True)
    ]
    prompt = f"{subjects[0].name} and {subjects[1].name} in the forest"
    return (
        *lines,
        f"engram merge {' '.join(files)}",
        f'engram generate --backbone sd15 --model tiny -a {MERGED} --prompt "{prompt}" --compare',
        f'engram inspect {MERGED} --prompt "{prompt}"',
    )
