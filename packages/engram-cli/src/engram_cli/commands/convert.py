"""`engram convert`: checkpoints of other tools as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.commands.extract import default_target


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Example: engram convert checkpoint-5000 --backbone sd35 --trigger 'Aldric Vortex-9 CyberNebula' "
        "--model ./stable-diffusion-3.5-medium -o aldric.safetensors"
    )(convert)


def convert(
    source: Annotated[Path, typer.Argument(help="TinyEngram checkpoint: file or folder.", show_default=False)],
    backbone: Annotated[
        str, typer.Option("--backbone", help="Model family it was trained for, e.g. sd15 or sd35.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="the concept's name")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Base model, for its tokenizers: folder or hub id.", show_default="the family's usual one"),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Trigger phrase, where the checkpoint has none.")] = None,
    max_ngram: Annotated[int | None, typer.Option(min=2, help="Longest n-gram, where the checkpoint has none.")] = None,
    rule: Annotated[str | None, typer.Option(help="absolute, absolute-tanh or relative.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the concept.", show_default="the trigger")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Import a checkpoint of TinyEngram. It is loaded as data alone: nothing in it is run.

    Imported concepts keep the published activation, `spans`: they fire on every registered n-gram.
    """
    from typing import get_args

    from engram_cli.messages import format_entries, show_json, show_written
    from engram_core import ConvertingBackbone, ConvertSettings, EngramError, Rule, load_backbone

    if rule is not None and rule not in get_args(Rule):
        raise typer.BadParameter(f"{rule!r} is not one of {', '.join(get_args(Rule))}", param_hint="--rule")
    family = load_backbone(backbone)
    if not isinstance(family, ConvertingBackbone):
        raise EngramError(f"backbone {backbone!r} ({family.title}) imports no foreign checkpoints")
    settings = ConvertSettings(
        model=model,
        name=name,
        trigger=trigger,
        max_ngram=max_ngram,
        rule=next((known for known in get_args(Rule) if known == rule), None),
    )
    adapter = family.convert(source, settings)
    target = output or default_target(adapter.names())
    identity = adapter.save(target, overwrite=force)
    entries = {stream: len(table.concept) for stream, table in adapter.streams.items()}
    if as_json:
        show_json({"output": str(target), "identity": identity, "bytes": adapter.nbytes(), "entries": entries})
        return
    show_written(target, format_entries(entries), adapter.nbytes(), identity)
