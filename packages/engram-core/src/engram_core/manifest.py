"""The manifest: what an adapter belongs to. Two adapters merge only when their manifests agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from engram_core.errors import InputError, quote
from engram_core.tokenizer import TokenizerSpec

_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MAX_WIDTH = 1 << 20
_MAX_VOCABULARY = 1 << 31  # ids are int32
_MAX_SITES = 1 << 10
_SITE_NAME = re.compile(r"[a-z][a-z0-9_.]{0,127}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamSpec:
    """One text encoder of a backbone: where its states are edited and how it reads text.

    Attributes:
        width: d, channels of the edited states.
        site: which of the encoder's states the generator reads, e.g. `last_hidden_state`.
        tokenizer: identity of the stream's tokenizer.
        sites: names of the S places of the generator that read these states, each with a residual of its own, in the
            order of the vectors; None where one residual serves all of them.
    """

    width: int
    site: str
    tokenizer: TokenizerSpec
    sites: tuple[str, ...] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one memory vector: (d,), or (S, d) with sites."""
        return (self.width,) if self.sites is None else (len(self.sites), self.width)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What every concept of an adapter has in common.

    Attributes:
        backbone: model family, e.g. `sd15`.
        base_model: id of the model the concepts were trained on.
        base_fingerprint: hex SHA-256 that identifies the base weights, or None when unknown.
        streams: stream name to its specification, in name order.
    """

    backbone: str
    base_model: str
    base_fingerprint: str | None = None
    streams: Mapping[str, StreamSpec]

    def __post_init__(self) -> None:
        """Check every field; raises InputError."""
        _require(_matches(_NAME, self.backbone), "backbone", self.backbone, "a lower-case name")
        _require(is_printable_name(self.base_model), "base_model.id", self.base_model, "a printable name")
        _require(
            self.base_fingerprint is None or _matches(_FINGERPRINT, self.base_fingerprint),
            "base_model.fingerprint",
            self.base_fingerprint,
            "null or 64 hexadecimal digits",
        )
        _require(self.streams, "streams", dict(self.streams), "at least one stream")
        for name, stream in self.streams.items():
            _require(_matches(_NAME, name), "streams", name, "lower-case stream names")
            where, spec = f"streams.{name}", stream.tokenizer
            _require(_is_count(stream.width, _MAX_WIDTH), f"{where}.width", stream.width, f"1..{_MAX_WIDTH}")
            _require(_matches(_NAME, stream.site), f"{where}.site", stream.site, "a lower-case name")
            if stream.sites is not None:
                _require(isinstance(stream.sites, tuple), f"{where}.sites", stream.sites, "a tuple of names")
                count = len(stream.sites)
                _require(_is_count(count, _MAX_SITES), f"{where}.sites", f"{count} names", f"1..{_MAX_SITES} names")
                for site in stream.sites:
                    _require(_matches(_SITE_NAME, site), f"{where}.sites", site, "names in lower case, with dots")
                _require(len({*stream.sites}) == count, f"{where}.sites", list(stream.sites)[:4], "each name once")
            _require(
                is_printable_name(spec.class_name),
                f"{where}.tokenizer.class",
                spec.class_name,
                "a printable name",
            )
            _require(
                _is_count(spec.vocab_size, _MAX_VOCABULARY),
                f"{where}.tokenizer.vocab_size",
                spec.vocab_size,
                f"1..{_MAX_VOCABULARY}",
            )
            _require(
                _matches(_FINGERPRINT, spec.fingerprint),
                f"{where}.tokenizer.fingerprint",
                spec.fingerprint,
                "64 hexadecimal digits",
            )
        object.__setattr__(self, "streams", MappingProxyType(dict(sorted(self.streams.items()))))

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as plain JSON values."""
        return {
            "backbone": self.backbone,
            "base_model": {"fingerprint": self.base_fingerprint, "id": self.base_model},
            "streams": {
                name: {
                    "site": stream.site,
                    "tokenizer": {
                        "class": stream.tokenizer.class_name,
                        "fingerprint": stream.tokenizer.fingerprint,
                        "vocab_size": stream.tokenizer.vocab_size,
                    },
                    "width": stream.width,
                    # Left out where there are none, so that such files keep their bytes and their identity.
                    **({} if stream.sites is None else {"sites": list(stream.sites)}),
                }
                for name, stream in self.streams.items()
            },
        }

    @classmethod
    def from_json(cls, value: Any) -> Manifest:
        """Build a manifest from plain JSON values, refusing missing, unknown or mistyped fields.

        Raises:
            InputError: naming the field.
        """
        root = take_fields(value, "manifest", {"backbone": str, "base_model": dict, "streams": dict})
        base = take_fields(root["base_model"], "base_model", {"fingerprint": (str, type(None)), "id": str})
        streams = {}
        for name, item in root["streams"].items():
            _require(_matches(_NAME, name), "streams", name, "lower-case stream names")
            where = f"streams.{name}"
            optional: dict[str, type] = {"sites": list} if isinstance(item, dict) and "sites" in item else {}
            stream = take_fields(item, where, {"site": str, "tokenizer": dict, "width": int, **optional})
            spec = take_fields(
                stream["tokenizer"],
                f"{where}.tokenizer",
                {"class": str, "fingerprint": str, "vocab_size": int},
            )
            tokenizer = TokenizerSpec(
                class_name=spec["class"], vocab_size=spec["vocab_size"], fingerprint=spec["fingerprint"]
            )
            sites = tuple(stream["sites"]) if optional else None
            streams[name] = StreamSpec(width=stream["width"], site=stream["site"], tokenizer=tokenizer, sites=sites)
        return cls(
            backbone=root["backbone"],
            base_model=base["id"],
            base_fingerprint=base["fingerprint"],
            streams=streams,
        )


def take_fields(value: Any, where: str, types: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """Return `value` when it is an object with exactly these fields of these types.

    Raises:
        InputError: naming the field at fault.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where} is {type(value).__name__}, expected an object")
    for name in value:
        if name not in types:
            raise InputError(f"{where} has an unknown field {quote(name)}; known: {', '.join(sorted(types))}")
    for name, expected in types.items():
        if name not in value:
            raise InputError(f"{where} lacks the field {name!r}")
        item = value[name]
        # bool is an int to Python, but not to JSON.
        if not isinstance(item, expected) or (isinstance(item, bool) and expected is not bool):
            raise InputError(f"{where}.{name} has the type {type(item).__name__}")
    return value


def is_printable_name(text: object, limit: int = 256) -> bool:
    """Tell whether a text from a stranger is safe to show on one line of a terminal."""
    return isinstance(text, str) and 0 < len(text) <= limit and text.isprintable() and text == text.strip()


def _matches(pattern: re.Pattern[str], text: object) -> bool:
    return isinstance(text, str) and pattern.fullmatch(text) is not None


def _is_count(value: object, limit: int) -> bool:
    return type(value) is int and 0 < value <= limit


def _require(ok: object, field: str, value: object, expected: str) -> None:
    if not ok:
        raise InputError(f"{field} is {quote(value)}, expected {expected}")
