"""Commands that a backbone must offer: train, generate, data, eval, demo. None of this version's does.

They exist so that the error is about the backbone and not about an unknown command, and so that a typo in
the backbone's name is noticed; they pretend nothing and exit with status 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

Backbone = Annotated[str | None, typer.Option("--backbone", help="Model family, e.g. sd15.", show_default=False)]

ABILITIES = {
    "train": "train a concept",
    "generate": "generate with adapters",
    "data": "prepare training data",
    "eval": "evaluate an adapter",
    "demo": "run a demonstration",
}


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for name, purpose in ABILITIES.items():
        help_text = f"Not available yet: no backbone of this version can {purpose}."
        app.command(name, help=help_text)(_command(name, purpose))


def _command(name: str, purpose: str) -> Callable[[str | None], None]:
    def command(backbone: Backbone = None) -> None:
        from engram_core import EngramError, load_backbone

        if backbone is not None:
            load_backbone(backbone)  # raises when there is none, naming the nearest
        who = f"backbone {backbone!r}" if backbone else "no installed backbone"
        able = "cannot" if backbone else "can"
        raise EngramError(
            f"engram {name}: {who} {able} {purpose} in this version; "
            "merge, extract, inspect, convert and doctor work (engram --help)"
        )

    return command
