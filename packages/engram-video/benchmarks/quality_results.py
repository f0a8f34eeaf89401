"""What the runs of `quality` come to: one result of each, and the tables and figures of all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any, TypeAlias

from measure import Outcome, Table
from scores import Score

from engram_core.container import open_target, write_all

BASE, DESCRIBED = "the base model", "the base model, looks in words"


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run came to.

    Attributes:
        facts: what it depends on; it is made anew when they differ.
        values: how many learned.
        seconds: of learning.
        scores: of each clip in a new scene and motion.
        identical: how many clips of prompts without a trigger have the base model's bytes.
        controls: how many such prompts there are.
        difference: mean absolute difference of these clips from the base model's, in 0..1.
        showing: share of their frames that show the character.
    """

    facts: Mapping[str, Any]
    values: int = 0
    seconds: float = 0.0
    scores: Sequence[Score]
    identical: int = 0
    controls: int = 0
    difference: float = 0.0
    showing: float = 0.0

    @classmethod
    def read(cls, file: Path) -> Result:
        """Return one that was kept."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**values | {"scores": [Score(**score) for score in values["scores"]]})

    def write(self, file: Path) -> None:
        """Keep it, whole or not at all."""
        with open_target(file, overwrite=True) as target:
            write_all(target, memoryview(json.dumps(asdict(self), indent=1).encode()))


# By method and by seed of learning.
Found: TypeAlias = Mapping[str, Mapping[int, Sequence[Result]]]


def sum_up(found: Found, made: Mapping[str, float]) -> Outcome:
    """Return tables and figures.

    Args:
        found: what each run came to: by method and seed, one for each character.
        made: by character, the share of frames of the clips learned from that show it.
    """
    shows, holds, stays = [], [], []
    seeds = list(next(iter(found.values())))
    figures: dict[str, Any] = {"seeds": seeds}
    for name, by_seed in found.items():
        results = [result for each in by_seed.values() for result in each]
        means = {metric: list_means(by_seed, metric) for metric in Score.__dataclass_fields__}
        values = sorted({result.values for result in results})
        seconds = [result.seconds for result in results]
        shown = {
            metric: show_means(found_means, digits=3 if metric in ("warping", "flow") else 2)
            for metric, found_means in means.items()
        }
        learned = (
            "" if not values[-1] else " to ".join(f"{value:,}" for value in dict.fromkeys((values[0], values[-1])))
        )
        shows.append((name, learned, *(shown[metric] for metric in ("identity", "identity_drop", "scene", "motion"))))
        holds.append((name, *(shown[each] for each in ("likeness", "likeness_drop", "consistency", "warping", "flow"))))
        if name != DESCRIBED:
            identical, count = (sum(getattr(each, what) for each in results) for what in ("identical", "controls"))
            difference = show_means(_means_of(by_seed, lambda result: result.difference), digits=3)
            showing = show_means(_means_of(by_seed, lambda result: result.showing))
            took = f"{mean(seconds):.0f} s" if learned else ""
            stays.append((name, f"{identical} of {count}", difference, showing, took))
        figures[name] = {
            "values": values,
            "seconds": seconds,
            "identical": [result.identical for result in results],
            "controls": [result.controls for result in results],
            "difference": [result.difference for result in results],
            "showing": [result.showing for result in results],
            **means,
        }
    figures["frames of the clips learned from that show the character"] = made
    n_clips = sum(len(result.scores) for result in next(iter(found[BASE].values())))
    of_seeds = f"mean (lowest to highest) of {len(seeds)} seeds of {n_clips} clips"
    return Outcome(
        tables=[
            Table(
                title=f"Characters in new scenes and motions, {of_seeds}",
                columns=("method", "learns", "identity", "lost by the end", "scene", "motion"),
                rows=shows,
            ),
            Table(
                title=f"The same clips by the judge's features and by optical flow, {of_seeds}",
                columns=("method", "likeness", "lost by the end", "consistency", "warping error", "flow"),
                rows=holds,
            ),
            Table(
                title="Prompts without the name, and the time that learning took",
                columns=("method", "identical clips", "difference", "frames with the character", "learning"),
                rows=stays,
            ),
        ],
        notes=[
            "of the frames of the clips learned from, the judge finds the character in "
            + ", ".join(f"{share:.2f} ({name})" for name, share in made.items())
            + "."
        ],
        figures=figures,
    )


def list_means(by_seed: Mapping[int, Sequence[Result]], metric: str) -> list[float]:
    """Return a figure's mean over the clips of each seed; seeds in which it was never measured are left out."""
    values = [
        [value for result in results for score in result.scores if (value := getattr(score, metric)) is not None]
        for results in by_seed.values()
    ]
    return [mean(each) for each in values if each]


def _means_of(by_seed: Mapping[int, Sequence[Result]], read: Callable[[Result], float]) -> list[float]:
    return [mean(map(read, results)) for results in by_seed.values()]


def show_means(values: Sequence[float], digits: int = 2) -> str:
    """Return mean, lowest and highest as one cell."""
    if not values:
        return ""
    low, high = min(values), max(values)
    return f"{mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"
