"""What is measured on: a model of Qwen3-0.6B's size with random weights, and memories of several shapes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from engram_core import MemorySettings
from engram_llm.memory import Memory
from engram_llm.module import Table
from engram_llm.tables import HostTable, as_stored

# The values of Qwen3-0.6B's own configuration file.
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
}
SMALL = QWEN3 | {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
N_TOKENS = 151_669  # of its tokenizer
COMPRESSED = 0.77  # share of the ids that compression leaves, about as published (arXiv:2601.07372, section 2.2)

SHAPES: dict[str, dict[str, Any]] = {
    "TinyEngram's biomedical run": {
        "engram_vocab_size": (20000, 2000),
        "max_ngram_size": 3,
        "n_embed_per_ngram": 512,
        "n_head_per_ngram": 8,
        "layer_ids": (5, 7, 13, 17),
    },
    "TinyEngram's settings study": {
        "engram_vocab_size": (500, 100, 100),
        "max_ngram_size": 4,
        "n_embed_per_ngram": 1024,
        "n_head_per_ngram": 16,
        "layer_ids": (1, 2, 3, 4),
    },
}


def make_model(*, small: bool, dtype: torch.dtype, device: str) -> Any:
    """Return a model with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        torch.set_default_dtype(dtype)
        try:
            model = Qwen3ForCausalLM(Qwen3Config(**(SMALL if small else QWEN3)))
        finally:
            torch.set_default_dtype(torch.float32)
    return model.eval().requires_grad_(False)


def make_memory(
    shape: dict[str, Any],
    model: Any,
    *,
    on_host: bool = False,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    **changes: Any,
) -> Memory:
    """Return a memory with random weights.

    Args:
        shape: settings.
        model: whose width and number of layers it fits.
        on_host: leave its tables in host memory.
        dtype: None means the model's.
        device: None means the model's.
        changes: settings to replace.
    """
    last = model.config.num_hidden_layers - 1
    layers = tuple(sorted({min(layer, last) for layer in shape["layer_ids"]}))
    options = {"kernel_size": 4, "dilation": shape["max_ngram_size"], "pad_id": 0} | shape | {"layer_ids": layers}
    settings = MemorySettings(**options | changes)
    n_tokens = min(N_TOKENS, model.config.vocab_size)
    lookup = (np.arange(n_tokens) * COMPRESSED).astype(np.int64)
    generator = torch.Generator().manual_seed(0)
    kind, place = dtype or model.dtype, torch.device(device or model.device)

    def make_table(_: int, n_rows: int) -> nn.Module:
        values = torch.randn(n_rows, settings.head_width, generator=generator).to(kind)
        if on_host:
            return HostTable(as_stored(values), place, kind)
        table = Table(n_rows, settings.head_width)
        table.embedding.weight.data = values
        return table

    torch.manual_seed(0)
    memory = Memory(settings, lookup, model.config.hidden_size, make_table).to(place, kind)
    for layer in memory.layers.values():
        nn.init.normal_(layer.short_conv.conv.weight, std=0.1)
    return memory.requires_grad_(False).eval()
