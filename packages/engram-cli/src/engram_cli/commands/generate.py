"""`engram generate`: pictures, clips or texts of a base model, with adapters or without."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from engram_cli.options import AsJson, Assignments, Backbone, Config, Force, GroupedCommand
from engram_cli.settings_files import parse_value

_WHAT, _ADAPTERS, _HOW, _TEXT, _MODEL = (
    "What to generate",
    "Adapters",
    "Sampling of pictures and clips",
    "Sampling of texts",
    "The frozen model",
)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        cls=GroupedCommand,
        epilog="Examples: engram generate -a aldric.safetensors -p 'a photo of Aldric Vortex-9 CyberNebula' --compare "
        " |  engram generate --backbone qwen3 --adapter biomedicine.safetensors --prompt 'Sepsis is' --compare",
    )(generate)


def generate(
    ctx: typer.Context,
    prompts: Annotated[
        list[str] | None,
        typer.Option("--prompt", "-p", help="What to generate. Repeatable.", rich_help_panel=_WHAT),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="Text file with one prompt a line.", rich_help_panel=_WHAT)
    ] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt for all.", rich_help_panel=_WHAT)] = None,
    seeds: Annotated[
        list[int] | None,
        typer.Option("--seed", help="Each prompt is generated once with each. Repeatable.", rich_help_panel=_WHAT),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="Folder to write pictures or clips to; JSONL file for texts, which are shown anyway.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    compare: Annotated[
        bool | None,
        typer.Option(help="Also generate without adapters, and show both side by side.", rich_help_panel=_WHAT),
    ] = None,
    grid: Annotated[
        bool | None, typer.Option(help="Write a grid of all pictures without comparing.", rich_help_panel=_WHAT)
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            "-a",
            metavar="FILE[@STRENGTH]",
            help="Adapter, file or hub repository, and the strength of everything in it. Repeatable.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    strengths: Annotated[
        list[str] | None,
        typer.Option(
            "--strength",
            metavar="[NAME=]X",
            help="Strength of one concept or memory, or of all. Repeatable.",
            rich_help_panel=_ADAPTERS,
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.", rich_help_panel=_HOW)] = None,
    guidance: Annotated[
        float | None, typer.Option(help="Scale of classifier-free guidance.", rich_help_panel=_HOW)
    ] = None,
    width: Annotated[
        Any,
        typer.Option(
            parser=parse_value, metavar="PIXELS", help="Width; `none` is the model's own.", rich_help_panel=_HOW
        ),
    ] = None,
    height: Annotated[
        Any,
        typer.Option(
            parser=parse_value, metavar="PIXELS", help="Height; `none` is the model's own.", rich_help_panel=_HOW
        ),
    ] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of each clip.", rich_help_panel=_HOW)] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second of each clip's file.", rich_help_panel=_HOW)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Generated at once.", rich_help_panel=_WHAT)] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Tokens to generate at most.", rich_help_panel=_TEXT)
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Randomness; 0 takes the likeliest token.", rich_help_panel=_TEXT)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample among the likeliest tokens of this share.", rich_help_panel=_TEXT)
    ] = None,
    chat: Annotated[
        bool | None, typer.Option(help="Put prompts into the model's chat template.", rich_help_panel=_TEXT)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model: hub id, folder or file, or `tiny`.",
            show_default="the first adapter's",
            rich_help_panel=_MODEL,
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Number type of the model: fp32, bf16 or fp16.", rich_help_panel=_MODEL)
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Where to compute: auto, cpu, cuda or mps.", rich_help_panel=_MODEL)
    ] = None,
    without_t5: Annotated[
        bool | None, typer.Option(help="Leave Stable Diffusion 3.5's T5 encoder out.", rich_help_panel=_MODEL)
    ] = None,
    force_base: Annotated[
        bool | None,
        typer.Option(help="Use adapters that were trained on another model of the family.", rich_help_panel=_MODEL),
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
    """Generate with a base model and adapters: pictures as files, texts on the terminal.

    Backbone and base model are the first adapter's, unless others are named.
    """
    arguments = dict(locals())
    from engram_cli.adapters import read_manifests
    from engram_cli.choices import Choices
    from engram_cli.messages import printable, show, show_json
    from engram_cli.watchers import watching
    from engram_core import TextReport
    from engram_core.settings import Layer

    choices = Choices(ctx, arguments)
    manifests = read_manifests(choices.texts("adapters"), choices.backbone_name())
    family = choices.backbone(next((manifest.backbone for manifest in manifests.values()), None))
    models = [Layer(source=file, values={"model": each.base_model}) for file, each in manifests.items()]
    settings = choices.settings(family, models[:1])
    with watching(as_json=as_json) as watcher:
        report = family.generate(settings, overwrite=force, watcher=watcher)
    if isinstance(report, TextReport):
        from engram_cli.texts import show_texts

        show_texts(report, shown=watcher.has_shown_texts, as_json=as_json)
        return
    if as_json:
        show_json(
            {
                "files": [
                    {"path": str(file.path), "prompt": file.prompt, "seed": file.seed, "identity": file.identity}
                    for file in report.files
                ],
                "grid": None if report.grid is None else str(report.grid),
                "seconds": report.seconds,
            }
        )
        return
    for path in [*(file.path for file in report.files), *([] if report.grid is None else [report.grid])]:
        show(printable(f"wrote {path}"))
