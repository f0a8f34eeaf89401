"""Where the points of a loss curve lie in a small drawing: axes, ticks, lines and the marker of the kept step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from engram_core import InputError

__all__ = ["Curve", "Dot", "Plot", "Tick", "plot_curve"]

Point = tuple[float, float]

# The drawing's units are CSS pixels at full size; text in it is 12 of them high.
_WIDTH, _HEIGHT = 480.0, 216.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 464.0, 36.0, 172.0
# More points than pixels only blacken the drawing, and losses of single batches say little.
_MOST_POINTS = 200
# A curve that falls further than this is read better on a logarithmic axis.
_LOG_FROM = 8.0
# What training that has come apart may report is left out, before differences overflow.
_LARGEST = 1e100
_STEPS = (1, 2, 5, 10)
_INTERVALS = 4
_DASH = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """How the loss of one character went.

    Attributes:
        steps: the steps whose training loss was logged, ascending.
        losses: their training losses; NaN and infinities leave a gap.
        validation: (step, loss) of each validation, ascending.
        kept_step: the step whose vectors are in the file; None when there is none to show.
    """

    steps: tuple[int, ...]
    losses: tuple[float, ...]
    validation: tuple[tuple[int, float], ...] = ()
    kept_step: int | None = None

    def __post_init__(self) -> None:
        """Refuse a curve whose steps and losses do not pair up."""
        if len(self.steps) != len(self.losses):
            raise InputError(f"the curve has {len(self.steps)} steps and {len(self.losses)} losses; give one for each")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A labelled place on an axis.

    Attributes:
        at: its x or y.
        label: what is written there.
    """

    at: float
    label: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A validation.

    Attributes:
        x, y: where.
        step: its step.
        loss: its loss.
    """

    x: float
    y: float
    step: int
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Plot:
    """A curve ready to be drawn; every coordinate lies inside `width` and `height`.

    Attributes:
        width, height: size of the drawing.
        left, right, top, bottom: the frame that the axes make.
        x_ticks, y_ticks: of the axes.
        training: path of the training loss, in SVG's words; empty when there is nothing to draw.
        validation: path of the validation loss.
        dots: the validations.
        kept: the kept step's place on the x axis.
        kept_dot: the validation of the kept step.
        log: whether the y axis is logarithmic.
        mean_of: how many logged losses one point of the training line averages.
        summary: the curve in words.
    """

    width: float = _WIDTH
    height: float = _HEIGHT
    left: float = _LEFT
    right: float = _RIGHT
    top: float = _TOP
    bottom: float = _BOTTOM
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    training: str
    validation: str
    dots: tuple[Dot, ...]
    kept: float | None
    kept_dot: Dot | None
    log: bool
    mean_of: int
    summary: str


def plot_curve(curve: Curve) -> Plot:
    """Return where everything in a curve's drawing lies.

    Losses that are no number leave a gap. More than a few hundred logged losses are averaged in equal runs of steps.

    Args:
        curve: what to draw.
    """
    mean_of = max(1, math.ceil(len(curve.steps) / _MOST_POINTS))
    training = _average(curve.steps, curve.losses, mean_of)
    values = [loss for _, loss in (*training, *curve.validation) if _is_shown(loss)]
    log = bool(values) and min(values) > 0 and max(values) / min(values) >= _LOG_FROM
    low, high, y_values = _log_axis(values) if log else _linear_axis(values)

    steps = [*curve.steps, *(step for step, _ in curve.validation)]
    steps += [] if curve.kept_step is None else [curve.kept_step]
    first, last = min([0, *steps]), max([1, *steps])

    def place_x(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_RIGHT - _LEFT)

    def place_y(loss: float) -> float:
        height = math.log10(loss) if log else loss
        return _BOTTOM - (height - low) / (high - low) * (_BOTTOM - _TOP)

    def place(points: Iterable[Point]) -> list[Point | None]:
        return [(place_x(step), place_y(loss)) if _is_shown(loss) else None for step, loss in points]

    dots = tuple(
        Dot(x=place_x(step), y=place_y(loss), step=step, loss=loss)
        for step, loss in curve.validation
        if _is_shown(loss)
    )
    return Plot(
        x_ticks=tuple(Tick(at=place_x(step), label=str(step)) for step in _step_ticks(first, last)),
        y_ticks=tuple(Tick(at=place_y(value), label=label) for value, label in y_values) if values else (),
        training=_write_path(place(training)),
        validation=_write_path(place(curve.validation)),
        dots=dots,
        kept=None if curve.kept_step is None else place_x(curve.kept_step),
        kept_dot=next((dot for dot in dots if dot.step == curve.kept_step), None),
        log=log,
        mean_of=mean_of,
        summary=_summarise(curve, training, dots),
    )


def _is_shown(loss: float) -> bool:
    return abs(loss) < _LARGEST  # false for NaN too


def _average(steps: Sequence[int], losses: Sequence[float], size: int) -> list[Point]:
    points = []
    for start in range(0, len(steps), size):
        run = [loss for loss in losses[start : start + size] if _is_shown(loss)]
        places = steps[start : start + size]
        points.append((sum(places) / len(places), sum(run) / len(run) if run else math.nan))
    return points


def _round_step(least: float) -> float:
    """Return the smallest of 1, 2 or 5 times a power of ten that is not below `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next((power * digit for digit in _STEPS if power * digit >= least), power * 10)


def _linear_axis(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    low, high = min(values, default=0.0), max(values, default=1.0)
    scale = max(abs(low), abs(high))
    if high - low <= max(1e-9 * scale, 1e-12):
        margin = 0.1 * scale if scale > 1e-12 else 1.0
        low, high = low - margin, high + margin
    step = _round_step((high - low) / _INTERVALS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [index * step + 0.0 for index in range(first, last + 1)]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = digits <= 4 and scale < 1e5
    # Rounded ends may miss a value by the last bit, which must not leave the frame.
    ends = min(ticks[0], low), max(ticks[-1], high)
    return *ends, [(tick, f"{tick:.{digits}f}" if plain else f"{tick:.3g}") for tick in ticks]


def _log_axis(values: Sequence[float]) -> tuple[float, float, list[tuple[float, str]]]:
    low, high = math.log10(min(values)), math.log10(max(values))
    every = math.ceil((high - low) / (_INTERVALS + 1))
    powers = range(math.floor(low), math.ceil(high) + 1)
    ticks = [power for power in powers if power % every == 0]
    heights = [float(power) for power in ticks]
    if high - low < 2:
        heights = [power + math.log10(digit) for power in powers for digit in (1, 2, 5)]
    heights = [height for height in heights if low <= height <= high]
    return low, high, [(10.0**height, f"{10.0**height:.3g}") for height in heights]


def _step_ticks(first: int, last: int) -> list[int]:
    step = max(1, round(_round_step((last - first) / _INTERVALS)))
    return list(range(math.ceil(first / step) * step, last + 1, step))


def _write_path(points: Iterable[Point | None]) -> str:
    runs: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return "".join(_write_run(run) for run in runs if run)


def _write_run(run: Sequence[Point]) -> str:
    if len(run) == 1:
        # A line needs two ends, so a point between gaps is a dash.
        (x, y) = run[0]
        run = [(x - _DASH, y), (x + _DASH, y)]
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in run)


def _summarise(curve: Curve, training: Sequence[Point], dots: Sequence[Dot]) -> str:
    shown = [(step, loss) for step, loss in training if _is_shown(loss)]
    sentences = []
    if shown:
        (first, before), (last, after) = shown[0], shown[-1]
        sentences.append(f"Training loss {before:.3g} at step {first:.0f} and {after:.3g} at step {last:.0f}.")
    if dots:
        best = min(dots, key=lambda dot: dot.loss)
        sentences.append(f"Lowest validation loss {best.loss:.3g} at step {best.step}.")
    if curve.kept_step is not None:
        sentences.append(f"Step {curve.kept_step} was kept.")
    return " ".join(sentences) or "No loss was recorded."
