"""Options that several commands have, and help that lists options by what they are about."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from engram_cli.settings_files import DEFAULT_FILE

Backbone = Annotated[
    str | None, typer.Option("--backbone", help="Model family, e.g. sd15 or qwen3.", show_default=False)
]
Config = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file with settings.", show_default=f"{DEFAULT_FILE} in this folder, where there is one"
    ),
]
Assignments = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="NAME=VALUE", help="Any setting of the backbone, by its name. Repeatable.", show_default=False
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Overwrite what exists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result for scripts.")]

NOT_SETTINGS = frozenset(
    {"ctx", "backbone", "config", "assignments", "resume", "force", "as_json", "concepts", "at_once", "workers"}
)
"""Parameters of commands that are no settings of a backbone; all others are named as their setting."""


class GroupedCommand(TyperCommand):
    """A command whose help lists the options of one `rich_help_panel` together, without Rich."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options in the order in which the first of each group is defined."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Other options", []).append(record)
        for title, records in groups.items():
            with formatter.section(title):
                formatter.write_dl(records)
