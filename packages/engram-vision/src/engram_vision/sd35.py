"""Backbone `sd35`: Stable Diffusion 3.5, three text encoders, each with its own table."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from engram_core import Adapter, ConvertSettings, StreamTokenizer
from engram_core.huggingface import TokenizerSource, load_tokenizers

__all__ = ["SD35", "StableDiffusion35"]


class StableDiffusion35:
    """Stable Diffusion 3.5 (medium, large) in diffusers' `StableDiffusion3Pipeline`."""

    name = "sd35"
    kind = "concept-table"
    title = "Stable Diffusion 3.5"
    # The states the prompt embedding is made of (report, section 2.7).
    streams: Mapping[str, str] = {
        "clip_l": "penultimate_hidden_state",
        "clip_g": "penultimate_hidden_state",
        "t5": "last_hidden_state",
    }
    default_model = "stabilityai/stable-diffusion-3.5-medium"
    tokenizers: Mapping[str, TokenizerSource] = {
        "clip_l": TokenizerSource(subfolder="tokenizer", max_length=77),
        "clip_g": TokenizerSource(subfolder="tokenizer_2", max_length=77),
        "t5": TokenizerSource(subfolder="tokenizer_3", max_length=256),  # the pipeline's max_sequence_length
    }

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> dict[str, StreamTokenizer]:
        """Return the tokenizers of a model in diffusers layout; loads no weights."""
        return load_tokenizers(model, self.tokenizers, streams)

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Import a TinyEngram checkpoint: a folder with `engram_1..3.pt` and `scale_1..3.pt`."""
        from engram_vision.tinyengram import convert_sd35  # imports torch

        return convert_sd35(source, settings, self)


SD35 = StableDiffusion35()
