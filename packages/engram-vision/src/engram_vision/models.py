"""Loading Stable Diffusion 1.x pipelines: hub ids, folders in diffusers layout, single files, and `tiny`."""

from __future__ import annotations

import contextlib
import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from engram_core import InputError
from engram_vision.settings import Device, Precision
from engram_vision.shipped import TINY, tiny_fingerprint, tiny_folder

__all__ = ["check_pipeline", "load_pipeline", "model_fingerprint", "pick_device"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SINGLE_FILES = (".safetensors", ".ckpt")


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
    options: dict[str, Any] = {"torch_dtype": _DTYPES[precision], "safety_checker": None}
    with _quiet():
        from diffusers import StableDiffusionPipeline  # talks about torchvision when it is first imported

        if source.is_dir():
            _check_index(source)
            pipeline = _load(StableDiffusionPipeline.from_pretrained, str(source), model, **options)
        elif source.is_file():
            if source.suffix not in _SINGLE_FILES:
                raise InputError(f"{source}: is not a model; expected a folder, or a file {' or '.join(_SINGLE_FILES)}")
            pipeline = _load(StableDiffusionPipeline.from_single_file, str(source), model, **options)
        elif _looks_like_path(model):
            raise InputError(f"{model}: does not exist; give a hub id, a folder, a single file, or {TINY!r}")
        else:
            pipeline = _load(StableDiffusionPipeline.from_pretrained, model, model, **options)
    check_pipeline(pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def check_pipeline(pipeline: Any, model: str) -> None:
    """Raise InputError unless a pipeline is Stable Diffusion 1.x."""
    if type(pipeline).__name__ != "StableDiffusionPipeline":
        raise InputError(f"{model}: is a {type(pipeline).__name__}, expected a Stable Diffusion 1.x model")
    unet, text = pipeline.unet.config, pipeline.text_encoder.config
    if unet.in_channels != pipeline.vae.config.latent_channels:
        raise InputError(
            f"{model}: its U-Net has {unet.in_channels} input channels, text to image has "
            f"{pipeline.vae.config.latent_channels}; inpainting and depth models are not supported"
        )
    if text.model_type != "clip_text_model" or unet.cross_attention_dim != text.hidden_size:
        raise InputError(
            f"{model}: its U-Net reads states of width {unet.cross_attention_dim}, its text encoder "
            f"({text.model_type}) gives {text.hidden_size}; this is not Stable Diffusion 1.x"
        )
    if text.hidden_size == 1024:  # OpenCLIP ViT-H reads the last state but one
        raise InputError(f"{model}: is Stable Diffusion 2 (text states of width 1024), expected 1.x")


def _check_index(folder: Path) -> None:
    file = folder / "model_index.json"
    try:
        kind = json.loads(file.read_text(encoding="utf-8"))["_class_name"]
    except FileNotFoundError:
        raise InputError(f"{folder}: has no model_index.json; expected a model in diffusers layout") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None
    if not str(kind).startswith("StableDiffusion") or "3" in str(kind) or "XL" in str(kind):
        raise InputError(f"{folder}: is a {kind}, expected a Stable Diffusion 1.x model (StableDiffusionPipeline)")


def _load(loader: Any, source: str, model: str, **options: Any) -> Any:
    try:
        return loader(source, **options)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{model}: cannot be loaded as a Stable Diffusion 1.x model: {type(error).__name__}: {reason}"
        ) from error


def _looks_like_path(model: str) -> bool:
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith(_SINGLE_FILES)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries from talking about what is meant: no safety checker, slow loading, missing torchvision."""
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        bars = [module for module in (diffusers_logging, transformers_logging) if module.is_progress_bar_enabled()]
        for module in bars:
            module.disable_progress_bar()
        try:
            yield
        finally:
            for module in bars:
                module.enable_progress_bar()
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
