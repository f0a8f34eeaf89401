"""`engram data clips`: a clip set out of captioned pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.options import AsJson, Assignments, Backbone, Config, Force

EXAMPLE = "engram data clips --backbone wan22 --data zorbit --trigger 'Zorbit Quell' -o zorbit-clips"


def clips(
    ctx: typer.Context,
    data: Annotated[Path | None, typer.Option(help="Folder of pictures with captions.")] = None,
    trigger: Annotated[str | None, typer.Option(help="Phrase that every caption must hold.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for clips, metadata and contact sheet.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Image-to-video model: hub id or folder, or `tiny`.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of each clip.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames a second.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Classifier-free guidance scale.")] = None,
    negative: Annotated[str | None, typer.Option(help="Negative prompt for all.")] = None,
    described_as: Annotated[
        str | None, typer.Option(metavar="WORDS", help="What the model reads in place of the trigger.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first noise, the same for all.")] = None,
    precision: Annotated[str | None, typer.Option(help="Number type of the model: fp32, bf16 or fp16.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to compute: auto, cpu, cuda or mps.")] = None,
    low_memory: Annotated[
        bool | None, typer.Option(help="Keep only the part that is at work on the device; slower.")
    ] = None,
    backbone: Backbone = None,
    assignments: Assignments = None,
    config: Config = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Make a clip of each captioned picture, to train on.

    The picture is the first frame, its caption the prompt; with --described-as in words that the model knows. Clips
    that are there already are kept, so a run that was stopped goes on where it was; --force makes anew what was made
    otherwise.
    """
    arguments = dict(locals())
    from engram_cli.choices import Choices
    from engram_cli.endings import Interrupted
    from engram_cli.messages import count, format_duration, printable, show, show_json
    from engram_cli.watchers import watching

    choices = Choices(ctx, arguments)
    family = choices.backbone()
    settings = choices.settings(family)
    try:
        with watching(as_json=as_json) as watcher:
            report = family.build_clips(settings, overwrite=force, watcher=watcher)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted; go on with: {choices.command_line()}") from None
    if as_json:
        show_json(
            {
                "folder": str(report.folder),
                "clips": [str(path) for path in report.clips],
                "made": report.n_made,
                "sheet": str(report.sheet),
                "seconds": report.seconds,
            }
        )
        return
    show(
        printable(
            f"{report.folder}: {count(len(report.clips), 'clip')}, {report.n_made} made now; "
            f"took {format_duration(report.seconds)}"
        )
    )
    show(printable(f"look at {report.sheet}"))
