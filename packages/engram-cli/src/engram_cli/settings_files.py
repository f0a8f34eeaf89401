"""Settings in TOML: a file such as `engram.toml`, and single values."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

DEFAULT_FILE = Path("engram.toml")

_HOME = "train"  # the command whose settings may also stand at the top of a file, outside of any table
_TABLES = (_HOME, "generate", "eval", "clips")


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingsFile:
    """What a file says to one command.

    Attributes:
        source: the file, for messages.
        values: setting name to value.
        backbone: the backbone named for this command.
        common_backbone: the backbone named for all commands, at the top of the file.
    """

    source: str = str(DEFAULT_FILE)
    values: Mapping[str, Any] = field(default_factory=dict)
    backbone: str | None = None
    common_backbone: str | None = None


def read_settings(path: Path | None, command: str) -> SettingsFile:
    """Return what a file says to a command: its table `[command]`; for `train`, without one, what stands at the top.

    Args:
        path: the file; None means `engram.toml` in the current folder, which need not exist.
        command: `train`, `generate`, `eval` or `clips`.

    Raises:
        InputError: the file cannot be read, is not TOML, holds a table that no command reads, or nothing
            for this command although the user named it.
    """
    from engram_core import InputError

    if path is None and not DEFAULT_FILE.exists():
        return SettingsFile()
    source = path or DEFAULT_FILE
    content = read_toml(source)
    faults = [
        f"{source}: there is no table [{name}]{_suggest(name)}; the tables are {', '.join(f'[{t}]' for t in _TABLES)}"
        for name, value in content.items()
        if isinstance(value, dict) and name not in _TABLES
    ]
    faults += [
        f"{source}: {name} is not a table; write its settings under [{name}]"
        for name in _TABLES
        if not isinstance(content.get(name, {}), dict)
    ]
    top = {name: value for name, value in content.items() if not isinstance(value, dict) and name not in _TABLES}
    common_backbone = top.pop("backbone", None)
    if _HOME in content:
        faults += [f"{source}: {name} stands outside of [{_HOME}]; move it there" for name in top]
        top = {}
    if command not in content and command != _HOME and path is not None:
        faults.append(f"{source}: has no table [{command}]")
    values = content.get(command, top if command == _HOME else {})
    values = dict(values) if isinstance(values, dict) else {}
    backbone = values.pop("backbone", None)
    faults += [
        f"{source}: backbone is {name!r}, expected a text"
        for name in (common_backbone, backbone)
        if not isinstance(name, str | None)
    ]
    if faults:
        raise InputError("\n".join(faults if len(faults) == 1 else [f"{len(faults)} settings are wrong:", *faults]))
    return SettingsFile(source=str(source), values=values, backbone=backbone, common_backbone=common_backbone)


def parse_value(text: str) -> Any:
    """Return a value as TOML reads it, or the text itself where it is none."""
    try:
        content = _toml().loads(f"value = {text}")
    except ValueError:
        return text
    return content["value"] if len(content) == 1 else text


def read_toml(path: Path) -> dict[str, Any]:
    """Return what a TOML file holds.

    Raises:
        InputError: it cannot be read or is not TOML.
    """
    from engram_core import InputError

    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text: {error.reason} at byte {error.start}") from None
    try:
        content: dict[str, Any] = _toml().loads(text)
    except ValueError as error:
        raise InputError(f"{path}: is not TOML: {error}") from None
    return content


def _toml() -> Any:
    return import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")


def _suggest(name: str) -> str:
    near = difflib.get_close_matches(name, _TABLES, n=1)
    return f"; did you mean [{near[0]}]?" if near else ""
