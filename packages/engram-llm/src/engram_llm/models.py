"""Loading decoder language models and their tokenizers: hub ids, folders in transformers layout, and `tiny`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engram_core import InputError, Manifest, StreamSpec, wrap_tokenizer
from engram_core.errors import one_line
from engram_llm.attachment import find_decoder
from engram_llm.quiet import quiet_libraries
from engram_llm.settings import Device, Precision
from engram_llm.shipped import TINY, known_fingerprint, model_place

__all__ = [
    "DTYPES",
    "SITE",
    "describe_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "model_name",
    "pick_device",
]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Each precision's number type."""

SITE = "decoder_layer_input"
"""Where a memory edits: the hidden states before chosen decoder layers."""


def pick_device(device: Device, precision: Precision = "fp32") -> torch.device:
    """Return the device to use; `auto` takes CUDA, then Apple's GPU, then the CPU.

    Raises:
        InputError: the device is not there, or cannot compute in the precision.
    """
    present = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    name = next(name for name in ("cuda", "mps", "cpu") if present[name]) if device == "auto" else device
    if not present[name]:
        there = ", ".join(name for name, is_there in present.items() if is_there)
        raise InputError(f"device {name!r} is not available here; available: {there}")
    if name == "cpu" and precision == "fp16":
        raise InputError("precision fp16 needs a GPU; use bf16 or fp32 on the CPU")
    return torch.device(name)


def load_config(model: str) -> Any:
    """Return the configuration of a decoder's text part; loads no weights.

    Raises:
        InputError: it cannot be found or read, or belongs to no decoder.
    """
    config = _load(AutoConfig.from_pretrained, model)
    if getattr(config, "is_encoder_decoder", False):
        raise InputError(f"{model}: is an encoder and a decoder ({config.model_type}); a memory needs a decoder alone")
    return config.get_text_config(decoder=True)


def load_tokenizer(model: str) -> Any:
    """Return a model's tokenizer, in transformers' class.

    Raises:
        InputError: it cannot be found or read.
    """
    return _load(AutoTokenizer.from_pretrained, model)


def load_model(model: str, precision: Precision = "fp32", device: torch.device | None = None) -> Any:
    """Return a decoder language model, frozen, in evaluation mode.

    Args:
        model: hub id, folder in transformers layout, or `tiny`.
        precision: number type of the weights.
        device: where to put it; None means the CPU.

    Raises:
        InputError: it cannot be found or read, or is another kind of model.
    """
    loaded, report = _load(
        AutoModelForCausalLM.from_pretrained, model, dtype=DTYPES[precision], output_loading_info=True
    )
    missing = report["missing_keys"]
    if missing:  # transformers would make them up at random
        raise InputError(
            f"{model}: cannot be loaded: {len(missing)} of its weights are missing, e.g. {min(missing)}; "
            "download it again"
        )
    try:
        find_decoder(loaded)
    except InputError as error:
        raise InputError(f"{model}: is no decoder language model: {error}") from None
    loaded.requires_grad_(False).eval()
    return loaded if device is None else loaded.to(device)


def model_name(model: str) -> str:
    """Return what to call a base model: of a local one its name, because its path means nothing to others."""
    path = Path(model).expanduser()
    return path.resolve().name if model != TINY and path.exists() else model


def describe_model(backbone: str, model: str, width: int, tokenizer: Any) -> Manifest:
    """Return what a memory for a model belongs to.

    Args:
        backbone: name of the backbone.
        model: hub id, folder, or `tiny`.
        width: d of its hidden states.
        tokenizer: its tokenizer.
    """
    spec = StreamSpec(width=width, site=SITE, tokenizer=wrap_tokenizer(tokenizer).spec)
    return Manifest(
        backbone=backbone,
        base_model=model_name(model),
        base_fingerprint=known_fingerprint(model_place(model)),
        streams={"text": spec},
    )


def _load(loader: Any, model: str, **options: Any) -> Any:
    place = model_place(model)
    path = Path(place).expanduser()
    if path.is_dir():
        place, remedy = str(path), ""
    elif path.exists():
        raise InputError(f"{model}: is a file; give a hub id, a folder in transformers layout, or {TINY!r}")
    elif _looks_like_path(model):
        raise InputError(f"{model}: does not exist; give a hub id, a folder in transformers layout, or {TINY!r}")
    else:
        remedy = "; there is no such folder here, and a hub id needs the network or the hub's cache"
    try:
        with quiet_libraries():
            return loader(place, **options)
    except Exception as error:
        reason = one_line(error, 300)
        raise InputError(
            f"{model}: cannot be loaded as a decoder language model: {type(error).__name__}: {reason}{remedy}"
        ) from error


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") > 1
