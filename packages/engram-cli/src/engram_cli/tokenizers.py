"""Where a command finds the tokenizers of an adapter's streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from engram_core import Adapter, BackboneNotFoundError, InputError, StreamTokenizer, check_tokenizers, load_backbone


def find_tokenizers(adapter: Adapter, named: Sequence[str], model: str | None) -> dict[str, StreamTokenizer]:
    """Return a tokenizer for each stream of an adapter.

    Args:
        adapter: the adapter.
        named: STREAM=PATH choices of the user; they come first.
        model: folder or hub id for the other streams; None means the adapter's own base model.

    Raises:
        typer.BadParameter: a choice is malformed or names no stream.
        InputError: a tokenizer cannot be found, or is not the adapter's.
    """
    from engram_core.huggingface import read_tokenizer
    from engram_core.tokenizer import wrap_tokenizer

    found: dict[str, StreamTokenizer] = {}
    for choice in named:
        stream, mark, path = choice.partition("=")
        if not mark or stream not in adapter.manifest.streams:
            raise typer.BadParameter(
                f"{choice!r} is not STREAM=PATH with a stream of the adapter ({', '.join(adapter.manifest.streams)})",
                param_hint="--tokenizer",
            )
        found[stream] = wrap_tokenizer(read_tokenizer(Path(path)))
    missing = [stream for stream in adapter.manifest.streams if stream not in found]
    if missing:
        try:
            backbone = load_backbone(adapter.manifest.backbone)
        except BackboneNotFoundError as error:
            raise InputError(f"{error}; or pass --tokenizer {missing[0]}=PATH") from None
        found.update(backbone.load_tokenizers(model or adapter.manifest.base_model, missing))
    check_tokenizers(adapter, found)
    return found
