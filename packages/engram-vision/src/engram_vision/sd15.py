"""Backbone `sd15`: Stable Diffusion 1.x, one CLIP text encoder, its last hidden state edited."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from engram_core import Adapter, ConvertSettings, StreamTokenizer
from engram_core.huggingface import TokenizerSource, load_tokenizers

__all__ = ["SD15", "StableDiffusion15"]


class StableDiffusion15:
    """Stable Diffusion 1.x in diffusers' `StableDiffusionPipeline`."""

    name = "sd15"
    kind = "concept-table"
    title = "Stable Diffusion 1.5"
    # After the final layer norm: the states the U-Net's cross-attention reads (report, section 2.7).
    streams: Mapping[str, str] = {"clip_l": "last_hidden_state"}
    default_model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    tokenizers: Mapping[str, TokenizerSource] = {"clip_l": TokenizerSource(subfolder="tokenizer", max_length=77)}

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizer of a model in diffusers layout; loads no weights."""
        return load_tokenizers(model, self.tokenizers, streams)

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Import a TinyEngram checkpoint: `engram_weights*.pt` with `engram_config.json` beside it."""
        from engram_vision.tinyengram import convert_sd15  # imports torch

        return convert_sd15(source, settings, self)


SD15 = StableDiffusion15()
