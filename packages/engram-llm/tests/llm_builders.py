"""Decoders small enough for tests, with the real classes, and memories that change their logits by about one."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from engram_core import HashedMemory, Manifest, MemoryRecord, MemorySettings, StreamSpec, TokenizerSpec
from engram_llm.attachment import Active, attach, detach
from engram_llm.memory import Memory, stored_tensors

WIDTH, LAYERS, VOCABULARY = 32, 4, 200
"""Of the models."""

KNOWN = 190
"""Token ids that memories know: embeddings are often larger than the tokenizer's vocabulary."""

PAD_ID = 5

_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    # Large enough that attention looks where it wants to.
    "initializer_range": 0.1,
    "pad_token_id": PAD_ID,
    "bos_token_id": 3,
    "eos_token_id": 4,
}

FAMILIES: Mapping[str, tuple[type, type, Mapping[str, Any]]] = {
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, {}),
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    # A window in every layer, smaller than the texts.
    "mistral": (MistralForCausalLM, MistralConfig, {"sliding_window": 7}),
    # One mask for each kind of layer.
    "gemma3": (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        {
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}


@cache
def same_model(family: str = "qwen3") -> Any:
    """Return a model that other tests use too, so leave it as it is."""
    return make_model(family)


@cache
def same_memory(name: str = "published", seed: int = 0) -> Memory:
    """Return a memory by the name of its settings; it is other tests' too."""
    return make_memory(SETTINGS[name], seed=seed)


@cache
def _model(family: str, fields: tuple[tuple[str, Any], ...]) -> Any:
    model, config, own = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = model(config(**_SHAPE | dict(own) | dict(fields))).eval()
    made.generation_config.eos_token_id = None  # texts of a length that is known
    made.generation_config.suppress_tokens = list(range(KNOWN, VOCABULARY))
    return made


def make_model(family: str = "qwen3", **fields: Any) -> Any:
    """Return a model with random weights, which the test may change."""
    return copy.deepcopy(_model(family, tuple(sorted(fields.items()))))


def make_settings(**fields: Any) -> MemorySettings:
    """Return settings; sizes of tables follow the longest n-gram."""
    n = fields.setdefault("max_ngram_size", 3)
    defaults = {
        "engram_vocab_size": (97, 61, 43, 31)[: n - 1],
        "n_embed_per_ngram": 12,
        "n_head_per_ngram": 3,
        "layer_ids": (1, 3),
        "kernel_size": 4,
        "dilation": n,
        "pad_id": PAD_ID,
    }
    return MemorySettings(**defaults | fields)


SETTINGS: Mapping[str, MemorySettings] = {
    "published": make_settings(),
    "no window, layer 0": make_settings(max_ngram_size=2, kernel_size=1, layer_ids=(0,), bias=False),
    "long n-grams, two branches": make_settings(
        max_ngram_size=4, kernel_size=2, dilation=1, hc_mult=2, layer_ids=(0, 3)
    ),
    "long window, last layer": make_settings(max_ngram_size=2, kernel_size=4, dilation=2, layer_ids=(3,), seed=7),
    "every layer, any order": make_settings(kernel_size=3, dilation=2, hc_mult=2, layer_ids=(2, 0, 3, 1), bias=False),
    "as engram-peft": make_settings(max_ngram_size=4, layer_ids=(1,), hashing="engram-peft"),
    "n-grams beyond the window": make_settings(max_ngram_size=4, kernel_size=3, dilation=1, layer_ids=(2,)),
}
"""Longest n-gram, taps and their distance, branches, biases and layers, in several combinations."""


def make_lookup(known: int = KNOWN) -> np.ndarray:
    """Return a lookup in which some token ids share a compressed one."""
    return np.unique(np.arange(known) * 7 % 150, return_inverse=True)[1].astype(np.int32)


def make_memory(settings: MemorySettings | None = None, *, seed: int = 0, width: int = WIDTH) -> Memory:
    """Return a memory whose every weight counts, convolution included."""
    memory = Memory(settings or SETTINGS["published"], make_lookup(), width)
    fill(memory, seed)
    return memory.requires_grad_(False).eval()


def fill(memory: Memory, seed: int = 0) -> None:
    """Give a memory random weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in memory.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data = 1 + 0.3 * noise
            continue
        scale = 0.7 if "conv" in name or name.endswith("bias") else 1.0
        if "_proj" in name and weight.ndim == 2:
            scale = weight.shape[1] ** -0.5
        if "value" in name:
            # Small beside what the convolution gives: near a score of zero the gate is so steep that it makes a
            # hundredfold of any rounding of the model's.
            scale *= 0.3
        weight.data = scale * noise


def make_manifest(width: int = WIDTH, known: int = KNOWN, **fields: Any) -> Manifest:
    tokenizer = TokenizerSpec(class_name="ToyTokenizer", vocab_size=known, fingerprint="ab" * 32)
    streams = {"text": StreamSpec(width=width, site="decoder_layer_input", tokenizer=tokenizer)}
    return Manifest(**{"backbone": "qwen3", "base_model": "toy base", "streams": streams} | fields)


def make_file(
    settings: MemorySettings | None = None, *, seed: int = 0, dtype: str = "f32", name: str = "toy", **fields: Any
) -> HashedMemory:
    """Return an opened memory, held in memory; further fields are the manifest's."""
    memory = make_memory(settings, seed=seed)
    record = MemoryRecord(name=name, settings=memory.settings)
    return HashedMemory.build(make_manifest(**fields), record, make_lookup(), stored_tensors(memory, dtype), name)


@contextlib.contextmanager
def memories(model: Any, *many: Memory | tuple[Memory, float]) -> Iterator[Any]:
    """Put memories in force for a while."""
    attach(model, [Active(*one) if isinstance(one, tuple) else Active(one, 1.0) for one in many])
    try:
        yield model
    finally:
        detach(model)


def make_ids(*shape: int, seed: int = 0) -> Tensor:
    """Return token ids that memories know, padding's among them."""
    return torch.randint(0, KNOWN, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def full(model: Any, ids: Tensor, **fields: Any) -> Tensor:
    """Return the logits of one pass without cache."""
    return model(ids, use_cache=False, **fields).logits


@torch.no_grad()
def in_chunks(model: Any, ids: Tensor, sizes: Sequence[int], cache: Any = None) -> Tensor:
    """Return the logits of passes over chunks of a text, with a cache."""
    parts, begin = [], 0
    for size in sizes:
        out = model(ids[:, begin : begin + size], past_key_values=cache, use_cache=True)
        cache, begin = out.past_key_values, begin + size
        parts.append(out.logits)
    assert begin == ids.shape[1]
    return torch.cat(parts, dim=1)


def pad(rows: Sequence[Tensor], side: str) -> tuple[Tensor, Tensor]:
    """Return rows of unequal length as one batch, and its attention mask."""
    longest = max(map(len, rows))
    ids, mask = torch.full((len(rows), longest), PAD_ID), torch.zeros((len(rows), longest), dtype=torch.long)
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def positions_of(mask: Tensor) -> Tensor:
    """Return the positions of tokens among the tokens of their row, as `generate` counts them."""
    return (mask.cumsum(-1) - 1).clamp_min(0)


def state_bytes(module: nn.Module) -> dict[str, bytes]:
    """Return the exact content of a module's weights and buffers."""
    return {
        name: value.detach().cpu().view(torch.uint8).numpy().tobytes() if value.ndim else value.numpy().tobytes()
        for name, value in module.state_dict().items()
    }
