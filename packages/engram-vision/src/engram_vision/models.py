"""Loading diffusers pipelines: hub ids, folders in diffusers layout, single files, and `tiny`."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from engram_core import InputError
from engram_core.errors import one_line
from engram_vision.families import SD15, SD35, Family
from engram_vision.quiet import quiet_libraries
from engram_vision.settings import Device, Precision
from engram_vision.shipped import TINY, model_place, tiny_fingerprint

__all__ = ["DTYPES", "check_pipeline", "load_pipeline", "looks_like_path", "model_fingerprint", "pick_device"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Each precision's number type."""

_SINGLE_FILES = (".safetensors", ".ckpt")
_NO_CHECKER = {"safety_checker": None, "requires_safety_checker": False}


def model_fingerprint(family: Family, model: str) -> str | None:
    """Return the hex SHA-256 of the shipped checkpoint's weights; None for other models, which have many forms."""
    return tiny_fingerprint(family.name) if model == TINY else None


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


def load_pipeline(
    family: Family,
    model: str,
    *,
    precision: Precision = "fp32",
    device: torch.device | None = None,
    without: Collection[str] = (),
) -> Any:
    """Return a family's text-to-image pipeline, without a safety checker.

    Args:
        family: what kind of model to expect.
        model: hub id, folder in diffusers layout, single `.safetensors` or `.ckpt` file, or `tiny`.
        precision: number type of the weights.
        device: where to put it; None means the CPU.
        without: streams whose optional text encoders are not loaded, e.g. `("t5",)`.

    Raises:
        InputError: it cannot be found or read, or is another kind of model.
    """
    source = Path(model_place(family.name, model)).expanduser()
    loader = _Loader(family, model, DTYPES[precision], without)
    with quiet_libraries(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no safety checker, slow loading, missing torchvision: all meant
        if source.is_dir():
            pipeline = loader.from_folder(source)
        elif source.is_file():
            pipeline = loader.from_file(source)
        elif looks_like_path(model):
            raise InputError(f"{model}: does not exist; give a hub id, a folder, a single file, or {TINY!r}")
        else:
            pipeline = loader.from_hub()
    check_pipeline(family, pipeline, model)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline if device is None else pipeline.to(device)


def check_pipeline(family: Family, pipeline: Any, model: str) -> None:
    """Raise InputError unless a pipeline is of the family."""
    if type(pipeline).__name__ != family.pipeline_class:
        raise InputError(f"{model}: is a {type(pipeline).__name__}, expected a {family.title} model")
    needed = [name for part in family.streams.values() if not part.optional for name in (part.encoder, part.tokenizer)]
    missing = [name for name in (family.denoiser, "vae", *needed, "scheduler") if getattr(pipeline, name, None) is None]
    if missing:
        raise InputError(f"{model}: has no {', '.join(missing)}; expected a whole {family.title} model")
    denoiser = getattr(pipeline, family.denoiser).config
    latent_channels = pipeline.vae.config[family.latent_field]
    if denoiser.in_channels != latent_channels:
        raise InputError(
            f"{model}: its {family.denoiser} has {denoiser.in_channels} input channels, its vae {latent_channels}; "
            "models that also read a picture (inpainting, depth, image to video) are not supported"
        )
    widths = {part.encoder: _width(pipeline, part.encoder) for part in family.streams.values()}
    if family is SD15 and widths["text_encoder"] == 1024:  # OpenCLIP ViT-H, its last state but one
        raise InputError(f"{model}: is Stable Diffusion 2 (text states of width 1024), expected 1.x")
    read = denoiser[family.text_field]
    beside = sum(width for name, width in widths.items() if not (family is SD35 and name == "text_encoder_3"))
    # Stable Diffusion 3 fills the CLIPs' states up to the width of T5's, which follow them.
    fits = beside <= read == (widths["text_encoder_3"] or read) if family is SD35 else beside == read
    if not fits:
        given = ", ".join(f"{name} {width}" for name, width in widths.items() if width)
        raise InputError(
            f"{model}: its {family.denoiser} reads states of width {read}, its text encoders give {given}; "
            f"this is not {family.title}"
        )


def _width(pipeline: Any, encoder: str) -> int:
    """Return the width of an encoder's states; 0 where the pipeline lacks it."""
    module = getattr(pipeline, encoder)
    return 0 if module is None else int(module.config.hidden_size)


class _Loader:
    """Loads one model of a family, whatever form it has."""

    def __init__(self, family: Family, model: str, dtype: torch.dtype, without: Collection[str]) -> None:
        self._family, self._model, self._dtype = family, model, dtype
        # The tokenizer stays: it tells how long prompts are, also where zeros stand for the encoder's states.
        self._absent: dict[str, None] = dict.fromkeys(family.streams[stream].encoder for stream in without)
        self._options: dict[str, Any] = {**self._absent, **(_NO_CHECKER if family is SD15 else {})}

    def from_folder(self, folder: Path) -> Any:
        """Load a folder in diffusers layout."""
        index = _read_index(folder)
        self._check_index(index)
        return self._load_parts(str(folder), index)

    def from_hub(self) -> Any:
        """Load a repository of the hub, or of its cache."""
        remedy = "; there is no such folder here, and a hub id needs the network or the hub's cache"
        index = self._load(remedy, self._pipeline_class().load_config, self._model)
        self._check_index(index)
        return self._load_parts(self._model, index, remedy)

    def from_file(self, file: Path) -> Any:
        """Load a checkpoint in the layout of Stable Diffusion's authors, which has weights but no configuration."""
        if file.suffix not in _SINGLE_FILES:
            raise InputError(
                f"{self._model}: is not a model; expected a folder, or a file {' or '.join(_SINGLE_FILES)}"
            )
        options: dict[str, Any] = {"torch_dtype": self._dtype, **self._options}
        remedy = "; a single file takes its configuration from the hub, unless a model_index.json lies beside it"
        if (file.parent / "model_index.json").is_file():  # as in the published repository
            self._check_index(_read_index(file.parent))
            options["config"], remedy = str(file.parent), ""
        pipeline = self._load(remedy, self._pipeline_class().from_single_file, str(file), **options)
        for name in self._family.modules():
            module = getattr(pipeline, name)
            if module is not None:
                self._expect_whole(name, [key for key, weight in module.state_dict().items() if weight.is_meta])
        return pipeline

    def _check_index(self, index: Mapping[str, Any]) -> None:
        """Refuse other kinds of models before their weights are loaded, or even downloaded."""
        kind, family = str(index["_class_name"]), self._family
        stem = family.pipeline_class.removesuffix("Pipeline")
        if not kind.startswith(stem) or (family is SD15 and ("3" in kind or "XL" in kind)):
            raise InputError(f"{self._model}: is a {kind}, expected a {family.title} model ({family.pipeline_class})")
        optional = {part.encoder for part in family.streams.values() if part.optional} | {family.second_denoiser}
        for name, (_, expected) in family.modules().items():
            found = index.get(name)
            if name in optional and found in (None, [None, None]):
                continue
            if not isinstance(found, list) or found[-1:] != [expected]:
                raise InputError(f"{self._model}: its {name} is {found}, expected {expected} as in {family.title}")

    def _load_parts(self, source: str, index: Mapping[str, Any], remedy: str = "") -> Any:
        """Load the modules one by one, because a pipeline does not tell what was missing."""
        modules: dict[str, Any] = {}
        for name, (library, kind) in self._family.modules().items():
            if name in self._absent or index.get(name) in (None, [None, None]):
                continue
            loader = getattr(importlib.import_module(library), kind).from_pretrained
            dtype = torch.float32 if name == "vae" and self._family.vae_in_fp32 else self._dtype
            options = {"subfolder": name, "torch_dtype": dtype, "output_loading_info": True}
            modules[name], report = self._load(remedy, loader, source, **options)
            self._expect_whole(name, report["missing_keys"])
        return self._load(remedy, self._pipeline_class().from_pretrained, source, **modules, **self._options)

    def _expect_whole(self, name: str, missing: Collection[str]) -> None:
        """Refuse what the libraries accept: they make up missing weights at random, or leave them without values."""
        if missing:
            raise InputError(
                f"{self._model}: cannot be loaded: {len(missing)} weights of its {name} are missing, "
                f"e.g. {min(missing)}; download it again"
            )

    def _pipeline_class(self) -> Any:
        # diffusers talks of torchvision when first imported.
        return getattr(importlib.import_module("diffusers"), self._family.pipeline_class)

    def _load(self, remedy: str, loader: Any, source: str, **options: Any) -> Any:
        try:
            return loader(source, **options)
        except Exception as error:
            reason = one_line(error, 300)
            raise InputError(
                f"{self._model}: cannot be loaded as a {self._family.title} model: {type(error).__name__}: "
                f"{reason}{remedy}"
            ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    file = folder / "model_index.json"
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        return {**index, "_class_name": index["_class_name"]}
    except FileNotFoundError:
        raise InputError(f"{folder}: has no model_index.json; expected a model in diffusers layout") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{file}: cannot be read: {type(error).__name__}: {error}") from None


def looks_like_path(model: str) -> bool:
    """Tell whether a name that is nowhere on disk was meant as a path rather than a hub id."""
    return model.startswith((".", "/", "~")) or model.count("/") != 1 or model.endswith(_SINGLE_FILES)
