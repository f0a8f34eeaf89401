"""What the frozen models made of a data set, kept on disk, so that no run need make it again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engram_core.container import open_target, write_all
from engram_vision.generation import make_folder
from engram_vision.training.frozen import FrozenData, FrozenTexts

__all__ = ["FrozenStore"]

_FIELD = "engram-frozen"
_LIBRARIES = ("torch", "diffusers", "transformers")  # whose arithmetic it is
_PART = 1 << 20  # bytes

Make = Callable[[], FrozenData]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenStore:
    """A folder of files `frozen-KEY.safetensors`; the key tells everything that a file's values depend on.

    Attributes:
        folder: made when something is kept.
        facts: what the values of every file depend on: weights, sizes, number type and the like.
        writes: whether this process writes; of several one does.
        note: hears of files that cannot be used.
    """

    folder: Path
    facts: Mapping[str, str]
    writes: bool
    note: Callable[[str], None]

    def fetch(self, files: Iterable[Path], captions: Sequence[Sequence[str]], make: Make) -> FrozenData:
        """Return what is kept of a data set; make and keep it where there is nothing.

        Args:
            files: of the data, whose bytes count and not their names.
            captions: of each file, in all their forms.
            make: runs the frozen models.

        Raises:
            AdapterWriteError: it cannot be written. And whatever `make` raises.
        """
        path = self.folder / f"frozen-{self._key(files, captions)}.safetensors"
        if path.is_file():
            try:
                return _read(path)
            except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
                self.note(f"{path}: cannot be used and is made again ({type(error).__name__})")
        data = make()
        if self.writes:
            make_folder(self.folder)
            with open_target(path, overwrite=True) as file:
                write_all(file, memoryview(_pack(data)))
        return data

    def _key(self, files: Iterable[Path], captions: Sequence[Sequence[str]]) -> str:
        facts = dict(self.facts) | {name: version(name) for name in _LIBRARIES}
        digest = hashlib.sha256(json.dumps([facts, captions], sort_keys=True).encode())
        for file in files:
            own = hashlib.sha256()
            with file.open("rb") as content:
                while part := content.read(_PART):
                    own.update(part)
            digest.update(own.digest())
        return digest.hexdigest()[:16]


def _pack(data: FrozenData) -> bytes:
    tensors = {"mean": data.mean, "std": data.std}
    for stream, texts in data.texts.items():
        parts = {"ids": texts.ids, "states": texts.states, "pooled": texts.pooled, "lengths": texts.lengths}
        tensors |= {f"texts/{stream}/{name}": value for name, value in parts.items() if value is not None}
    record = {"captions": data.captions, "origin": dict(data.origin)}
    packed: bytes = save(
        {name: value.detach().cpu().contiguous() for name, value in tensors.items()}, {_FIELD: json.dumps(record)}
    )
    return packed


def _read(path: Path) -> FrozenData:
    """Return the data of a file; raises one of many errors where it is not what `_pack` writes."""
    streams: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        record = json.loads((file.metadata() or {})[_FIELD])
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if key.startswith("texts/"):
                _, stream, name = key.split("/")
                streams.setdefault(stream, {})[name] = file.get_tensor(key)
        mean, std = file.get_tensor("mean"), file.get_tensor("std")
    n_texts = {len(parts["ids"]) for parts in streams.values()} | {len(parts["states"]) for parts in streams.values()}
    if mean.shape != std.shape or len(record["captions"]) != len(mean) or len(n_texts) != 1:
        raise ValueError("its parts do not fit together")
    return FrozenData(
        mean=mean,
        std=std,
        texts={stream: FrozenTexts(**parts) for stream, parts in streams.items()},
        captions=tuple(tuple(rows) for rows in record["captions"]),
        origin=record["origin"],
    )
