"""How a command ends early: through wrong usage, or because the user stopped it."""

from __future__ import annotations

import typer

from engram_cli.messages import printable


class UsageError(typer.BadParameter):
    """Wrong usage, exit status 2. Unlike its base it does not put the blame on one option."""

    def format_message(self) -> str:
        """Return the message; its further lines list details."""
        return "\n".join(map(printable, self.message.split("\n")))


class Interrupted(Exception):  # noqa: N818 - no error: the user wanted it
    """The user stopped work that can go on; the message says how. Exit status 130."""
