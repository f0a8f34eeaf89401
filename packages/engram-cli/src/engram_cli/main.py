"""The `engram` command: one subcommand a module, errors as one line, exit status 0 done, 1 failed, 2 wrong usage."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Annotated

import typer

from engram_cli import __version__
from engram_cli.endings import Interrupted

_INTERRUPTED = 130  # as shells report it, 128 + SIGINT

# Command to its module, in the order of the help.
_MODULES = {
    **{
        name: name
        for name in ("train", "generate", "merge", "extract", "inspect", "convert", "push", "doctor", "demo", "data")
    },
    "eval": "evaluate",
}


def build_app(command: str | None = None) -> typer.Typer:
    """Return the application.

    Args:
        command: the command that will be run, if known: building the others too takes longer than a short command.
    """
    app = typer.Typer(
        name="engram",
        help="Exact, mergeable memories for frozen generators.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # formatting help with Rich would import four times as much as the command itself
    )
    app.callback()(root)
    wanted = [_MODULES[command]] if command in _MODULES else dict.fromkeys(_MODULES.values())
    for module in wanted:
        import_module(f"engram_cli.commands.{module}").register(app)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"engram {__version__}")
        raise typer.Exit


def root(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Exact, mergeable memories for frozen generators."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command and exit.

    Args:
        arguments: what follows the command's name; None means the process's own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = arguments[: arguments.index("--")] if "--" in arguments else arguments
    debug = "--debug" in options  # accepted after the subcommand too
    if debug:
        arguments.remove("--debug")
    try:
        build_app(arguments[0] if arguments else None)(arguments, prog_name="engram")
    except SystemExit as done:
        if done.code == _INTERRUPTED:  # Ctrl-C: files are written whole or not at all
            _show("interrupted; no file was left half-written")
        raise
    except Interrupted as stop:
        _show(str(stop))
        sys.exit(_INTERRUPTED)
    except Exception as error:
        from engram_core import EngramError

        if debug or not isinstance(error, EngramError):
            raise
        _show(str(error))
        sys.exit(1)


def _show(message: str) -> None:
    from engram_cli.messages import show_error

    show_error(message)
