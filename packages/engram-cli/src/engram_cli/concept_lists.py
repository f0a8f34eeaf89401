"""A list of concepts to train: a TOML file with one table `[[concept]]` for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_cli.file_names import file_name
from engram_cli.settings_files import read_toml
from engram_core import InputError
from engram_core.errors import quote
from engram_core.settings import Layer

__all__ = ["OWN_SETTINGS", "read_concepts"]

OWN_SETTINGS = ("trigger", "data", "name", "run_dir")
"""What cannot be said of all concepts at once."""

_TABLE = "concept"
_PATHS = ("data", "validation_data")  # relative to the list, as files in metadata.jsonl are


def read_concepts(path: Path, folder: Path) -> list[Layer]:
    """Return the settings of each concept of a list; its file's name follows from its name or trigger.

    Args:
        path: the list.
        folder: for the adapters.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    content = read_toml(path)
    others = [name for name in content if name != _TABLE]
    if others:
        raise InputError(f"{path}: holds {quote(others[0])}; a list of concepts has tables [[{_TABLE}]] alone")
    tables = content.get(_TABLE, [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables) or not tables:
        raise InputError(f"{path}: has no table [[{_TABLE}]]; write one for each concept, with trigger and data")
    return [_read_concept(path, folder, number, table) for number, table in enumerate(tables, start=1)]


def _read_concept(path: Path, folder: Path, number: int, table: Mapping[str, Any]) -> Layer:
    source = f"{path}: concept {number}"
    for name in ("output", "run_dir", "backbone"):
        if name in table:
            raise InputError(f"{source}: {name} stands in a list of concepts; leave it out, --output names the folder")
    called = table.get("name", table.get("trigger"))
    if not isinstance(called, str) or not isinstance(table.get("data"), str):
        raise InputError(f"{source}: needs trigger = 'PHRASE' and data = 'FOLDER'")
    paths = {name: str(path.parent / table[name]) for name in _PATHS if isinstance(table.get(name), str)}
    return Layer(
        source=source, values={**table, **paths, "output": str(folder / file_name(called, f"concept-{number}"))}
    )
