"""A prompt as the model reads it, with the concepts that fire in it, for the page."""

from __future__ import annotations

from engram_core import PromptAudit
from engram_vision.demo.page import Token

__all__ = ["read_tokens"]


def read_tokens(audit: PromptAudit, prompt: str) -> dict[str, tuple[Token, ...]]:
    """Return a prompt's tokens with the concept that fires at each, for streams that read it alike once.

    Args:
        audit: of the adapter that is loaded.
        prompt: the text.
    """
    readers: dict[tuple[Token, ...], list[str]] = {}
    for stream, reading in audit.examine(prompt).streams.items():
        owner = {at: name for name, spans in reading.fired for start, stop in spans for at in range(start, stop)}
        texts = audit.show(stream, reading.ids)
        tokens = (Token(text=_plain(text), concept=owner.get(at)) for at, text in enumerate(texts))
        readers.setdefault(tuple(tokens), []).append(stream)
    return {", ".join(streams): tokens for tokens, streams in readers.items()}


def _plain(token: str) -> str:
    """Return a token without the marks that CLIP and T5 put at the ends and beginnings of words."""
    return token.removesuffix("</w>").removeprefix("\N{LOWER ONE EIGHTH BLOCK}") or "\N{OPEN BOX}"
