"""The plots of the page, in SVG: seeds as dots, means as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib import pyplot as plt

from recipes.results.figures import Spread

# Colours that people with any kind of colour vision can tell apart (Okabe and Ito).
OURS, OTHERS, BASE, INK = "#0072B2", "#E69F00", "#999999", "#222222"
CURVES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00")
_WIDTH = 8.0  # inches
mpl.rcParams |= {
    "svg.hashsalt": "engram",  # the same figures give the same file
    "svg.fonttype": "path",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def color_of(method: str) -> str:
    """Return a method's colour."""
    return OURS if method.startswith("engram") else BASE if method.startswith("the base") else OTHERS


def plot_bars(path: Path, title: str, figures: Mapping[str, Spread], *, limit: float | None = None) -> None:
    """Draw one bar for each method, with a dot for each seed.

    Args:
        path: SVG to write.
        title: what is measured.
        figures: method to its seeds, from top to bottom.
        limit: end of the axis; None leaves it open.
    """
    figure, axes = plt.subplots(figsize=(_WIDTH, 0.34 * len(figures) + 1.0))
    for row, (method, spread) in enumerate(figures.items()):
        axes.barh(row, spread.mean, color=color_of(method), height=0.66)
        axes.plot(spread.seeds, [row] * len(spread.seeds), "o", color=INK, markersize=3, clip_on=False, zorder=3)
        axes.annotate(
            f"{spread.mean:.2f}" if spread.mean >= 0.1 or not spread.mean else f"{spread.mean:.3f}",
            (max(spread.seeds), row),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(range(len(figures)), list(figures))
    axes.invert_yaxis()
    axes.set_xlim(0, limit)
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def plot_trade(path: Path, title: str, points: Mapping[str, tuple[float, Spread]], labels: tuple[str, str]) -> None:
    """Draw methods as points: a cost on a logarithmic axis, and what it buys.

    Args:
        path: SVG to write.
        title: what is shown.
        points: method to cost and figure.
        labels: of both axes.
    """
    figure, axes = plt.subplots(figsize=(_WIDTH, 4.2))
    for method, (cost, spread) in points.items():
        error = [[spread.mean - spread.low], [spread.high - spread.mean]]
        axes.errorbar(cost, spread.mean, yerr=error, fmt="o", color=color_of(method), capsize=2)
        axes.annotate(method, (cost, spread.mean), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.set_ylim(0, 1.05)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, loc="left", fontsize=11)
    _save(figure, path)


def plot_curves(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[tuple[float, Spread | float]]],
    labels: tuple[str, str],
    *,
    log: bool = False,
) -> None:
    """Draw curves over a logarithmic axis of numbers, with their seeds' range shaded.

    Args:
        path: SVG to write.
        title: what is shown.
        curves: name to points.
        labels: of both axes.
        log: whether the other axis is logarithmic too.
    """
    figure, axes = plt.subplots(figsize=(_WIDTH, 3.8))
    for color, (name, points) in zip(CURVES, curves.items(), strict=False):
        x = [at for at, _ in points]
        spreads = [each if isinstance(each, Spread) else Spread(seeds=(each,)) for _, each in points]
        axes.plot(x, [each.mean for each in spreads], "o-", color=color, label=name, markersize=4)
        axes.fill_between(x, [e.low for e in spreads], [e.high for e in spreads], color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    if log:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.05)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
