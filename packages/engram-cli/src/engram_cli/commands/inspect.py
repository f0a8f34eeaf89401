"""`engram inspect`: what an adapter holds, what fires in a prompt or a text, and whether adapters would merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(
        epilog="Examples: engram inspect aldric.safetensors --prompt 'a photo of Aldric Vortex-9'  |  "
        "engram inspect aldric.safetensors --against captions.txt  |  engram inspect a.safetensors b.safetensors"
    )(inspect)


def inspect(
    files: Annotated[
        list[str],
        typer.Argument(help="One adapter, file or hub repository, or several to compare.", show_default=False),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="Show which tokens of which stream fire. Repeatable.")
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="Report every line of a text file that would fire.", show_default=False)
    ] = None,
    tokenizer: Annotated[
        list[str] | None,
        typer.Option(help="STREAM=PATH of a tokenizer.json or tokenizer folder. Repeatable.", show_default=False),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where to find the tokenizers: folder or hub id.", show_default="the adapter's base model"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Read the index alone: no integrity check, no identity.")
    ] = False,
    limit: Annotated[int, typer.Option(min=0, help="Concepts to list; 0 lists all.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Show backbone, streams, sizes, concepts or memory, and identity of an adapter, after checking every byte of it.

    Given several adapters, list every conflict that a merge would meet.
    """
    import gc

    # Importing leaves no garbage, and looking for some after every few hundred objects takes time.
    gc.disable()
    from engram_cli import overview
    from engram_cli.adapters import find_file
    from engram_core import HashedMemory, InputError, open_any

    gc.enable()
    if prompt and against is not None:
        raise typer.BadParameter("give --prompt or --against, not both", param_hint="--against")
    if len(files) > 1:
        if prompt or against is not None:
            raise typer.BadParameter("--prompt and --against take one adapter; merge them first", param_hint="FILES")
        from engram_core.opening import open_tables

        overview.show_conflicts(list(open_tables([find_file(file) for file in files])), as_json=as_json)
        return
    adapter = open_any(find_file(files[0]))
    if isinstance(adapter, HashedMemory):
        from engram_cli.memories import show_memory

        if prompt or against is not None:
            raise InputError(
                f"{adapter.label}: is a hashed memory, which has no trigger: it acts on every token; "
                "engram eval measures what it changes"
            )
        show_memory(adapter, quick=quick, as_json=as_json)
        return
    if not prompt and against is None:
        overview.show_adapter(adapter, quick=quick, limit=limit, as_json=as_json)
        return

    from engram_cli import firing
    from engram_cli.tokenizers import find_tokenizers

    tokenizers = find_tokenizers(adapter, tokenizer or (), model)
    if prompt:
        firing.show_prompts(adapter, tokenizers, prompt, as_json=as_json)
    else:
        assert against is not None  # noqa: S101 - for the type checker
        firing.show_lines(adapter, tokenizers, against, as_json=as_json)
