"""The figures of single pictures and clips, and what they come to over prompts and seeds.

Shapes: F frames (one of a picture), M reference pictures, d channels of features; features float32 [F, d], rows of
length 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core import Measure
from engram_vision.features import Features, compare_features

__all__ = [
    "CONTROLS",
    "Figure",
    "compare_bytes",
    "list_spread",
    "measure_change",
    "measure_consistency",
    "measure_drop",
    "measure_identity",
    "sum_up",
]

CONTROLS = "control prompts"
"""What figures about prompts without a trigger were measured with."""

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One figure of one picture or clip.

    Attributes:
        subject: what it was measured with.
        metric: what was measured.
        value: how much.
        higher_is_better: whether more is better; None where that depends.
    """

    subject: str
    metric: str
    value: float
    higher_is_better: bool | None


def measure_identity(subject: str, features: Features, references: Features) -> tuple[list[Figure], Features]:
    """Return how alike frames are to reference pictures, and how alike each one is, [F].

    The drop is the mean of the first quarter of the frames less that of the last: whether the subject is lost.

    Args:
        subject: what the features are of.
        features: of the frames, [F, d].
        references: [M, d].
    """
    alike = compare_features(features, references)
    figures = [_figure(subject, "identity", float(alike.mean()), better=True)]
    if len(alike) > 1:
        figures.append(_figure(subject, "identity drop", measure_drop(alike), better=False))
    return figures, alike


def measure_drop(values: npt.NDArray[np.floating[Any]]) -> float:
    """Return by how much values fall: the mean of the first quarter less that of the last.

    Args:
        values: of the frames, in their order, [F].
    """
    quarter = max(1, len(values) // 4)
    return float(values[:quarter].mean() - values[-quarter:].mean())


def measure_consistency(subject: str, features: Features) -> list[Figure]:
    """Return how alike neighbouring frames are; nothing of a single one. A clip that stands still has 1.

    Args:
        subject: what the features are of.
        features: of the frames, [F, d].
    """
    if len(features) < 2:
        return []
    cosines = np.clip((features[:-1].astype(np.float64) * features[1:]).sum(axis=1), -1, 1)
    return [_figure(subject, "consistency", float(cosines.mean()), better=True)]


def compare_bytes(pairs: Sequence[tuple[str, Pixels, Pixels]]) -> tuple[int, list[str]]:
    """Return how many pairs are the same byte for byte, and the names of those that are not.

    Args:
        pairs: a name, and the frames of both.
    """
    differing = [name for name, one, other in pairs if one.shape != other.shape or one.tobytes() != other.tobytes()]
    return len(pairs) - len(differing), differing


def measure_change(before: Pixels, after: Pixels, features: tuple[Features, Features] | None) -> list[Figure]:
    """Return how far frames moved: the mean difference of pixels, in 0..1, and of features one less the cosine.

    Args:
        before: uint8 [F, H, W, 3].
        after: likewise.
        features: of both, [F, d] each; None where no model was named.
    """
    difference = np.abs(before.astype(np.int16) - after).mean(dtype=np.float64) / 255
    figures = [_figure(CONTROLS, "difference from base", float(difference), better=False)]
    if features is not None:
        one, other = (each.astype(np.float64) for each in features)
        distance = 0.0 if (one == other).all() else max(0.0, float(1 - (one * other).sum(axis=1).mean()))
        figures.append(_figure(CONTROLS, "distance from base", distance, better=False))
    return figures


def sum_up(figures: Mapping[str, Sequence[Sequence[Figure]]]) -> list[Measure]:
    """Return the mean of each figure, with its standard error where there are several pictures or clips.

    Args:
        figures: of each picture or clip, by variant.
    """
    rows: dict[str, tuple[Figure, dict[str, list[float]]]] = {}
    for variant, clips in figures.items():
        for figure in (figure for clip in clips for figure in clip):
            rows.setdefault(figure.metric, (figure, {}))[1].setdefault(variant, []).append(figure.value)
    return [
        Measure(
            subject=figure.subject,
            metric=metric,
            values={variant: float(np.mean(found)) for variant, found in values.items()},
            higher_is_better=figure.higher_is_better,
            errors={
                variant: _deviation(found) / math.sqrt(len(found))
                for variant, found in values.items()
                if len(found) > 1
            },
        )
        for metric, (figure, values) in rows.items()
    ]


def list_spread(figures: Mapping[str, Sequence[Sequence[Figure]]]) -> dict[str, dict[str, float]]:
    """Return the standard deviation of each figure, by metric and variant, where there are several.

    Args:
        figures: of each picture or clip, by variant.
    """
    spread: dict[str, dict[str, float]] = {}
    for variant, clips in figures.items():
        values: dict[str, list[float]] = {}
        for figure in (figure for clip in clips for figure in clip):
            values.setdefault(figure.metric, []).append(figure.value)
        for metric, found in values.items():
            if len(found) > 1:
                spread.setdefault(metric, {})[variant] = _deviation(found)
    return spread


def _figure(subject: str, metric: str, value: float, *, better: bool) -> Figure:
    return Figure(subject=subject, metric=metric, value=value, higher_is_better=better)


def _deviation(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1))
