"""Backbone `qwen3`: decoder language models with a hashed n-gram memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engram_core import StreamTokenizer
from engram_core.huggingface import TokenizerSource, load_tokenizers

__all__ = ["QWEN3", "Qwen3"]


class Qwen3:
    """Qwen3 and its like in transformers; the memory is addressed by hashes, not by registered triggers."""

    name = "qwen3"
    kind = "hashed-memory"
    title = "Qwen3"
    # Hidden states before chosen decoder layers; which layers is part of a memory's own settings.
    streams: Mapping[str, str] = {"text": "decoder_layer_input"}
    default_model = "Qwen/Qwen3-0.6B"
    tokenizers: Mapping[str, TokenizerSource] = {"text": TokenizerSource(subfolder="", max_length=None)}

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizer of a model in transformers layout; loads no weights."""
        return load_tokenizers(model, self.tokenizers, streams)


QWEN3 = Qwen3()
