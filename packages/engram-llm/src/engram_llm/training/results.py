"""What a run leaves: the memory's file, LoRA's folder, or both side by side."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_core import AdapterWriteError, InputError, TargetExistsError
from engram_llm.settings import TrainSettings
from engram_llm.training.learned import LORA_WEIGHTS
from engram_llm.training.preparation import Prepared

__all__ = ["check_outputs", "lora_folder", "write_outputs"]

_CONFIG = "adapter_config.json"


def lora_folder(settings: TrainSettings) -> Path | None:
    """Return the folder for LoRA: the output itself, or beside the memory; None where no LoRA learns."""
    folders = {"engram": None, "lora": settings.output, "both": settings.output.with_suffix(".lora")}
    return folders[settings.method]


def check_outputs(settings: TrainSettings, *, is_allowed: bool) -> None:
    """Refuse early what would fail or overwrite at the end.

    Args:
        settings: of the run.
        is_allowed: whether an output of an earlier run may be replaced.

    Raises:
        InputError: there is no such place, or something else is there.
        TargetExistsError: there is an output already.
    """
    output, lora = settings.output, lora_folder(settings)
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.parent}; create it first")
    if settings.method != "lora" and output.is_dir():
        raise InputError(f"{output}: is a folder; give the name of a file")
    for path in filter(None, (None if settings.method == "lora" else output, lora)):
        if path == lora and path.exists() and not _is_lora(path):
            raise InputError(f"{path}: exists and is no folder with a LoRA adapter alone; give another --output")
        if path.exists() and not is_allowed and not _is_empty(path):
            raise TargetExistsError(f"{path}: exists; pass --force to replace it, or another --output")


def write_outputs(prepared: Prepared, figures: Mapping[str, Any]) -> tuple[str, int]:
    """Write what was learned, and return the identity of the output and its size.

    Args:
        prepared: what was trained.
        figures: what came out, for the memory's record.

    Returns:
        Hex SHA-256 of the memory's file, or of LoRA's weights where no memory learned; bytes of that file.

    Raises:
        AdapterWriteError: it cannot be written.
    """
    settings, learned = prepared.settings, prepared.learned
    written: tuple[str, int] | None = None
    folder = lora_folder(settings)
    if folder is not None:
        written = _write_lora(prepared, folder)
    record = prepared.record(figures)
    if record is not None:
        # Whether it may be replaced was asked before anything was done.
        memory = learned.write_memory(settings.output, prepared.manifest, record, dtype=settings.dtype)
        written = memory.identity(), memory.nbytes()
    if written is None:
        raise InputError(f"method is {settings.method}, which leaves nothing")
    return written


def _write_lora(prepared: Prepared, folder: Path) -> tuple[str, int]:
    """Write the folder beside its place, then let it take that."""
    try:
        with tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=f".{folder.name[:40]}.") as place:
            new, old = Path(place) / "new", Path(place) / "old"
            prepared.learned.write_lora(new)
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
    except OSError as error:
        raise AdapterWriteError(f"{folder}: cannot be written: {error.strerror or error}") from None
    data = (folder / LORA_WEIGHTS).read_bytes()
    return hashlib.sha256(data).hexdigest(), len(data)


def _is_lora(path: Path) -> bool:
    """Tell whether a folder may be replaced by a LoRA adapter: it is one, or empty."""
    if not path.is_dir():
        return False
    names = {file.name for file in path.iterdir()}
    return not names or (_CONFIG in names and names <= {_CONFIG, LORA_WEIGHTS, "README.md"})


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
