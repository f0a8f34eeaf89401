"""`engram convert`: checkpoints of other tools as adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.commands.extract import default_target


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: engram convert checkpoint-5000 --backbone sd35 --trigger 'Aldric Vortex-9 CyberNebula' "
        "--model ./stable-diffusion-3.5-medium -o aldric.safetensors  |  "
        "engram convert checkpoint-2000 --backbone qwen3 --model Qwen/Qwen3-0.6B -o tools.safetensors"
    )(convert)


def convert(
    source: Annotated[
        Path, typer.Argument(help="Checkpoint of TinyEngram or engram-peft: file or folder.", show_default=False)
    ],
    backbone: Annotated[
        str,
        typer.Option(
            "--backbone", help="Model family it was trained for, e.g. sd15, sd35 or qwen3.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File to write.", show_default="the name")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Base model, for its tokenizers: folder or hub id.",
            show_default="what the checkpoint says, else the usual",
        ),
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="Trigger phrase, where the checkpoint has none.")] = None,
    max_ngram: Annotated[int | None, typer.Option(min=2, help="Longest n-gram, where the checkpoint has none.")] = None,
    rule: Annotated[str | None, typer.Option(help="absolute, absolute-tanh or relative.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the concept or memory.", show_default="the trigger, or the checkpoint's")
    ] = None,
    license_: Annotated[str | None, typer.Option("--license", help="Licence, kept in a memory's file.")] = None,
    pad_id: Annotated[
        int | None, typer.Option(min=0, help="Token left of the text, where a memory's checkpoint has none.")
    ] = None,
    hash_seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the hash, where a memory's checkpoint has none.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Import a checkpoint of TinyEngram or engram-peft. It is loaded as data alone: nothing in it is run.

    Imported concepts keep the published activation, `spans`: they fire on every registered n-gram. Memories of language
    models are read from safetensors files.
    """
    from typing import get_args

    from engram_cli.messages import count, format_entries, show_json, show_written
    from engram_core import ConvertingBackbone, ConvertSettings, EngramError, HashedMemory, Rule, load_backbone

    if rule is not None and rule not in get_args(Rule):
        raise typer.BadParameter(f"{rule!r} is not one of {', '.join(get_args(Rule))}", param_hint="--rule")
    family = load_backbone(backbone)
    if not isinstance(family, ConvertingBackbone):
        raise EngramError(f"backbone {backbone!r} ({family.title}) imports no foreign checkpoints")
    for option, value in (("--license", license_), ("--pad-id", pad_id), ("--hash-seed", hash_seed)):
        if value is not None and family.kind == "concept-table":
            raise typer.BadParameter(f"is for hashed memories; {backbone} has concepts", param_hint=option)
    settings = ConvertSettings(
        model=model,
        name=name,
        trigger=trigger,
        max_ngram=max_ngram,
        rule=next((known for known in get_args(Rule) if known == rule), None),
        license=license_,
        pad_id=pad_id,
        hash_seed=hash_seed,
    )
    adapter = family.convert(source, settings)
    if isinstance(adapter, HashedMemory):
        target = output or default_target([adapter.record.name])
        identity, n_values = adapter.save(target, overwrite=force), adapter.n_parameters()
        if as_json:
            show_json({"output": str(target), "identity": identity, "bytes": adapter.nbytes(), "parameters": n_values})
            return
        layers = ", ".join(map(str, adapter.settings.layer_ids))
        show_written(target, f"{count(n_values, 'value')} for layers {layers}", adapter.nbytes(), identity)
        return
    target = output or default_target(adapter.names())
    identity = adapter.save(target, overwrite=force)
    entries = {stream: len(table.concept) for stream, table in adapter.streams.items()}
    if as_json:
        show_json({"output": str(target), "identity": identity, "bytes": adapter.nbytes(), "entries": entries})
        return
    show_written(target, format_entries(entries), adapter.nbytes(), identity)
