"""`engram merge`: the union of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_TARGET = Path("merged.safetensors")


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: engram merge aldric.safetensors brindle.safetensors -o both.safetensors")(merge)


def merge(
    files: Annotated[list[Path], typer.Argument(help="Adapters to merge.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write; must not exist without --force.")
    ] = DEFAULT_TARGET,
    on_conflict: Annotated[
        str,
        typer.Option(
            help="When concepts contradict each other: error, keep-first, keep-last (in the order given), "
            "or both (residuals add)."
        ),
    ] = "error",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Merge adapters into one file. A merge is a union: it never changes what a concept does."""
    from engram_cli.console import byte_progress
    from engram_cli.messages import count, show_json, show_note, show_written
    from engram_core import ON_CONFLICT, merge_files, open_adapter

    choice = next((known for known in ON_CONFLICT if known == on_conflict), None)
    if choice is None:
        raise typer.BadParameter(f"{on_conflict!r} is not one of {', '.join(ON_CONFLICT)}", param_hint="--on-conflict")
    with byte_progress("merging") as progress:
        report = merge_files(files, output, on_conflict=choice, overwrite=force, progress=progress)
    merged = open_adapter(output)
    identity = merged.identity()
    if as_json:
        show_json(
            {
                "output": str(output),
                "identity": identity,
                "bytes": merged.nbytes(),
                "concepts": report.concepts,
                "dropped": [{"name": name, "file": file} for name, file in report.dropped],
                "renamed": [{"name": old, "new_name": new, "file": file} for old, new, file in report.renamed],
            }
        )
        return
    for name, file in report.dropped:
        show_note(f"left out {name!r} of {file}")
    for old, new, file in report.renamed:
        show_note(f"renamed {old!r} of {file} to {new!r}")
    show_written(output, count(len(report.concepts), "concept"), merged.nbytes(), identity)
