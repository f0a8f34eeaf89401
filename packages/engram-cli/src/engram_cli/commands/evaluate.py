"""`engram eval`: what adapters change, measured against the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.options import AsJson, Assignments, Backbone, Config, Force, GroupedCommand

_ON, _ADAPTERS, _HOW, _MODEL = "What to measure on", "Adapters", "How", "The frozen model"


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "eval",
        cls=GroupedCommand,
        epilog="Examples: engram eval -a biomedicine.safetensors --text held-out.jsonl  |  engram eval "
        "--backbone qwen3 -a biomedicine.safetensors --tasks mmlu,pubmedqa,truthfulqa_mc1,truthfulqa_mc2 --limit 100",
    )(evaluate)


def evaluate(
    ctx: typer.Context,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            "--text",
            help="Texts to predict: .txt, .jsonl, .jsonl.gz or .parquet file, or a folder of them. Repeatable.",
            rich_help_panel=_ON,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,...",
            help="Tasks of lm-evaluation-harness, e.g. mmlu, pubmedqa, truthfulqa_mc1. Repeatable.",
            rich_help_panel=_ON,
        ),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Folder with tasks of your own, as YAML files.", rich_help_panel=_ON)
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help="Texts of each file and samples of each task at most.", rich_help_panel=_ON)
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="JSON file to write as well.", rich_help_panel=_ON),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[@STRENGTH]",
            help="Adapter, file or hub repository, and its strength. Repeatable.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option(
            "--strength", metavar="[NAME=]X", help="Strength of one, or of all. Repeatable.", rich_help_panel=_ADAPTERS
        ),
    ] = None,
    lora: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="PEFT adapter to measure as well.", rich_help_panel=_ADAPTERS),
    ] = None,
    base: Annotated[
        bool | None, typer.Option(help="Also measure the base model; on unless told.", rich_help_panel=_ADAPTERS)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Tokens that are read at once in long texts.", rich_help_panel=_HOW)
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(help="Tokens by which windows advance.", show_default="half of the window", rich_help_panel=_HOW),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(help="Examples before each sample of a task.", show_default="the task's", rich_help_panel=_HOW),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Read at once.", rich_help_panel=_HOW)] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: hub id, folder, or `tiny`.", show_default="the first adapter's", rich_help_panel=_MODEL
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Number type of the model: fp32, bf16 or fp16.", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: auto, cpu, cuda or mps.", rich_help_panel=_MODEL)
    ] = None,
    force_base: Annotated[
        bool | None,
        typer.Option(help="Use adapters that were trained on another model of the family.", rich_help_panel=_MODEL),
    ] = None,
    backbone: Backbone = None,
    assignments: Assignments = None,
    config: Config = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure the base model and the model with adapters on the same texts and tasks.

    Texts give perplexity and nats a token and a byte; tasks need lm-evaluation-harness. Backbone and base model are the
    first adapter's, unless others are named.
    """
    if tasks is not None:
        tasks = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    arguments = dict(locals())
    from engram_cli.adapters import read_manifests
    from engram_cli.choices import Choices
    from engram_cli.figures import show_figures
    from engram_cli.messages import show_json
    from engram_cli.watchers import watching
    from engram_core.settings import Layer

    choices = Choices(ctx, arguments)
    manifests = read_manifests(choices.texts("adapters"), choices.backbone_name())
    family = choices.backbone(next((manifest.backbone for manifest in manifests.values()), None))
    models = [Layer(source=file, values={"model": each.base_model}) for file, each in manifests.items()]
    settings = choices.settings(family, models[:1])
    with watching(as_json=as_json) as watcher:
        report = family.evaluate(settings, overwrite=force, watcher=watcher)
    if as_json:
        show_json(report.to_json())
    else:
        show_figures(report)
