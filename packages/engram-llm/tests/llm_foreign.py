"""Checkpoints as other tools save them, with random weights, and what their published formula gives, written anew.

The formula is that of arXiv:2601.07372, section 2, with the constants that the project's own design notes record; it
is computed position by position, in float64.
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "<pad>", "<end>", "the", "The", "THE", " the", "a", "cafe", "Café", "CAFÉ", "dog", "Dog", "fox", "  ", " ", "\t",
    "é", "É", "ﬁne", "fine", "lamp", "Lamp", "sea", "of", "by", "keeper", "\uff11", "1", "x", "X", "ß", "Ω",
]  # fmt: skip


def make_word_tokenizer(n_added: int = 0) -> Any:
    """Return a tokenizer of whole words in which case, accents and white space tell tokens apart, and added ones."""
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    made.add_tokens([f"<|added {number}|>" for number in range(n_added)])
    return made


def noise(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Return weights of a size at which each counts; they depend on names, shapes and the seed alone."""
    generator = np.random.default_rng(seed)
    found = {}
    for name in sorted(shapes):
        values = generator.standard_normal(shapes[name])
        if "norm" in name:
            values = 1 + 0.3 * values
        elif name.endswith("weight") and "embedding" not in name and "conv" not in name:
            values = values / math.sqrt(shapes[name][-1])
        else:
            values = 0.7 * values
        found[name] = values.astype(np.float32)
    return found


def find_sizes(requested: list[int], heads: int, layers: list[int]) -> dict[int, list[int]]:
    """Return each layer's table sizes: unused primes in ascending order from each requested size."""
    used: set[int] = set()
    sizes: dict[int, list[int]] = {}
    for layer in layers:
        sizes[layer] = []
        for start in requested:
            number = start
            for _ in range(heads):
                while number in used or number < 2 or any(number % k == 0 for k in range(2, math.isqrt(number) + 1)):
                    number += 1
                used.add(number)
                sizes[layer].append(number)
    return sizes


class Formula:
    """One layer's memory, position by position."""

    def __init__(
        self,
        weights: dict[str, np.ndarray],
        sizes: list[int],
        *,
        layer: int,
        longest: int,
        lookup: np.ndarray,
        pad: int,
        seed: int = 0,
        dilation: int | None = None,
    ) -> None:
        self.weights = {name: value.astype(np.float64) for name, value in weights.items()}
        self.sizes, self.longest, self.lookup, self.pad = sizes, longest, lookup, int(lookup[pad])
        self.dilation = longest if dilation is None else dilation
        bound = max(1, (2**63 - 1) // (int(lookup.max()) + 1) // 2)
        generator = np.random.default_rng(seed + 10007 * layer)
        self.multipliers = [2 * int(value) + 1 for value in generator.integers(0, bound, longest, dtype=np.int64)]

    def rows(self, ids: list[int]) -> list[list[int]]:
        heads = len(self.sizes) // (self.longest - 1)
        starts = np.cumsum([0, *self.sizes[:-1]]).tolist()
        found = []
        for place in range(len(ids)):
            tokens = [int(self.lookup[ids[place - k]]) if place >= k else self.pad for k in range(self.longest)]
            row = []
            for n in range(2, self.longest + 1):
                mix = 0
                for k in range(n):
                    mix ^= (tokens[k] * self.multipliers[k]) % 2**64
                mix -= 2**64 * (mix >= 2**63)
                for head in range(heads):
                    number = (n - 2) * heads + head
                    row.append(starts[number] + mix % self.sizes[number])
            found.append(row)
        return found

    def residual(self, ids: list[int], hidden: np.ndarray) -> np.ndarray:
        """Return what is added to the hidden states [L, d]; one branch."""
        weights, width = self.weights, hidden.shape[1]
        memory = weights["multi_head_embedding.embedding.weight"][np.array(self.rows(ids))].reshape(len(ids), -1)
        value = memory @ weights["value_proj.weight"].T + weights["value_proj.bias"]
        key = memory @ weights["key_projs.0.weight"].T + weights["key_projs.0.bias"]
        key = rms(key, weights["norm1.0.weight"], 2.0**-23)
        query = rms(hidden.astype(np.float64), weights["norm2.0.weight"], 2.0**-23)
        score = (key * query).sum(1) / math.sqrt(width)
        gate = 1 / (1 + np.exp(-np.sqrt(np.maximum(abs(score), 1e-6)) * np.sign(score)))
        value = gate[:, None] * value
        normed = rms(value, weights["short_conv.norms.0.weight"], 1e-5)
        taps = weights["short_conv.conv.weight"][:, 0]
        total = np.zeros_like(value)
        for place in range(len(ids)):
            for back in range(taps.shape[1]):
                earlier = place - back * self.dilation
                if earlier >= 0:
                    total[place] += taps[:, -1 - back] * normed[earlier]
        return value + total / (1 + np.exp(-total))


def rms(values: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return values / np.sqrt((values**2).mean(-1, keepdims=True) + eps) * weight


def write_tinyengram(
    folder: Path,
    *,
    sizes: list[int],
    layers: list[int],
    longest: int,
    heads: int,
    head_width: int,
    width: int,
    config: dict[str, Any] | None = None,
    shards: int = 0,
    base: dict[str, torch.Tensor] | None = None,
    dtype: str = "f32",
    kernel: int = 4,
) -> dict[int, dict[str, np.ndarray]]:
    """Write a checkpoint of TinyEngram's trainer and return each layer's weights.

    Args:
        folder: where to.
        sizes: requested sizes, one for each n.
        layers: in the order of the configuration.
        longest: N.
        heads: of each n.
        head_width: channels of a head.
        width: of the model.
        config: further fields of `engram_cfg`; None writes no configuration.
        shards: files that the tensors are spread over; 0 writes one file without index.
        base: weights of the base model.
        dtype: of the memory's weights, `f32` or `f16`.
        kernel: taps of the convolution.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = find_sizes(sizes, heads, layers)
    retrieved = (longest - 1) * heads * head_width
    weights: dict[int, dict[str, np.ndarray]] = {}
    tensors: dict[str, np.ndarray] = {}
    for layer in layers:
        shapes = {
            "multi_head_embedding.embedding.weight": (sum(found[layer]), head_width),
            "value_proj.weight": (width, retrieved),
            "value_proj.bias": (width,),
            "key_projs.0.weight": (width, retrieved),
            "key_projs.0.bias": (width,),
            "norm1.0.weight": (width,),
            "norm2.0.weight": (width,),
            "short_conv.conv.weight": (width, 1, kernel),
            "short_conv.norms.0.weight": (width,),
        }
        weights[layer] = noise(shapes, layer)
        for name, value in weights[layer].items():
            tensors[f"model.engram_layers.{layer}.{name}"] = value.astype(np.float16) if dtype == "f16" else value
        offsets = np.cumsum([0, *found[layer][:-1]]).astype(np.int64)
        tensors[f"model.engram_layers.{layer}.multi_head_embedding.offsets"] = offsets
    tensors |= {name: np.ascontiguousarray(value.numpy()) for name, value in (base or {}).items()}
    if config is not None:
        fields = {
            "tokenizer_name_or_path": "/somewhere/Qwen3",
            "engram_vocab_size": sizes,
            "max_ngram_size": longest,
            "n_embed_per_ngram": heads * head_width,
            "n_head_per_ngram": heads,
            "layer_ids": layers,
            "pad_id": 2,
            "seed": 0,
            "kernel_size": kernel,
            "warmup_steps": 0,
            "soft_constraint_steps": 0,
        }
        (folder / "generation_config.json").write_text(json.dumps({"engram_cfg": fields | config}))
    if not shards:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return weights
    names = sorted(tensors)
    files = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    places = {name: files[number % shards] for number, name in enumerate(names)}
    for file in files:
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return weights


def peft_shapes(sizes: list[int], width: int, retrieved: int, heads: int, branches: int, kernel: int) -> dict[str, Any]:
    """Return the shapes of one layer in an adapter of engram-peft."""
    shapes: dict[str, tuple[int, ...]] = {
        "multi_head_embedding.embedding.weight": (sum(sizes), retrieved // len(sizes)),
        "gating.w_v.weight": (width, retrieved),
        "short_conv.conv.weight": (branches * width, 1, kernel),
    }
    for branch in range(branches):
        shapes[f"gating.w_k.{branch}.weight"] = (width, retrieved)
        for norm in ("gating.norm_h", "gating.norm_k", "short_conv.norms"):
            shapes[f"{norm}.{branch}.weight"] = (width,)
    return shapes


def write_peft(folder: Path, config: dict[str, Any]) -> None:
    """Write an adapter of engram-peft whose weights follow from its configuration.

    Args:
        folder: where to.
        config: what its `config.json` holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    heads, layers = config["n_head_per_ngram"], sorted(config["target_layers"])
    found = find_sizes([total // heads for total in config["engram_vocab_size_per_ngram"]], heads, layers)
    tensors = {}
    for layer in layers:
        shapes = peft_shapes(
            found[layer],
            config["hidden_size"],
            config["embedding_dim"],
            heads,
            config["hc_mult"],
            config["conv_kernel_size"],
        )
        tensors |= {f"{layer}.{name}": value for name, value in noise(shapes, layer).items()}
        offsets = np.cumsum([0, *found[layer][:-1]]).astype(np.int64)
        tensors[f"{layer}.multi_head_embedding.offsets"] = offsets
    save_file(tensors, folder / "engram_adapters.safetensors", metadata={"format": "engram-peft"})
    (folder / "config.json").write_text(json.dumps(config))
