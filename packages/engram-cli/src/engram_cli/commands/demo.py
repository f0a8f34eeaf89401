"""`engram demo`: what engrams do, shown and measured with the checkpoint that ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from engram_cli.options import AsJson, Force


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: engram demo -o engram-demo")(demo)


def demo(
    backbone: Annotated[str, typer.Option("--backbone", help="Model family.")] = "sd15",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the page and all that it shows.")
    ] = Path("engram-demo"),
    seed: Annotated[int, typer.Option(min=0, help="Seed of everything random.")] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Show what engrams do, and check what they promise.

    Trains, merges and generates with the small checkpoint that ships; downloads nothing. The exit status is 1 when
    a promise does not hold.
    """
    from engram_cli.backends import find_backbone
    from engram_cli.messages import printable, show, show_columns, show_error, show_json
    from engram_cli.watchers import watching

    family = find_backbone(backbone, "demo")
    with watching(as_json=as_json) as watcher:
        report = family.demo(output, seed=seed, overwrite=force, watcher=watcher)
    if as_json:
        show_json(
            {
                "page": str(report.page),
                "figures": dict(report.figures),
                "passed": report.passed,
                "failures": list(report.failures),
                "seconds": report.seconds,
            }
        )
    else:
        show_columns(("what", "measured"), list(report.figures.items()))
        show(printable(f"page {report.page}"))
    for failure in report.failures:
        show_error(failure)
    if not report.passed:
        raise typer.Exit(1)
