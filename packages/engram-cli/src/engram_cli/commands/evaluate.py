"""`engram eval`: what adapters change, measured against the base model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.options import AsJson, Assignments, Backbone, Config, Force, GroupedCommand

_ON, _SHOWN, _ADAPTERS, _HOW, _DRAWING, _MODEL = (
    "What to measure on",
    "What to measure pictures and clips with",
    "Adapters",
    "How texts are read",
    "How pictures and clips are drawn",
    "The frozen model",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        "eval",
        cls=GroupedCommand,
        epilog="Examples: engram eval -a biomedicine.safetensors --text held-out.jsonl  |  engram eval "
        "--backbone qwen3 -a biomedicine.safetensors --tasks mmlu,pubmedqa,truthfulqa_mc1,truthfulqa_mc2 --limit 100 "
        " |  engram eval -a zorbit.safetensors -p 'Zorbit Quell in the snow' --control-prompt 'a dog in the snow' "
        "--references zorbit --image-model facebook/dinov2-base -o figures",
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
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to draw, with a trigger in it. Repeatable.", rich_help_panel=_ON),
    ] = None,
    control_prompts: Annotated[
        list[str] | None,
        typer.Option(
            "--control-prompt",
            help="What to draw without a trigger: adapters must leave it as it is, byte for byte. Repeatable.",
            rich_help_panel=_ON,
        ),
    ] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Each prompt is drawn once with each. Repeatable.", rich_help_panel=_ON),
    ] = None,
    files: Annotated[
        list[Path] | None,
        typer.Option(
            "--files",
            metavar="PATH",
            help="Pictures or clips to measure as they are, or a folder of them. Repeatable.",
            rich_help_panel=_ON,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="JSON file to write as well; of pictures and clips a folder, for all that is drawn and measured.",
            rich_help_panel=_ON,
        ),
    ] = None,
    references: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Pictures of the subject.", rich_help_panel=_SHOWN)
    ] = None,
    image_model: Annotated[
        str | None,
        typer.Option(
            help="Model of transformers that compares pictures (CLIP, SigLIP, DINOv2, ViT): hub id, folder, or `tiny`.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    text_model: Annotated[
        str | None,
        typer.Option(
            help="Model of transformers that compares pictures and prompts (CLIP, SigLIP), likewise.",
            rich_help_panel=_SHOWN,
        ),
    ] = None,
    described_as: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="What it reads in place of the triggers.", rich_help_panel=_SHOWN),
    ] = None,
    warping: Annotated[
        bool | None,
        typer.Option(
            help="Measure the warping error by optical flow.",
            show_default="where OpenCV is installed",
            rich_help_panel=_SHOWN,
        ),
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
        str | None,
        typer.Option(
            metavar="PATH",
            help="LoRA to measure as well: a PEFT adapter's folder; for pictures and clips a safetensors file, a "
            "folder with one, or a hub id, as diffusers loads it.",
            rich_help_panel=_ADAPTERS,
        ),
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
    batch_size: Annotated[int | None, typer.Option(help="Texts read, or pictures or clips drawn, at once.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt for all.", rich_help_panel=_DRAWING)] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_DRAWING)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance.", rich_help_panel=_DRAWING)
    ] = None,
    width: Annotated[int | None, typer.Option(metavar="PIXELS", help="Width.", rich_help_panel=_DRAWING)] = None,
    height: Annotated[int | None, typer.Option(metavar="PIXELS", help="Height.", rich_help_panel=_DRAWING)] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of each clip.", rich_help_panel=_DRAWING)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of the files.", rich_help_panel=_DRAWING)] = None,
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
    without_t5: Annotated[
        bool | None, typer.Option(help="Leave Stable Diffusion 3.5's T5 encoder out.", rich_help_panel=_MODEL)
    ] = None,
    low_memory: Annotated[
        bool | None,
        typer.Option(help="Keep only the part that is at work on the device; slower.", rich_help_panel=_MODEL),
    ] = None,
    backbone: Backbone = None,
    assignments: Assignments = None,
    config: Config = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure the base model and the model with adapters on the same texts, tasks or prompts.

    Texts give perplexity and nats a token and a byte; tasks need lm-evaluation-harness. Pictures and clips give
    identity, temporal consistency, prompt adherence and locality; the exit status is 1 when one without a trigger
    changes. Backbone and base model are the first adapter's, unless others are named.
    """
    if tasks is not None:
        tasks = [name.strip() for text in tasks for name in text.split(",") if name.strip()]
    arguments = dict(locals())
    from engram_cli.adapters import read_manifests
    from engram_cli.choices import Choices
    from engram_cli.figures import show_figures
    from engram_cli.messages import show_error, show_json
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
    failures = report.details.get("failures", ())
    for failure in failures:
        show_error(failure)
    if failures:
        raise typer.Exit(1)
