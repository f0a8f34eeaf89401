"""Loading Wan models: text to video, and image to video for the clip-set builder."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import torch

from engram_core import InputError
from engram_core.errors import one_line
from engram_video.families import WAN22
from engram_video.frames import check_frame_count, check_size
from engram_video.training.flow import two_experts
from engram_vision.models import DTYPES, load_pipeline
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import Precision
from engram_vision.shipped import TINY, model_place

__all__ = ["check_model", "check_shape", "load_image_to_video", "size_multiple"]

_SMALLEST_STEP = 16  # pixels; diffusers insists on it
_PATCH, _SIDE, _GROUP = (1, 2, 2), 8, 4  # diffusers' own, where a configuration does not tell


def check_model(model: str) -> None:
    """Refuse a model that cannot be trained, by its configuration alone, before its weights are loaded.

    Raises:
        InputError: it has two transformers.
    """
    from diffusers import WanPipeline

    place = Path(model_place(WAN22.name, model)).expanduser()
    try:
        with quiet_libraries():
            index: Any = WanPipeline.load_config(str(place) if place.is_dir() else model)
    except (OSError, ValueError):
        return  # what is wrong with it is told when it is loaded
    if index.get("transformer_2") not in (None, [None, None]):
        raise two_experts(model)


def check_shape(model: str, width: int, height: int, frames: int) -> None:
    """Refuse clips that a model cannot draw or read, by its configurations alone, before its weights are loaded.

    Args:
        model: hub id, folder in diffusers layout, or `tiny`.
        width: pixels.
        height: pixels.
        frames: of a clip.

    Raises:
        InputError: the message names the nearest that is allowed.
    """
    from diffusers import AutoencoderKLWan, WanTransformer3DModel

    place = Path(model_place(WAN22.name, model)).expanduser()
    source = str(place) if place.is_dir() else model
    try:
        with quiet_libraries():
            autoencoder: Any = AutoencoderKLWan.load_config(source, subfolder="vae")
            transformer: Any = WanTransformer3DModel.load_config(source, subfolder="transformer")
    except (OSError, ValueError):
        return  # what is wrong with it is told when it is loaded
    patch = max(transformer.get("patch_size", _PATCH)[1:])
    check_size(width, height, math.lcm(_SMALLEST_STEP, autoencoder.get("scale_factor_spatial", _SIDE) * patch))
    check_frame_count(frames, autoencoder.get("scale_factor_temporal", _GROUP))


def size_multiple(pipeline: Any) -> int:
    """Return what width and height must be a multiple of, in pixels."""
    patch = max(pipeline.transformer.config.patch_size[1:])
    return math.lcm(_SMALLEST_STEP, pipeline.vae_scale_factor_spatial * patch)


def load_image_to_video(model: str, *, precision: Precision, device: torch.device | None = None) -> Any:
    """Return a `WanImageToVideoPipeline`.

    A text-to-video model whose transformer also continues a given first frame (Wan2.2-TI2V-5B, `tiny`) becomes one;
    others must be image-to-video models.

    Args:
        model: hub id, folder in diffusers layout, or `tiny`.
        precision: number type of the weights, the autoencoder's excepted.
        device: where to put it; None means the CPU.

    Raises:
        InputError: it cannot be found or read, or makes no clips of pictures.
    """
    from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanPipeline

    place = Path(model_place(WAN22.name, model)).expanduser()
    source = str(place) if place.is_dir() else model
    try:
        with quiet_libraries():
            index: Any = WanPipeline.load_config(source)
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise InputError(f"{model}: cannot be loaded: {type(error).__name__}: {reason}") from error
    if index.get("expand_timesteps"):
        base = load_pipeline(WAN22, model, precision=precision)
        pipeline: Any = WanImageToVideoPipeline(
            **base.components, expand_timesteps=True, boundary_ratio=base.config.boundary_ratio
        )
    elif index.get("_class_name") == "WanImageToVideoPipeline":
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                # In half precision its pictures lose contrast.
                vae = AutoencoderKLWan.from_pretrained(source, subfolder="vae", torch_dtype=torch.float32)
                pipeline = WanImageToVideoPipeline.from_pretrained(source, vae=vae, torch_dtype=DTYPES[precision])
            except Exception as error:
                reason = one_line(error)
                raise InputError(f"{model}: cannot be loaded: {type(error).__name__}: {reason}") from error
    else:
        raise InputError(
            f"{model}: is a {index.get('_class_name')} that makes no clips of pictures; use an image-to-video model, "
            f"such as {WAN22.default_model}, or {TINY!r}"
        )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)
