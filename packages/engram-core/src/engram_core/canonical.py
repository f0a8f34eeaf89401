"""Canonical JSON: the same content always gives the same bytes, so a file's hash is its identity."""

from __future__ import annotations

import json
from typing import Any

from engram_core.errors import quote

JSON_MAX_BYTES = 256 * 1024
"""Largest JSON text the reader parses: bounds memory whatever a hostile file claims."""

JSON_MAX_DEPTH = 64
"""Deepest nesting the reader accepts: far below the interpreter's own limit, which depends on the caller."""

JSON_MAX_DIGITS = 1000
"""Longest integer the reader accepts: some Pythons have a limit of their own, others take very long."""

_TOO_DEEP = f"nests its JSON too deeply; the limit is {JSON_MAX_DEPTH}"


class DuplicateKeyError(ValueError):
    """A JSON object names one key twice."""


def dump_canonical(value: Any) -> bytes:
    """Return `value` as canonical JSON: sorted keys, no white space, UTF-8, no NaN.

    Raises:
        ValueError: NaN or infinity in the value.
        TypeError: something JSON cannot hold.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8")


def parse_strict(text: bytes) -> Any:
    """Parse JSON, refusing duplicate keys, NaN, too long or too deep input.

    Raises:
        ValueError: with the reason; never RecursionError or MemoryError.
    """
    if len(text) > JSON_MAX_BYTES:
        raise ValueError(f"has {len(text)} bytes of JSON, the limit is {JSON_MAX_BYTES}")
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique_keys,
            parse_int=_parse_integer,
            parse_constant=_refuse_constant,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    # The number of brackets, those in strings included, decides whether a closer look is needed.
    if text.count(b"[") + text.count(b"{") > JSON_MAX_DEPTH and _is_deeper(value, JSON_MAX_DEPTH):
        raise ValueError(_TOO_DEEP)
    return value


def parse_canonical(text: bytes) -> Any:
    """Parse JSON that must be in the canonical form of `dump_canonical`.

    Raises:
        ValueError: with the reason, also when the same content has a shorter or sorted spelling.
    """
    value = parse_strict(text)
    try:
        canonical = dump_canonical(value)
    except (RecursionError, UnicodeEncodeError):
        raise ValueError("holds text that has no canonical form") from None
    if canonical != text:
        raise ValueError("is not canonical JSON (sorted keys, no white space)")
    return value


def _is_deeper(value: Any, limit: int) -> bool:
    holders: list[Any] = [[value]]
    for _ in range(limit + 1):
        holders = [
            item
            for holder in holders
            for item in (holder.values() if isinstance(holder, dict) else holder)
            if isinstance(item, (dict, list))
        ]
    return bool(holders)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKeyError(f"names the key {quote(twice)} twice")
    return result


def _parse_integer(text: str) -> int:
    # The safetensors library takes -0 for a float, Python for an integer.
    if text == "-0" or len(text) > JSON_MAX_DIGITS:
        raise ValueError(f"holds the integer {text[:40]}; expected at most {JSON_MAX_DIGITS} characters, and no -0")
    return int(text)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"holds {name}")
