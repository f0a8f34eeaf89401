"""`engram data`: what training data needs before training."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.commands.clips import EXAMPLE, clips
from engram_cli.options import AsJson

_PRECISIONS = ("fp32", "bf16", "fp16")
_DEVICES = ("auto", "cpu", "cuda", "mps")

Folder = Annotated[
    Path, typer.Argument(help="Pictures or clips, with captions in a form that training reads.", show_default=False)
]
Write = Annotated[bool, typer.Option("--write", help="Write the captions to the folder; else they are only shown.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(
        help="Prepare training data: captions for pictures and clips, and clips out of pictures.",
        epilog="Examples: engram data caption pictures --captioner Salesforce/blip-image-captioning-base --write  |  "
        "engram data normalize pictures --trigger 'Zorbit Quell' --write",
        no_args_is_help=True,
        rich_markup_mode=None,
    )
    group.command(
        epilog="Example: engram data caption pictures --captioner Salesforce/blip-image-captioning-base --write"
    )(caption)
    group.command(
        epilog="Example: engram data normalize pictures --trigger 'Zorbit Quell' --subject 'a purple monster' --write"
    )(normalize)
    group.command(epilog=f"Example: {EXAMPLE}")(clips)
    app.add_typer(group, name="data")


def normalize(
    folder: Folder,
    trigger: Annotated[str, typer.Option(help="Phrase that will recall the subject.", show_default=False)],
    subjects: Annotated[
        list[str] | None,
        typer.Option(
            "--subject",
            metavar="WORDS",
            help="What captions call the subject, e.g. 'a purple monster'; goes before built-in words. Repeatable.",
            show_default=False,
        ),
    ] = None,
    only_subjects: Annotated[
        bool, typer.Option("--only-subjects", help="Look for no others than those of --subject.")
    ] = False,
    first: Annotated[
        bool, typer.Option("--first", help="Where several subjects are mentioned, take the first.")
    ] = False,
    write: Write = False,
    as_json: AsJson = False,
) -> None:
    """Replace "a man" and the like by the trigger.

    Shows which captions would change; --write changes them. What stands for the subject is an article and a general
    noun ("a woman", "the character", "this creature"), or "someone"; --subject names others. Captions that have the
    trigger stay as they are, and so do those that mention no subject, or several. With --write the exit status is 1
    when such captions are left.
    """
    from engram_cli.captions import describe_left, show_changes
    from engram_cli.messages import show_note
    from engram_core import InputError

    _need_vision("normalize")
    from engram_vision.captions import normalize_folder

    if only_subjects and not subjects:
        raise typer.BadParameter("needs --subject, the words to look for", param_hint="--only-subjects")
    report = normalize_folder(
        folder,
        trigger,
        subjects or (),
        only_subjects=only_subjects,
        first=first,
        write=write,
        note=show_note,
    )
    show_changes(folder, trigger, report, write=write, as_json=as_json)
    left = describe_left(folder, report)
    if write and left:
        raise InputError(left)


def caption(
    folder: Folder,
    captioner: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Image-to-text model of transformers: hub id or folder.",
            show_default=False,
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(
            help="What to ask the model; for BLIP and GIT, the words that captions begin with.",
            show_default="chat models are asked for one sentence, others nothing",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a caption at most.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures at once.")] = 1,
    device: Annotated[str, typer.Option(help="Where to compute: auto, cpu, cuda or mps.")] = "auto",
    precision: Annotated[str, typer.Option(help="Number type of the model: fp32, bf16 or fp16.")] = "fp32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite-captions", help="Also write captions for pictures that have one.")
    ] = False,
    write: Write = False,
    as_json: AsJson = False,
) -> None:
    """Write captions with a model of your choice.

    Clips are described by their middle frame. Captions go where the folder has its captions, into .txt files where it
    has none. Those that exist are kept, so a run that was stopped goes on where it was.
    """
    from typing import cast

    from engram_cli.captions import show_caption, show_captioned
    from engram_cli.endings import Interrupted
    from engram_cli.messages import count
    from engram_cli.watchers import watching

    _need_vision("caption")
    for option, value, known in (("--device", device, _DEVICES), ("--precision", precision, _PRECISIONS)):
        if value not in known:
            raise typer.BadParameter(f"{value!r} is not one of {', '.join(known)}", param_hint=option)
    from engram_vision.captioning import CaptionSettings, caption_folder
    from engram_vision.settings import Device, Precision

    settings = CaptionSettings(
        folder=folder,
        captioner=captioner,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        precision=cast(Precision, precision),
        device=cast(Device, device),
        overwrite=overwrite,
        write=write,
    )
    made: list[str] = []

    def hear(name: str, text: str) -> None:
        made.append(name)
        if not as_json:
            show_caption(name, text)

    try:
        with watching(as_json=as_json) as watcher:
            report = caption_folder(settings, watcher=watcher, heard=hear)
    except KeyboardInterrupt:
        if not write:
            raise
        remedy = "" if overwrite else "; the same command goes on with the others"
        raise Interrupted(f"interrupted; {count(len(made), 'caption')} written{remedy}") from None
    show_captioned(settings, report, as_json=as_json)


def _need_vision(command: str) -> None:
    """Raise EngramError where the package that knows pictures is absent."""
    from importlib.util import find_spec

    from engram_cli.backends import how_to_install
    from engram_core import EngramError

    if find_spec("engram_vision") is None:
        raise EngramError(f"engram data {command}: needs engram-vision; {how_to_install('engram-vision')}")
