"""Adapters of engram-peft (PyPI, read with 1.2.7) as memories.

Its `save_pretrained` writes `config.json` and `engram_adapters.safetensors`. What it calls otherwise or counts in
another way: sizes of tables are for all heads of one n together, layers take primes in ascending order, `norm_k` is
`norm1` and `norm_h` is `norm2`, and projections have no bias. What it hashes in another way: multipliers go to the N
newest tokens from the oldest on, so that a shorter n-gram ends before its position; and tokens that were added to the
tokenizer keep their ids, beyond the compressed vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import (
    AdapterFormatError,
    AdapterReadError,
    ConvertSettings,
    HashedMemory,
    InputError,
    MemoryRecord,
    MemorySettings,
)
from engram_core.card import is_repo_id
from engram_core.errors import quote
from engram_llm.compression import compress_vocabulary
from engram_llm.foreign import ForeignLayer, check_shapes, check_sizes, expect_same, read_json
from engram_llm.models import describe_model, load_tokenizer

__all__ = ["convert_peft"]

_FIELDS: Mapping[str, type[Any]] = {
    "engram_vocab_size_per_ngram": list,
    "ngram_sizes": list,
    "n_head_per_ngram": int,
    "embedding_dim": int,
    "enable_tokenizer_compression": bool,
    "target_layers": list,
    "hc_mult": int,
    "conv_kernel_size": int,
    "hidden_size": int,
    "compressed_vocab_size": int,
    "pad_id": int,
    "seed": int,
}
# What changes how a memory is addressed or stored, and the one value that a memory of ours can have.
_ONLY: Mapping[str, tuple[Any, ...]] = {
    "engine": ("deepseek",),
    "table_spec": (None, "ENG_DEEPSEEK_V1"),
    "table_source": ("memory",),
    "prime_sizes": (None,),
}


def convert_peft(
    source: Path, folder: Path, layers: Mapping[int, ForeignLayer], settings: ConvertSettings, backbone: str
) -> HashedMemory:
    """Return an adapter as a memory.

    Args:
        source: as the user named it.
        folder: where its configuration lies.
        layers: its memory.
        settings: what the user said.
        backbone: name of the backbone.

    Raises:
        AdapterReadError: the configuration is missing.
        AdapterFormatError: fields or tensors are missing or do not fit one another.
        InputError: it has settings that a memory cannot have, or they contradict what the user said.
    """
    file = folder / "config.json"
    config = _read_config(file)
    memory = _read_settings(file, config)
    recorded = {"max_ngram": memory.max_ngram_size, "pad_id": memory.pad_id, "hash_seed": memory.seed}
    expect_same(settings, recorded, str(file))
    if sorted(layers) != list(memory.layer_ids):
        raise AdapterFormatError(
            f"{file}: target_layers is {list(memory.layer_ids)}, the weights have layers {sorted(layers)}"
        )
    check_sizes(memory, layers, str(file))
    names = _foreign_names(memory.hc_mult)
    for layer in layers.values():
        check_shapes(layer, memory.shapes(config["hidden_size"], sum(layer.sizes)), names)
    model = settings.model or config.get("tokenizer_name_or_path")
    if not isinstance(model, str) or (settings.model is None and not is_repo_id(model)):
        raise InputError(f"{file}: does not say which model it was trained on; pass it with --model")
    tokenizer = load_tokenizer(model)
    ours = memory.shapes(config["hidden_size"], 0)
    tensors = {
        number: {name: layer.tensors[names.get(name, name)] for name in ours} for number, layer in layers.items()
    }
    record = MemoryRecord(
        name=settings.name or source.resolve().stem,
        settings=memory,
        license=settings.license,
        training={
            "converted_from": "engram-peft",
            "version": str(config.get("engram_version")),
            "file": source.name,
            "beside_peft_adapter": (folder / "adapter_config.json").is_file(),
        },
    )
    manifest = describe_model(backbone, model, config["hidden_size"], tokenizer)
    return HashedMemory.build(manifest, record, _lookup(file, config, tokenizer, model), tensors, str(source))


def _read_config(file: Path) -> dict[str, Any]:
    config = read_json(file)
    if config is None:
        raise AdapterReadError(f"{file}: is missing; it is part of an engram-peft adapter")
    for name, only in _ONLY.items():
        if config.get(name, only[0]) not in only:
            raise InputError(
                f"{file}: {name} is {quote(config[name])}, which this memory cannot have; "
                f"adapters with {only[0]!r} can be imported"
            )
    if config.get("train_mode") == "full_finetune":
        raise InputError(
            f"{file}: train_mode is 'full_finetune': the base model's weights were trained as well and are not in "
            "the adapter, so it does not work on the base model"
        )
    for name, kind in _FIELDS.items():
        value = config.get(name)
        if type(value) is not kind or (kind is list and not (value and all(type(item) is int for item in value))):
            raise AdapterFormatError(f"{file}: {name} is {quote(value)}, expected {kind.__name__}")
    return config


def _read_settings(file: Path, config: Mapping[str, Any]) -> MemorySettings:
    ngrams, heads = config["ngram_sizes"], config["n_head_per_ngram"]
    longest = len(ngrams) + 1
    if ngrams != list(range(2, longest + 1)):
        raise InputError(
            f"{file}: ngram_sizes is {ngrams}; a memory has all n-grams from 2 to the longest, in order, and cannot "
            "leave out any"
        )
    totals, width = config["engram_vocab_size_per_ngram"], config["embedding_dim"]
    if len(totals) < len(ngrams):
        raise AdapterFormatError(f"{file}: engram_vocab_size_per_ngram has {len(totals)} sizes for {len(ngrams)} n")
    if heads < 1 or width % (len(ngrams) * heads):
        raise AdapterFormatError(
            f"{file}: embedding_dim is {width}, expected a multiple of {len(ngrams)} n-gram sizes by {heads} heads"
        )
    dilation = config.get("conv_dilation")
    return MemorySettings(
        engram_vocab_size=tuple(total // heads for total in totals[: len(ngrams)]),
        max_ngram_size=longest,
        n_embed_per_ngram=width // len(ngrams),
        n_head_per_ngram=heads,
        layer_ids=tuple(sorted(config["target_layers"])),
        kernel_size=config["conv_kernel_size"],
        dilation=longest if dilation is None else dilation,
        hc_mult=config["hc_mult"],
        bias=False,
        pad_id=config["pad_id"],
        seed=config["seed"],
        hashing="engram-peft",
    )


def _foreign_names(n_branches: int) -> dict[str, str]:
    names = {"value_proj.weight": "gating.w_v.weight"}
    for branch in range(n_branches):
        names |= {
            f"key_projs.{branch}.weight": f"gating.w_k.{branch}.weight",
            f"norm1.{branch}.weight": f"gating.norm_k.{branch}.weight",
            f"norm2.{branch}.weight": f"gating.norm_h.{branch}.weight",
        }
    return names


def _lookup(file: Path, config: Mapping[str, Any], tokenizer: Any, model: str) -> npt.NDArray[np.int32]:
    """Return token id to compressed id as engram-peft has it."""
    size, pad_id = config["compressed_vocab_size"], config["pad_id"]
    if not config["enable_tokenizer_compression"]:
        lookup = np.arange(size, dtype=np.int32)
    else:
        lookup, n_plain = compress_vocabulary(tokenizer), tokenizer.vocab_size
        found = int(lookup[:n_plain].max()) + 1
        if found != size:
            raise InputError(
                f"{file}: compressed_vocab_size is {size}, the tokenizer of {model} gives {found}; pass --model with "
                "the model it was trained on"
            )
        if n_plain == size < len(lookup):
            # The file could not tell the added tokens' ids from compressed ones.
            raise InputError(
                f"{file}: all {size} tokens of {model} but those added later have compressed ids of their own, which "
                "a memory cannot hold"
            )
        lookup[n_plain:] = np.arange(n_plain, len(lookup))
    if not 0 <= pad_id < len(lookup):
        raise InputError(f"{file}: pad_id is {pad_id}, the vocabulary has 0 to {len(lookup) - 1}")
    return lookup
