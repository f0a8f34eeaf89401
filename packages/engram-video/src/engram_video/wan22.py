"""Backbone `wan22`: Wan 2.2 video, one UMT5 text encoder, edited before the text projection."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from engram_core import StreamTokenizer
from engram_core.huggingface import TokenizerSource, load_tokenizers

__all__ = ["WAN22", "Wan22"]


class Wan22:
    """Wan 2.2 in diffusers' `WanPipeline` and `WanImageToVideoPipeline`."""

    name = "wan22"
    kind = "concept-table"
    title = "Wan 2.2"
    # The video transformer projects these states and reads the real tokens alone (report, section 2.7).
    streams: Mapping[str, str] = {"umt5": "last_hidden_state"}
    default_model = "Wan-AI/Wan2.2-TI2V-5B-Diffusers"
    tokenizers: Mapping[str, TokenizerSource] = {"umt5": TokenizerSource(subfolder="tokenizer", max_length=512)}

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizer of a model in diffusers layout; loads no weights."""
        return load_tokenizers(model, self.tokenizers, streams)


WAN22 = Wan22()
