"""What backbones report of texts and of measurements."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["EvaluateReport", "GeneratedText", "Measure", "TextReport", "UsedAdapter"]


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedAdapter:
    """An adapter in use.

    Attributes:
        file: as it was named, without the strength.
        identity: hex SHA-256 of the file.
        strength: what its effect is multiplied by.
    """

    file: str
    identity: str
    strength: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {"file": self.file, "identity": self.identity, "strength": self.strength}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedText:
    """One text that was generated.

    Attributes:
        prompt: what it goes on from.
        seed: of the sampling.
        text: what was generated, without the prompt.
        adapters: those in force; none for the base model's.
        n_tokens: tokens generated, one that ends the text included.
        stopped: at the `end` that the model set, or at the greatest `length`.
    """

    prompt: str
    seed: int
    text: str
    adapters: tuple[UsedAdapter, ...]
    n_tokens: int
    stopped: Literal["end", "length"]

    @property
    def variant(self) -> str:
        """`engram` where adapters are in force, else `base`."""
        return "engram" if self.adapters else "base"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "variant": self.variant,
            "text": self.text,
            "tokens": self.n_tokens,
            "stopped": self.stopped,
            "adapters": [adapter.to_json() for adapter in self.adapters],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class TextReport:
    """What was generated as texts.

    Attributes:
        texts: one for each prompt and seed; to compare, the base model's and after it the one with adapters.
        output: the file with all of them, when asked for.
        seconds: time it took.
    """

    texts: tuple[GeneratedText, ...]
    output: Path | None
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """One figure of the base model and of the model with adapters.

    Attributes:
        subject: what was measured on: a file or a task.
        metric: what was measured, e.g. `perplexity`.
        values: of `base`, of `engram`, and of others that were measured beside them.
        higher_is_better: whether more is better; None when unknown.
        errors: standard errors of the values, as far as they are known.
    """

    subject: str
    metric: str
    values: Mapping[str, float]
    higher_is_better: bool | None
    errors: Mapping[str, float] = field(default_factory=dict)

    @property
    def difference(self) -> float | None:
        """What adapters change; None when there are not both values."""
        if not {"base", "engram"} <= self.values.keys():
            return None
        return self.values["engram"] - self.values["base"]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "subject": self.subject,
            "metric": self.metric,
            "values": dict(self.values),
            "difference": self.difference,
            "errors": dict(self.errors),
            "higher_is_better": self.higher_is_better,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateReport:
    """What an evaluation measured.

    Attributes:
        measures: the figures.
        adapters: those measured against the base model.
        details: how it was measured and on how much, plain JSON values.
        output: the file with all of it, when asked for.
        seconds: time it took.
    """

    measures: tuple[Measure, ...]
    adapters: tuple[UsedAdapter, ...]
    details: Mapping[str, Any]
    output: Path | None
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "measures": [measure.to_json() for measure in self.measures],
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "details": dict(self.details),
            "output": None if self.output is None else str(self.output),
            "seconds": self.seconds,
        }
