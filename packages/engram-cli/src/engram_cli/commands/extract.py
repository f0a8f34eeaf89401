"""`engram extract`: some of an adapter's concepts as a file of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.file_names import file_name


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: engram extract merged.safetensors aldric -o aldric.safetensors")(extract)


def extract(
    file: Annotated[Path, typer.Argument(help="Adapter to take from.", show_default=False)],
    names: Annotated[list[str], typer.Argument(help="Names of concepts.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write.", show_default="the name, or extracted.safetensors for several"
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Take concepts out of an adapter, bit for bit as they went in."""
    from engram_cli.console import byte_progress
    from engram_cli.messages import count, show_json, show_written
    from engram_core import extract_file, open_adapter

    target = output or default_target(names)
    with byte_progress("extracting") as progress:
        extract_file(file, names, target, overwrite=force, progress=progress)
    extracted = open_adapter(target)
    identity = extracted.identity()
    if as_json:
        show_json(
            {
                "output": str(target),
                "identity": identity,
                "bytes": extracted.nbytes(),
                "concepts": extracted.names(),
            }
        )
        return
    show_written(target, count(len(extracted), "concept"), extracted.nbytes(), identity)


def default_target(names: list[str]) -> Path:
    """Return a file name in the current folder, made from the concept's name when there is one."""
    if len(set(names)) > 1:
        return Path("extracted.safetensors")
    return Path(file_name(names[0], "extracted"))
