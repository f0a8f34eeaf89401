"""A concept: one named memory, its trigger and its entries in every stream.

Shapes: K entries, V trigger variants, d width of the stream.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from engram_core.canonical import JSON_MAX_BYTES, dump_canonical, parse_canonical
from engram_core.errors import InputError, quote
from engram_core.manifest import is_printable_name, take_fields
from engram_core.registry import DEFAULT_MAX_NGRAM, Ngram
from engram_core.storage import encode_vectors

Activation = Literal["anchored", "spans"]
Rule = Literal["absolute", "absolute-tanh", "relative"]
Overlap = Literal["sum", "mean"]
VectorType = Literal["f32", "f16", "bf16"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "activation": get_args(Activation),
    "rule": get_args(Rule),
    "overlap": get_args(Overlap),
    "dtype": get_args(VectorType),
}


NAME_MARK = "~"  # "cat" twice becomes "cat~1a2b3c4d" and "cat~5e6f7a8b"
MARK_DIGITS = 8  # of the concept's digest
_MARKS = re.compile(rf"({NAME_MARK}[0-9a-f]{{{MARK_DIGITS}}})+\Z")


def plain_name(name: str) -> str:
    """Return a concept's name without the mark a merge may have given it."""
    return _MARKS.sub("", name)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConceptRecord:
    """What a concept says of itself, as stored in the file; the tensors lie elsewhere.

    Attributes:
        name: unique in an adapter, printable, at most 256 characters.
        trigger: the phrase that fires it.
        rule: how a vector becomes a residual (docs/concepts.md).
        overlap: entries that cover one position add up (`sum`) or are averaged (`mean`).
        activation: `anchored` fires only inside the full trigger, `spans` wherever an entry's ids occur.
        max_ngram: N of the registration rule.
        dtype: how the vectors are stored; arithmetic is always in float32.
        training: free-form JSON: how it was made.
        license: free-form, or None.
    """

    name: str
    trigger: str
    rule: Rule
    overlap: Overlap = "sum"
    activation: Activation = "anchored"
    max_ngram: int = DEFAULT_MAX_NGRAM
    dtype: VectorType = "f32"
    training: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None

    def __post_init__(self) -> None:
        """Check every field; raises InputError."""
        for name in ("name", "trigger"):
            value = getattr(self, name)
            if not is_printable_name(value):
                raise InputError(
                    f"concept {name} is {quote(value)}, expected 1..256 printable characters without outer spaces"
                )
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise InputError(
                    f"concept {self.name!r}: {name} is {quote(value)}, expected one of {', '.join(choices)}"
                )
        if type(self.max_ngram) is not int or self.max_ngram < 2:
            raise InputError(f"concept {self.name!r}: max_ngram is {quote(self.max_ngram)}, expected at least 2")
        for name, kind in (("training", Mapping), ("license", (str, type(None)))):
            if not isinstance(getattr(self, name), kind):
                raise InputError(f"concept {self.name!r}: {name} has the type {type(getattr(self, name)).__name__}")

    def to_bytes(self) -> bytes:
        """Return the canonical JSON record.

        Raises:
            InputError: `training` holds something JSON cannot, or NaN, or too much.
        """
        values = {
            "activation": self.activation,  # first in canonical order: readers scan it without parsing
            "dtype": self.dtype,
            "license": self.license,
            "max_ngram": self.max_ngram,
            "name": self.name,
            "overlap": self.overlap,
            "rule": self.rule,
            "training": dict(self.training),
            "trigger": self.trigger,
        }
        try:
            text = dump_canonical(values)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"concept {self.name!r} cannot be written as JSON: {error}") from None
        if len(text) > JSON_MAX_BYTES:
            raise InputError(
                f"concept {self.name!r} has a record of {len(text)} bytes, the limit is {JSON_MAX_BYTES}; "
                "keep less in `training`"
            )
        return text

    @classmethod
    def from_bytes(cls, text: bytes) -> ConceptRecord:
        """Parse a canonical JSON record.

        Raises:
            ValueError: (InputError among them) with the reason.
        """
        values = take_fields(
            parse_canonical(text),
            "record",
            {
                "activation": str,
                "dtype": str,
                "license": (str, type(None)),
                "max_ngram": int,
                "name": str,
                "overlap": str,
                "rule": str,
                "training": dict,
                "trigger": str,
            },
        )
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ConceptStream:
    """A concept's memory in one stream.

    Attributes:
        triggers: V token variants of the full trigger.
        entries: K n-grams, each once.
        vectors: float32 [K, d], one memory vector an entry; with S sites [K, S, d].
        scales: float32 [d], one scale a channel; with S sites [S, d].
    """

    triggers: tuple[Ngram, ...]
    entries: tuple[Ngram, ...]
    vectors: npt.NDArray[np.float32]
    scales: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Concept:
    """One named memory: its record and its entries in every stream that has any."""

    record: ConceptRecord
    streams: Mapping[str, ConceptStream]

    @property
    def name(self) -> str:
        """The record's name."""
        return self.record.name

    def digest(self) -> str:
        """Return the hex SHA-256 of everything but the name: what the concept does and how it was made."""
        digest = hashlib.sha256(replace(self.record, name="-").to_bytes())
        for name, stream in sorted(self.streams.items()):
            order = sorted(range(len(stream.entries)), key=lambda k: (len(stream.entries[k]), stream.entries[k]))
            digest.update(dump_canonical([name, sorted(stream.triggers), [stream.entries[k] for k in order]]))
            digest.update(encode_vectors(stream.vectors[order], self.record.dtype).tobytes())
            digest.update(np.ascontiguousarray(stream.scales, dtype="<f4").tobytes())
        return digest.hexdigest()

    def renamed(self, name: str) -> Concept:
        """Return the same memory under another name."""
        return Concept(record=replace(self.record, name=name), streams=self.streams)
