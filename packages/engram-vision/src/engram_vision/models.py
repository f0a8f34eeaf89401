"""Loading Stable Diffusion 1.x pipelines: hub ids, folders in diffusers layout, single files, and `tiny`."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from engram_core import InputError
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import Device, Precision
from engram_vision.shipped import TINY, tiny_fingerprint, tiny_folder

__all__ = ["check_pipeline", "load_pipeline", "model_fingerprint", "pick_device"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SINGLE_FILES = (".safetensors", ".ckpt")
_MODULES = {
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
}
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}


def model_fingerprint(model: str) -> str | None:
    """Return the hex SHA-256 of the shipped checkpoint's weights; None for other models, which have many forms."""
    return tiny_fingerprint() if model == TINY else None


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


def load_pipeline(model: str, *, precision: Precision = "fp32", device: torch.device | None = None) -> Any:
    """Return a Stable Diffusion 1.x pipeline, without its safety checker.

    Args:
        model: hub id, folder in diffusers layout, single `.safetensors` or `.ckpt` file, or `tiny`.
        precision: number type of the weights.
        device: where to put it; None means the CPU.

    Raises:
        InputError: it cannot be found or read, or is another kind of model.
    """
    source = tiny_folder() if model == TINY else Path(model).expanduser()
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no safety checker, slow loading, missing torchvision: all meant
        if source.is_dir():
            _check_index(model, _read_index(source))
            pipeline = _load_parts(model, str(source), _DTYPES[precision])
        elif source.is_file():
            pipeline = _load_single_file(model, source, _DTYPES[precision])
        elif _looks_like_path(model):
            raise InputError(f"{model}: does not exist; give a hub id, a folder, a single file, or {TINY!r}")
        else:
            pipeline = _load_from_hub(model, _DTYPES[precision])
    check_pipeline(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def check_pipeline(pipeline: Any, model: str) -> None:
    """Raise InputError unless a pipeline is Stable Diffusion 1.x."""
    if type(pipeline).__name__ != "StableDiffusionPipeline":
        raise InputError(f"{model}: is a {type(pipeline).__name__}, expected a Stable Diffusion 1.x model")
    missing = [name for name in (*_MODULES, "tokenizer", "scheduler") if getattr(pipeline, name, None) is None]
    if missing:
        raise InputError(f"{model}: has no {', '.join(missing)}; expected a whole Stable Diffusion 1.x model")
    unet, text = pipeline.unet.config, pipeline.text_encoder.config
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"{model}: its U-Net has {unet.in_channels} input channels, text to image has "
            f"{pipeline.vae.config.latent_channels}; inpainting and depth models are not supported"
        )
    if text.model_type == "clip_text_model" and text.hidden_size == 1024:  # OpenCLIP ViT-H, its last state but one
        raise InputError(f"{model}: is Stable Diffusion 2 (text states of width 1024), expected 1.x")
    if text.model_type != "clip_text_model" or unet.cross_attention_dim != text.hidden_size:
        raise InputError(
            f"{model}: its U-Net reads states of width {unet.cross_attention_dim}, its text encoder "
            f"({text.model_type}) gives {text.hidden_size}; this is not Stable Diffusion 1.x"
        )


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        return {**index, "_class_name": index["_class_name"]}
    except FileNotFoundError:
        raise InputError(f"{folder}: has no model_index.json; expected a model in diffusers layout") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None


def _check_index(model: str, index: Mapping[str, Any]) -> None:
    """Refuse other kinds of models before their weights are loaded, or even downloaded."""
    kind = str(index["_class_name"])
    if not kind.startswith("StableDiffusion") or "3" in kind or "XL" in kind:
        raise InputError(f"{model}: is a {kind}, expected a Stable Diffusion 1.x model (StableDiffusionPipeline)")
    for name, (_, expected) in _MODULES.items():
        found = index.get(name)
        if not isinstance(found, list) or found[-1:] != [expected]:
            raise InputError(f"{model}: its {name} is {found}, expected {expected} as in Stable Diffusion 1.x")


def _load_parts(model: str, source: str, dtype: torch.dtype, remedy: str = "") -> Any:
    """Load a model in diffusers layout; the modules one by one, because a pipeline does not tell what was missing."""
    modules: dict[str, Any] = {}
    for name, (library, kind) in _MODULES.items():
        loader = getattr(importlib.import_module(library), kind).from_pretrained
        options = {"subfolder": name, "torch_dtype": dtype, "output_loading_info": True}
        modules[name], report = _load(model, remedy, loader, source, **options)
        _expect_whole(model, name, report["missing_keys"])
    return _load(model, remedy, _pipeline_class().from_pretrained, source, **modules, **_NO_CHECKER)


def _load_from_hub(model: str, dtype: torch.dtype) -> Any:
    remedy = "; there is no such folder here, and a hub id needs the network or the hub's cache"
    _check_index(model, _load(model, remedy, _pipeline_class().load_config, model))
    return _load_parts(model, model, dtype, remedy)


def _load_single_file(model: str, source: Path, dtype: torch.dtype) -> Any:
    """Load a checkpoint in the layout of Stable Diffusion's authors, which has weights but no configuration."""
    if source.suffix not in _SINGLE_FILES:
        raise InputError(f"{model}: is not a model; expected a folder, or a file {' or '.join(_SINGLE_FILES)}")
    options: dict[str, Any] = {"torch_dtype": dtype, **_NO_CHECKER}
    remedy = "; a single file takes its configuration from the hub, unless a model_index.json lies beside it"
    if (source.parent / "model_index.json").is_file():  # as in the published repository
        _check_index(model, _read_index(source.parent))
        options["config"], remedy = str(source.parent), ""
    pipeline = _load(model, remedy, _pipeline_class().from_single_file, str(source), **options)
    for name in _MODULES:
        weights = getattr(pipeline, name).state_dict()
        _expect_whole(model, name, [key for key, weight in weights.items() if weight.is_meta])
    return pipeline


def _expect_whole(model: str, name: str, missing: Collection[str]) -> None:
    """Refuse what the libraries accept: they make up missing weights at random, or leave them without values."""
    if missing:
        raise InputError(
            f"{model}: cannot be loaded: {len(missing)} weights of its {name} are missing, e.g. {min(missing)}; "
            "download it again"
        )


def _pipeline_class() -> Any:
    return importlib.import_module("diffusers").StableDiffusionPipeline  # talks of torchvision when first imported


def _load(model: str, remedy: str, loader: Any, source: str, **options: Any) -> Any:
    try:
        return loader(source, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{model}: cannot be loaded as a Stable Diffusion 1.x model: {type(error).__name__}: {reason}{remedy}"
        ) from error


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith(_SINGLE_FILES)
