"""The command that a backbone must offer and none of this version's does: data.

It exists so that the error is about the backbone and not about an unknown command, and so that a typo in the backbone's
name is noticed; it pretends nothing and exits with status 1.
"""

from __future__ import annotations

from collections.abc import Callable

import typer

from engram_cli.options import Backbone

ABILITIES = {"data": "prepare training data"}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, purpose in ABILITIES.items():
        help_text = f"Not available yet: no backbone of this version can {purpose}."
        epilog = f"Example: engram {name} --backbone sd15"
        app.command(name, help=help_text, epilog=epilog)(_command(name, purpose))


def _command(name: str, purpose: str) -> Callable[[str | None], None]:
    def command(backbone: Backbone = None) -> None:
        from engram_core import EngramError, load_backbone

        if backbone is not None:
            load_backbone(backbone)  # raises when there is none, naming the nearest
        who = f"backbone {backbone!r}" if backbone else "no installed backbone"
        able = "cannot" if backbone else "can"
        raise EngramError(
            f"engram {name}: {who} {able} {purpose} in this version; engram --help lists what else there is"
        )

    return command
