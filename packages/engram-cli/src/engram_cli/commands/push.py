"""`engram push`: an adapter with its card to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog="Example: engram push aldric.safetensors me/aldric --license cc-by-4.0 --preview grid.png")(push)


def push(
    file: Annotated[Path, typer.Argument(help="Adapter to publish.", show_default=False)],
    repository: Annotated[str, typer.Argument(help="Where to: OWNER/NAME on the hub.", show_default=False)],
    license_: Annotated[
        str | None,
        typer.Option(
            "--license", help="Licence of the repository.", show_default="what all concepts, or the memory, state"
        ),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option(help="Picture for the card: PNG, JPEG or WebP.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Only you may see a repository that is created.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to.", show_default="main")] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.", show_default=False)] = None,
    description: Annotated[str | None, typer.Option(help="Markdown for the card.", show_default=False)] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md that engram did not write.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the card and send nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result for scripts.")] = False,
) -> None:
    """Publish an adapter on the Hugging Face hub, with a card that says how to use it.

    The repository is created where there is none. Sending needs `hf auth login` or HF_TOKEN; --dry-run does not.
    """
    from engram_cli.messages import format_size, show, show_json, show_note
    from engram_core.hub import CARD_FILE, prepare_upload, send_upload

    upload = prepare_upload(file, repository, license=license_, preview=preview, description=description)
    address, notes = None, list[str]()
    if not dry_run:
        address = send_upload(
            upload,
            private=private,
            revision=revision,
            message=message,
            overwrite_card=overwrite_card,
            note=notes.append,
        )
    for sentence in notes:
        show_note(f"{sentence} (--overwrite-card)")
    if as_json:
        sizes = upload.sizes()
        if notes:
            del sizes[CARD_FILE]
        show_json(
            {
                "repository": repository,
                "commit": address,
                "identity": upload.identity,
                "files": sizes,
                "card": None if notes else upload.card,
            }
        )
    elif address is None:
        files = ", ".join(f"{name} ({format_size(size)})" for name, size in upload.sizes().items())
        show_note(f"nothing was sent; to {repository} would go {files}")
        show(upload.card.rstrip("\n"))
    else:
        show(f"published {repository}: {address}")
        show(f"identity {upload.identity}")
