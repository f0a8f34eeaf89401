"""Import of hashed memories that other tools trained: TinyEngram and engram-peft, from safetensors files alone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engram_core import AdapterFormatError, AdapterReadError, ConvertSettings, HashedMemory, InputError
from engram_core.container import open_container
from engram_core.errors import quote
from engram_llm.engram_peft import convert_peft
from engram_llm.foreign import read_json, read_layers
from engram_llm.tinyengram import convert_tinyengram

__all__ = ["convert"]

_PEFT_WEIGHTS = "engram_adapters.safetensors"
_PEFT_PICKLE = "engram_weights.pt"
_MODEL, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json", _PEFT_PICKLE)
_TINYENGRAM = re.compile(r"(?:.*\.)?engram_layers\.(\d{1,6})\.(.+)")
_PEFT = re.compile(r"(\d{1,6})\.(.+)")


def convert(source: Path, settings: ConvertSettings, backbone: str, default_model: str) -> HashedMemory:
    """Return a foreign checkpoint as a memory.

    Args:
        source: a folder that TinyEngram's trainer or engram-peft saved, or its safetensors file.
        settings: what the user said; what the checkpoint records may only be repeated.
        backbone: name of the backbone that asks.
        default_model: of the backbone.

    Raises:
        AdapterReadError: a file is missing or cannot be read.
        AdapterFormatError: a file does not hold what these tools save.
        InputError: the checkpoint has settings that a memory cannot have, or needs to be told some, or contradicts
            what the user said.
    """
    for option in ("trigger", "rule"):
        if getattr(settings, option) is not None:
            raise InputError(f"--{option} is for concepts; a hashed memory has none, leave it out")
    if not source.exists():
        raise AdapterReadError(f"{source}: does not exist; give a checkpoint of TinyEngram or engram-peft")
    folder = source if source.is_dir() else source.parent
    files = _list_files(source)
    containers = [open_container(file) for file in files]
    names = [name for container in containers for name in container.tensors]
    if any(_TINYENGRAM.fullmatch(name) for name in names):
        layers = read_layers(containers, _TINYENGRAM)
        memory = convert_tinyengram(source, folder, layers, containers, settings, backbone, default_model)
    elif any(_PEFT.fullmatch(name) and ".gating." in name for name in names):
        memory = convert_peft(source, folder, read_layers(containers, _PEFT), settings, backbone)
    else:
        few = ", ".join(map(quote, sorted(names)[:3])) or "no tensor"
        raise AdapterFormatError(
            f"{source}: holds no memory of TinyEngram or engram-peft; its {len(names)} tensors are {few} and so on"
        )
    memory.check()
    return memory


def _list_files(source: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint."""
    if source.is_file():
        if source.suffix != ".safetensors":
            raise InputError(f"{source}: is not a .safetensors file; memories are imported from those alone")
        return [source]
    for name in (_PEFT_WEIGHTS, _MODEL):
        if (source / name).is_file():
            return [source / name]
    index = read_json(source / _INDEX)
    if index is not None:
        return list(_read_index(source / _INDEX, index))
    pickle = next((name for name in _PICKLES if (source / name).exists()), None)
    if pickle is not None:
        raise InputError(
            f"{source / pickle}: is a pickle, which can run code; save the checkpoint again as safetensors "
            "(save_safetensors, or safe_serialization=True)"
        )
    raise AdapterReadError(f"{source}: holds neither {_MODEL}, {_INDEX} nor {_PEFT_WEIGHTS}")


def _read_index(file: Path, index: Mapping[str, Any]) -> Iterator[Path]:
    names = index.get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
        raise AdapterFormatError(f"{file}: field 'weight_map' does not map tensors to files")
    for name in sorted(set(names.values())):
        if Path(name).name != name:
            raise AdapterFormatError(f"{file}: weight_map names the file {quote(name)}, expected one beside it")
        yield file.parent / name
