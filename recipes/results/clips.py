"""The blocks about clips."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean
from typing import Any

from recipes.results.figures import NOT_YET, Spread

__all__ = ["tell_clip_losses", "tell_clips"]

_ORDER = ("the base model", "engram", "published", "LoRA")
_COLUMNS = {"identity": "identity", "lost by the end": "identity_drop", "scene": "scene", "motion": "motion"}


def tell_clips(content: Mapping[str, Any] | None) -> str:
    """Tabulate the comparison on clips."""
    if content is None:
        return NOT_YET
    head = ["method", *_COLUMNS, "without the name: identical", "difference"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method, values in _methods(content).items():
        cells = [Spread(seeds=tuple(values[name])).show() for name in _COLUMNS.values()]
        cells.append(f"{sum(values['identical'])} of {sum(values['controls'])}")
        cells.append(f"{mean(values['difference']):.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tell_clip_losses(content: Mapping[str, Any] | None) -> str:
    """List the engrams whose identity another method surpasses, and the best of those methods."""
    if content is None:
        return NOT_YET
    methods = {method: Spread(seeds=tuple(values["identity"])) for method, values in _methods(content).items()}
    others = {method: spread for method, spread in methods.items() if method.startswith("LoRA")}
    best = max(others, key=lambda method: others[method].mean)
    lines = []
    for method, spread in methods.items():
        if not method.startswith("engram") or spread.mean >= others[best].mean:
            continue
        doubt = "; the seeds of both overlap" if spread.overlaps(others[best]) else ""
        lines.append(f"- **identity in clips**: *{best}* has {others[best].show()}, *{method}* {spread.show()}{doubt}.")
    return "\n".join(lines or ["In clips no LoRA has more identity than an engram."])


def _methods(content: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """Return the figures of each method, by kind."""
    figures = content["figures"].items()
    found = {name: values for name, values in figures if isinstance(values, Mapping) and "identity_drop" in values}
    return dict(sorted(found.items(), key=lambda item: [not item[0].startswith(kind) for kind in _ORDER]))
