"""What `engram eval` shows: figures of the base model and of the model with adapters, and their difference."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_cli.messages import count, format_duration, printable, show, show_columns
from engram_core import EvaluateReport, Measure

_VARIANTS = ("base", "lora", "engram", "both")  # the order of the columns; others follow
_NOUNS = {"documents": "document", "tokens": "token", "bytes": "byte", "windows": "window"}


def show_figures(report: EvaluateReport) -> None:
    """Show what an evaluation measured."""
    found = dict.fromkeys(name for measure in report.measures for name in measure.values)
    present = [name for name in _VARIANTS if name in found] + [name for name in found if name not in _VARIANTS]
    header = ["on", "figure", *(f">{name}" for name in present)]
    if {"base", "engram"} <= set(present):
        header += [">difference", ""]
    names = _shorten({measure.subject for measure in report.measures})
    show_columns(header, [_row(measure, names[measure.subject], present) for measure in report.measures])
    texts: Mapping[str, Mapping[str, Any]] = report.details.get("texts", {})
    for name, counts in texts.items():
        words = ", ".join(count(counts[key], noun) for key, noun in _NOUNS.items())
        show(printable(f"{name}: {words}"))
    if report.output is not None:
        show(printable(f"wrote {report.output}"))
    show(f"took {format_duration(report.seconds)}")


def _shorten(subjects: set[str]) -> dict[str, str]:
    """Return the last part of paths, where that tells all of them apart."""
    short = {subject: Path(subject).name or subject for subject in subjects}
    return short if len(set(short.values())) == len(subjects) else {subject: subject for subject in subjects}


def _row(measure: Measure, name: str, present: list[str]) -> list[str]:
    row = [name, measure.metric, *(_value(measure, variant) for variant in present)]
    if {"base", "engram"} <= set(present):
        row += ["-" if measure.difference is None else f"{measure.difference:+.4f}", _judge(measure)]
    return row


def _value(measure: Measure, name: str) -> str:
    if name not in measure.values:
        return "-"
    error = measure.errors.get(name)
    return f"{measure.values[name]:.4f}" + ("" if error is None else f" \N{PLUS-MINUS SIGN}{error:.4f}")


def _judge(measure: Measure) -> str:
    """Say in a word whether the difference is for the better; a difference within errors is not."""
    difference = measure.difference
    if not difference or measure.higher_is_better is None:
        return ""
    margin = sum(measure.errors.get(name, 0.0) ** 2 for name in ("base", "engram")) ** 0.5
    if abs(difference) <= margin:
        return "within error"
    return "better" if (difference > 0) == measure.higher_is_better else "worse"
