"""How much memory a training run will need, from the configuration files of a model alone.

Every module is built on PyTorch's meta device, where tensors have shapes and types but no values. There the parts of
the run are gone through for real, backward pass included, while the bytes are counted that live at the same time.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engram_vision.families import LAST, SD35, Family, TextPart
from engram_vision.meter import FusedAttention, measured, n_bytes, tensors_of
from engram_vision.models import DTYPES
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import Precision
from engram_vision.shipped import model_place
from engram_vision.training.frozen import TEXTS_AT_ONCE

__all__ = ["Estimate", "Probe", "estimate_memory", "estimate_with", "offload_blocks", "views_at_once"]

_META = torch.device("meta")
# What reading strangers' configurations, and running what they describe, may raise.
_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """What a run will need, in bytes.

    Not in it: what the device's driver keeps for itself (some 0.5 GB with CUDA), what libraries use as workspace, and
    vectors, scales, gradients and moments, which are small.

    Attributes:
        modules: name to bytes of its weights and buffers, of every module that is loaded.
        encoding: on the device while pictures and captions are encoded; VAE and text encoders are there one by one.
        training: on the device during the steps.
        host: in host memory, where modules wait that are not at work.
        encoder: of those that encode, the one that needs the most.
        encoder_weights: its part of `modules`.
        denoiser: name of the module that the steps go through.
        weights: of the denoiser on the device; in low memory its largest block and what is outside of the blocks.
        activations: peak of everything else on the device in a step.
        conditions: what the estimate is for, in words.
    """

    modules: Mapping[str, int]
    encoding: int
    training: int
    host: int
    encoder: str
    encoder_weights: int
    denoiser: str
    weights: int
    activations: int
    conditions: str

    def show(self) -> str:
        """Return two lines for people, in GB of 10⁹ bytes."""
        return (
            f"needs about {_gigabytes(self.encoding)} while encoding ({self.encoder} "
            f"{_gigabytes(self.encoder_weights)}, activations {_gigabytes(self.encoding - self.encoder_weights)}) "
            f"and {_gigabytes(self.training)} while training ({self.denoiser} {_gigabytes(self.weights)}, "
            f"activations {_gigabytes(self.activations)} {self.conditions}),\n"
            f"and {_gigabytes(self.host)} of host memory"
        )


class Probe(Protocol):
    """Goes through the parts of a run whose shapes depend on what is drawn, with tensors on the meta device."""

    def encode(self, vae: Any) -> None:
        """Run the autoencoder over as many samples as it gets at once."""

    def step(self, denoiser: Any) -> None:
        """Run the denoiser and go back to the text states, which need gradients."""

    def describe(self) -> str:
        """Return the size in words, as `at 512 px`."""


def estimate_memory(
    family: Family,
    model: str,
    *,
    precision: Precision,
    resolution: int | None,
    batch_size: int,
    gradient_checkpointing: bool,
    low_memory: bool,
    without: Collection[str] = (),
) -> Estimate | None:
    """Return what training on pictures will need; see `estimate_with`.

    Args:
        family: what kind of model it is.
        model: hub id, folder in diffusers layout, single file, or `tiny`.
        precision: number type of the weights.
        resolution: pixels a side; None means the model's own.
        batch_size: pictures a step on one device.
        gradient_checkpointing: whether the denoiser's own is on.
        low_memory: whether the denoiser's blocks take turns on the device, each a gradient checkpoint.
        without: streams whose optional text encoders are not loaded.
    """

    def make_probe(modules: Mapping[str, Any]) -> Probe:
        denoiser = modules[family.denoiser]
        factor = 2 ** (len(modules["vae"].config.block_out_channels) - 1)
        pixels = resolution or int(denoiser.config.sample_size) * factor
        return _PictureProbe(family, pixels, factor, batch_size)

    return estimate_with(
        make_probe,
        family,
        model,
        precision=precision,
        batch_size=batch_size,
        gradient_checkpointing=gradient_checkpointing,
        low_memory=low_memory,
        without=without,
    )


def estimate_with(
    make_probe: Callable[[Mapping[str, Any]], Probe],
    family: Family,
    model: str,
    *,
    precision: Precision,
    batch_size: int,
    gradient_checkpointing: bool,
    low_memory: bool,
    without: Collection[str] = (),
) -> Estimate | None:
    """Return what training in front of a model will need; None where its configuration cannot be had or understood.

    No weights are read. Of a model on the hub only configuration files are downloaded, and a single file is known only
    with its repository's `model_index.json` beside it.

    Attention is counted as the fused kernels of a GPU do it, which keep no scores. Where PyTorch falls back on the
    plain one, as with some devices and head sizes, a step needs more.

    Args:
        make_probe: given the modules by name, what runs them.
        family: what kind of model it is.
        model: hub id, folder in diffusers layout, single file, or `tiny`.
        precision: number type of the weights.
        batch_size: samples a step on one device.
        gradient_checkpointing: whether the denoiser's own is on.
        low_memory: whether the denoiser's blocks take turns on the device, each a gradient checkpoint.
        without: streams whose optional text encoders are not loaded.
    """
    try:
        with quiet_libraries(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            modules = _build(family, _source(family, model), DTYPES[precision], without)
            return _estimate(
                family,
                modules,
                make_probe(modules),
                batch_size=batch_size,
                gradient_checkpointing=gradient_checkpointing,
                low_memory=low_memory,
            )
    except _FAILURES:
        return None


def views_at_once(pixels: int) -> int:
    """Return how many pictures of some pixels a side the VAE encodes at once: of large ones a single one fills it."""
    return max(1, min(4, 4 * 512**2 // pixels**2))


def offload_blocks(denoiser: Any) -> list[nn.Module]:
    """Return the parts of a denoiser that can take turns on a device: together nearly all its weights, each small.

    Args:
        denoiser: a transformer with `transformer_blocks` or `blocks`, or a `UNet2DConditionModel`.
    """
    for name in ("transformer_blocks", "blocks"):
        if hasattr(denoiser, name):
            return list(getattr(denoiser, name))
    parts: list[nn.Module] = []
    for level in (*denoiser.down_blocks, denoiser.mid_block, *denoiser.up_blocks):
        if level is None:
            continue
        parts += level.resnets
        for attention in filter(None, getattr(level, "attentions", ())):
            parts += attention.transformer_blocks
    return parts


def _source(family: Family, model: str) -> str:
    """Return the folder or hub id that holds the configuration of a model."""
    place = model_place(family.name, model)
    path = Path(place).expanduser()
    if path.is_file():
        path = path.parent
        if not (path / "model_index.json").is_file():
            raise ValueError(f"{model}: no configuration")
    return str(path) if path.exists() else place


def _build(family: Family, source: str, dtype: torch.dtype, without: Collection[str]) -> dict[str, nn.Module]:
    """Return a pipeline's modules without values, by name, in the number types they would be loaded in."""
    pipeline_class = getattr(importlib.import_module("diffusers"), family.pipeline_class)
    index = pipeline_class.load_config(source)
    left_out = {family.streams[stream].encoder for stream in without}
    modules = {}
    for name, (library, kind) in family.modules().items():
        if name in left_out or index.get(name) in (None, [None, None]):
            continue
        module_class = getattr(importlib.import_module(library), kind)
        if library == "diffusers":
            build = functools.partial(module_class.from_config, module_class.load_config(source, subfolder=name))
        else:
            build = functools.partial(module_class, module_class.config_class.from_pretrained(source, subfolder=name))
        with _META:
            module: nn.Module = build()
        module.to(torch.float32 if name == "vae" and family.vae_in_fp32 else dtype).requires_grad_(False)
        if dtype == torch.float16:
            for place, part in module.named_modules():
                if place.rpartition(".")[2] in (getattr(module, "_keep_in_fp32_modules", None) or ()):
                    part.float()
        modules[name] = module
    return modules


def _estimate(
    family: Family,
    modules: Mapping[str, Any],
    probe: Probe,
    *,
    batch_size: int,
    gradient_checkpointing: bool,
    low_memory: bool,
) -> Estimate:
    denoiser = modules[family.denoiser]
    sizes = {name: n_bytes(tensors_of(module)) for name, module in modules.items()}
    encoders = {
        f"{stream} encoder": (sizes[part.encoder], _measure_encoder(modules[part.encoder], part))
        for stream, part in family.streams.items()
        if part.encoder in modules
    }
    encoders["VAE"] = _measure_vae(modules["vae"], probe)
    encoder = max(encoders, key=lambda name: sum(encoders[name]))
    blocks = offload_blocks(denoiser)
    weights = sizes[family.denoiser]
    if low_memory:
        inside = [n_bytes(block.parameters()) for block in blocks]
        weights += max(inside) - sum(inside)
        for block in blocks:
            block.forward = functools.partial(_checkpoint, block.forward)
    elif gradient_checkpointing:
        denoiser.enable_gradient_checkpointing(_checkpoint)
    denoiser.train()
    with measured(denoiser) as meter:
        probe.step(denoiser)
    activations = meter.peak
    how = "low memory" if low_memory else f"{'' if gradient_checkpointing else 'no '}gradient checkpointing"
    return Estimate(
        modules=sizes,
        encoding=sum(encoders[encoder]),
        training=weights + activations,
        host=sum(sizes.values()),
        encoder=encoder,
        encoder_weights=encoders[encoder][0],
        denoiser=f"one block at a time of the {family.denoiser}" if low_memory else family.denoiser,
        weights=weights,
        activations=activations,
        conditions=f"{probe.describe()}, batch {batch_size}, {how}",
    )


class _PictureProbe:
    """Pictures of one size, through the denoiser of a family."""

    def __init__(self, family: Family, pixels: int, factor: int, batch_size: int) -> None:
        self._family, self._pixels, self._factor, self._batch_size = family, pixels, factor, batch_size

    def encode(self, vae: Any) -> None:
        pixels = self._pixels
        vae.encode(torch.empty(views_at_once(pixels), 3, pixels, pixels, dtype=vae.dtype, device=_META))

    def step(self, denoiser: Any) -> None:
        config, dtype, batch_size = denoiser.config, denoiser.dtype, self._batch_size

        def empty(*shape: int, **options: Any) -> Tensor:
            return torch.empty(batch_size, *shape, dtype=dtype, device=_META, **options)

        streams = self._family.streams
        clip = max(part.max_length for part in streams.values() if part.model_type != "t5")
        inputs: dict[str, Any] = {"timestep": torch.empty(batch_size, dtype=torch.float32, device=_META)}
        if self._family is SD35:
            # Where T5 is left out, zeros stand for its states.
            length = clip + streams["t5"].max_length
            inputs["encoder_hidden_states"] = empty(length, config.joint_attention_dim, requires_grad=True)
            inputs["pooled_projections"] = empty(config.pooled_projection_dim)
        else:
            inputs["encoder_hidden_states"] = empty(clip, config.cross_attention_dim, requires_grad=True)
            if config.addition_embed_type == "text_time":
                pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
                inputs["added_cond_kwargs"] = {"text_embeds": empty(pooled), "time_ids": empty(6)}
        side = self._pixels // self._factor
        guess = denoiser(empty(config.in_channels, side, side), **inputs, return_dict=False)[0]
        guess.backward(torch.empty_like(guess))

    def describe(self) -> str:
        return f"at {self._pixels} px"


@torch.no_grad()
def _measure_vae(vae: Any, probe: Probe) -> tuple[int, int]:
    """Return the bytes of the weights, and the peak of everything else while samples are encoded."""
    if vae.dtype == torch.float16 and vae.config.get("force_upcast"):
        vae.float()  # as it is for encoding
    with measured(vae) as meter:
        probe.encode(vae)
    return n_bytes(tensors_of(vae)), meter.peak


@torch.no_grad()
def _measure_encoder(encoder: Any, part: TextPart) -> int:
    """Return the peak bytes, weights apart, while texts are encoded."""
    length = min(part.max_length, getattr(encoder.config, "max_position_embeddings", part.max_length))
    with measured(encoder) as meter:
        ids = torch.zeros(TEXTS_AT_ONCE, length, dtype=torch.long, device=_META)
        encoder(ids, output_hidden_states=part.site != LAST)
    return meter.peak


def _checkpoint(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a part of the denoiser as a gradient checkpoint."""

    def again(*args: Any, **kwargs: Any) -> Any:
        with FusedAttention():  # off in the backward pass, which runs it a second time
            return run(*args, **kwargs)

    return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
