"""What checkpoints of other tools hold of a memory, mapped and not read, and whether it fits settings."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import AdapterFormatError, AdapterReadError, ConvertSettings, InputError, MemorySettings
from engram_core.container import Container
from engram_core.memory import Stored
from engram_core.storage import CONTAINER_NAMES

__all__ = ["ForeignLayer", "check_shapes", "check_sizes", "expect_same", "few", "read_json", "read_layers"]

_TYPES = {container: name for name, container in CONTAINER_NAMES.items()}
_OFFSETS = "multi_head_embedding.offsets"
_LARGEST_JSON = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignLayer:
    """What a checkpoint holds of one layer's memory.

    Attributes:
        sizes: rows of each head, in order.
        tensors: name to tensor, as in the checkpoint.
        label: file and prefix, for messages.
    """

    sizes: tuple[int, ...]
    tensors: Mapping[str, Stored]
    label: str

    def shape(self, name: str, n_axes: int) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            AdapterFormatError: it is missing, or has another number of axes.
        """
        if name not in self.tensors:
            raise AdapterFormatError(f"{self.label}.{name}: is missing")
        shape = self.tensors[name][1].shape
        if len(shape) != n_axes:
            raise AdapterFormatError(f"{self.label}.{name}: has shape {list(shape)}, expected {n_axes} axes")
        return shape


def read_layers(containers: Sequence[Container], pattern: re.Pattern[str]) -> dict[int, ForeignLayer]:
    """Return the layers of a checkpoint; tensors are mapped, not read.

    Args:
        containers: its files.
        pattern: of names; its groups are the layer and the rest.

    Raises:
        AdapterFormatError: a tensor occurs twice or has a type that memories do not have, or the table's offsets do
            not divide it.
    """
    found: dict[int, dict[str, Stored]] = {}
    labels: dict[int, str] = {}
    offsets: dict[int, npt.NDArray[np.int64]] = {}
    for container in containers:
        for name, info in container.tensors.items():
            match = pattern.fullmatch(name)
            if match is None:
                continue
            layer, rest = int(match[1]), match[2]
            labels.setdefault(layer, f"{container.label}: {name.removesuffix('.' + rest)}")
            tensors = found.setdefault(layer, {})
            if rest in tensors or (rest == _OFFSETS and layer in offsets):
                raise AdapterFormatError(f"{container.label}: {name}: occurs twice in the checkpoint")
            if rest == _OFFSETS:
                if info.dtype != "I64" or len(info.shape) != 1 or not info.shape[0]:
                    raise AdapterFormatError(f"{container.label}: {name}: is {info.dtype} {list(info.shape)}")
                offsets[layer] = container.array(name)
            elif info.dtype not in _TYPES:
                raise AdapterFormatError(f"{container.label}: {name}: is {info.dtype}, expected {', '.join(_TYPES)}")
            else:
                tensors[rest] = _TYPES[info.dtype], container.array(name)
    layers = {}
    for layer, tensors in sorted(found.items()):
        partial = ForeignLayer(sizes=(), tensors=tensors, label=labels[layer])
        n_rows = partial.shape("multi_head_embedding.embedding.weight", 2)[0]
        if layer not in offsets:
            raise AdapterFormatError(f"{labels[layer]}.{_OFFSETS}: is missing")
        sizes = np.diff(offsets[layer], append=n_rows)
        if offsets[layer][0] != 0 or sizes.min() < 1:
            raise AdapterFormatError(
                f"{labels[layer]}.{_OFFSETS}: do not divide the table's {n_rows} rows among heads in order"
            )
        layers[layer] = ForeignLayer(sizes=tuple(sizes.tolist()), tensors=tensors, label=labels[layer])
    return layers


def read_json(file: Path) -> dict[str, Any] | None:
    """Return an object from a JSON file; None where there is no such file.

    Raises:
        AdapterReadError: it cannot be read.
        AdapterFormatError: it holds something else.
    """
    if not file.is_file():
        return None
    try:
        if file.stat().st_size > _LARGEST_JSON:
            raise AdapterFormatError(f"{file}: has {file.stat().st_size} bytes, too many for a configuration")
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterReadError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{file}: is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise AdapterFormatError(f"{file}: is {type(value).__name__}, expected an object")
    return value


def expect_same(settings: ConvertSettings, recorded: Mapping[str, Any], where: str) -> None:
    """Refuse what contradicts the checkpoint's own configuration.

    Args:
        settings: what the user said.
        recorded: name of the setting to what the checkpoint says.
        where: it says so.

    Raises:
        InputError: naming option and both values.
    """
    for name, value in recorded.items():
        said = getattr(settings, name)
        if said is not None and said != value:
            raise InputError(f"{where}: --{name.replace('_', '-')} says {said}, the checkpoint {value}; leave it out")


def check_sizes(memory: MemorySettings, layers: Mapping[int, ForeignLayer], where: str) -> None:
    """Refuse settings that give other tables than the checkpoint's.

    Raises:
        InputError: naming the first layer that differs and both sizes.
    """
    for number, primes in memory.hash(1, 0).primes.items():
        expected = tuple(primes.reshape(-1).tolist())
        found = layers[number].sizes
        if found != expected:
            raise InputError(
                f"{where}: these settings give layer {number} {len(expected)} heads with {few(expected)} rows, "
                f"the checkpoint has {len(found)} with {few(found)}"
            )


def check_shapes(layer: ForeignLayer, expected: Mapping[str, tuple[int, ...]], names: Mapping[str, str]) -> None:
    """Refuse tensors that are missing, unknown or of another shape.

    Args:
        layer: the tensors.
        expected: our name to shape.
        names: our name to the foreign one, where they differ.

    Raises:
        AdapterFormatError: naming tensor and shapes.
    """
    foreign = {names.get(name, name): shape for name, shape in expected.items()}
    for name, shape in foreign.items():
        found = layer.shape(name, len(shape))
        if found != shape:
            raise AdapterFormatError(f"{layer.label}.{name}: has shape {list(found)}, expected {list(shape)}")
    unknown = layer.tensors.keys() - foreign.keys()
    if unknown:
        raise AdapterFormatError(f"{layer.label}.{min(unknown)}: is no tensor of a memory with these settings")


def few(sizes: Sequence[int]) -> str:
    """Return the first of some sizes, for messages."""
    return "/".join(map(str, sizes[:4])) + ("/..." if len(sizes) > 4 else "")
