"""Settings as frozen dataclasses: merged from defaults, files and flags, with every fault reported at once.

A settings class is a frozen, keyword-only dataclass whose fields are strings, numbers, booleans, paths,
choices (`Literal`), tuples of these, or any of these or None. It may have a method `faults()` that returns
what is wrong with its values, one sentence each. Where a number or None is wanted, the text `none` means None:
TOML has no word for it, and a stronger place could not take back what a weaker one has set.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from engram_core.errors import InputError, MissingSettingsError, quote

__all__ = ["Layer", "dump_settings", "resolve_settings", "setting_names", "split_strength"]

SettingsType = TypeVar("SettingsType")

_NONE = "none"
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", Path: "a path"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Settings from one place.

    Attributes:
        source: the place, for messages, e.g. `engram.toml`.
        values: setting name to value; None means not set.
    """

    source: str
    values: Mapping[str, Any]


def setting_names(kind: type) -> list[str]:
    """Return the names of a settings class's fields, in order."""
    return [field.name for field in fields(kind)]


def resolve_settings(kind: type[SettingsType], layers: Sequence[Layer]) -> SettingsType:
    """Return the settings that several places add up to; later layers win, defaults fill the rest.

    Args:
        kind: the settings class.
        layers: from the weakest to the strongest.

    Raises:
        MissingSettingsError: nothing is wrong but that settings without default are absent.
        InputError: unknown names (with the nearest known one), wrong types, values out of range; all together,
            one line each after the first.
    """
    hints = get_type_hints(kind)
    known = setting_names(kind)
    faults: list[str] = []
    values: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.values.items():
            if value is None:
                continue
            if name not in known:
                near = difflib.get_close_matches(name.replace("-", "_"), known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                faults.append(f"{layer.source}: there is no setting {quote(name)}{hint}")
                continue
            try:
                values[name] = _convert(value, hints[name])
            except ValueError as error:
                faults.append(f"{layer.source}: {name} is {quote(value)}, expected {error}")
    if faults:
        raise _error(faults)
    missing = [field.name for field in fields(kind) if field.name not in values and _required(field)]  # type: ignore[arg-type]
    if missing:
        raise MissingSettingsError(missing)
    settings = kind(**values)
    check = getattr(settings, "faults", None)
    if check is not None and (found := list(check())):
        raise _error(found)
    return settings


def dump_settings(settings: Any) -> dict[str, Any]:
    """Return settings as plain values for TOML or JSON, from which `resolve_settings` makes the same again.

    Those that are None by default and were left so are left out; other Nones are the text `none`.
    """
    values = {field.name: (getattr(settings, field.name), field.default) for field in fields(settings)}
    return {
        name: _NONE if value is None else _plain(value)
        for name, (value, default) in values.items()
        if value is not None or default is not None
    }


def split_strength(text: str) -> tuple[str, float]:
    """Return file and strength of `FILE` or `FILE@STRENGTH`, as users name an adapter; 1.0 where none is given.

    What exists under the whole text is a file of that name, and a text whose end is no number is left whole unless
    the part before it exists.

    Raises:
        InputError: an existing file is followed by something else than a number.
    """
    file, mark, strength = text.rpartition("@")
    if not mark or not file or Path(text).exists():
        return text, 1.0
    try:
        return file, float(strength)
    except ValueError:
        if not Path(file).exists():
            return text, 1.0  # opening it will tell
        raise InputError(f"{text}: {quote(strength)} after @ is not a number; expected FILE@0.8") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _required(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _error(faults: list[str]) -> InputError:
    if len(faults) == 1:
        return InputError(faults[0])
    return InputError("\n".join([f"{len(faults)} settings are wrong:", *faults]))


def _convert(value: Any, hint: Any) -> Any:
    """Return a value as a field's type; raises ValueError with what was expected."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        (inner,) = (part for part in get_args(hint) if part is not NoneType)
        if inner not in (int, float):
            return _convert(value, inner)
        try:
            return None if value == _NONE else _convert(value, inner)
        except ValueError as error:
            raise ValueError(f"{error} or {_NONE!r}") from None
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError(f"one of {', '.join(map(str, get_args(hint)))}")
        return value
    if origin is tuple:
        inner = get_args(hint)[0]
        items = value if isinstance(value, (list, tuple)) else [value]
        try:
            return tuple(_convert(item, inner) for item in items)
        except ValueError as error:
            raise ValueError(f"a list, each item {error}") from None
    if hint is Path and isinstance(value, (str, Path)) and str(value):
        return Path(value).expanduser()
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is hint:
        return value
    raise ValueError(_WORDS.get(hint, str(hint)))
