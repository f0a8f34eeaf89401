"""A LoRA to measure beside engrams, in any form that diffusers loads."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from engram_core import InputError
from engram_core.errors import one_line
from engram_vision.images import show_path
from engram_vision.models import looks_like_path
from engram_vision.quiet import quiet_libraries

__all__ = ["Lora"]

_USUAL = "pytorch_lora_weights.safetensors"
_SUFFIX = ".safetensors"
_NAME = "lora"


class Lora:
    """A LoRA that is drawn with beside base and engram; see `engram_vision.generation.Beside`.

    Attributes:
        name: of the variant.
        source: as the user calls it.
    """

    name = _NAME

    def __init__(self, source: str) -> None:
        """Find it.

        Args:
            source: safetensors file, folder with one, or hub id.

        Raises:
            InputError: there is no such file, or PEFT is not installed.
        """
        if find_spec("peft") is None:
            raise InputError(f"{source!r}: a LoRA needs the library PEFT, which is not installed (peft)")
        self.source = source
        self._shown = show_path(Path(source))
        self._place, self._file = _find(source)

    def load(self, pipeline: Any) -> list[str]:
        """Load it into a pipeline; returns what to tell of it.

        Raises:
            InputError: it cannot be read, or fits no part of the model.
        """
        # Files with pickled weights are not opened.
        options = {"weight_name": self._file, "use_safetensors": True}
        try:
            with quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = pipeline.lora_state_dict(self._place, **options)
                pipeline.load_lora_weights(self._place, adapter_name=_NAME, **options)
        except Exception as error:
            raise InputError(
                f"{self._shown}: cannot be loaded into the {type(pipeline).__name__}: "
                f"{type(error).__name__}: {one_line(error)}; give a LoRA of this kind of model"
            ) from error
        state = found[0] if isinstance(found, tuple) else found
        held = sum(value.numel() for value in state.values() if value.ndim > 1)
        loaded = sum(value.numel() for value in _list_loaded(pipeline))
        if not loaded:
            raise InputError(f"{self._shown}: fits no part of the model; give a LoRA of this kind of model")
        if loaded == held:
            return []
        return [f"{self._shown}: {loaded:,} of its {held:,} values fit the model; the others are left out"]

    def unload(self, pipeline: Any) -> None:
        """Take it out of a pipeline, which then is as it was."""
        with quiet_libraries():
            pipeline.unload_lora_weights()


def _find(source: str) -> tuple[str, str | None]:
    """Return a file's folder and name; for a hub id, the id and no name."""
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix != _SUFFIX:
            raise InputError(f"{show_path(path)}: is no safetensors file; convert it, or give another")
        return str(path.parent), path.name
    if path.is_dir():
        files = sorted(file.name for file in path.glob(f"*{_SUFFIX}"))
        if _USUAL in files:
            return str(path), _USUAL
        if len(files) != 1:
            raise InputError(f"{show_path(path)}: holds {len(files)} safetensors files; name the one with the LoRA")
        return str(path), files[0]
    if looks_like_path(source):
        raise InputError(f"{show_path(path)}: does not exist; give a hub id, a folder or a safetensors file")
    return source, None


def _list_loaded(pipeline: Any) -> Iterator[torch.Tensor]:
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            for name, value in part.named_parameters():
                if ".lora_" in name:
                    yield value
