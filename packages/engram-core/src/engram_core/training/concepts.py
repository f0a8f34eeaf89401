"""Training many concepts: in groups that share every pass through the frozen model, here or by workers on machines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from engram_core.backbones import ConceptsTrainingBackbone, TrainReport, Watcher
from engram_core.errors import InputError

__all__ = ["Group", "train_concepts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Concepts that learn together.

    Attributes:
        first: number of the first one among all, from 1.
        total: how many concepts there are in all.
        settings: of each.
    """

    first: int
    total: int
    settings: tuple[Any, ...]

    @property
    def title(self) -> str:
        """What messages call it, e.g. `concepts 9 to 16 of 100`."""
        last = self.first + len(self.settings) - 1
        which = f"concept {self.first}" if last == self.first else f"concepts {self.first} to {last}"
        return f"{which} of {self.total}"


def train_concepts(
    backbone: ConceptsTrainingBackbone,
    settings: Sequence[Any],
    *,
    at_once: int = 8,
    workers: int = 0,
    resume: bool = False,
    overwrite: bool = False,
    watcher: Watcher | None = None,
) -> list[TrainReport]:
    """Train concepts, several in one pass through the frozen model, and write an adapter for each.

    Args:
        backbone: of all of them.
        settings: of each concept.
        at_once: how many learn together; the memory that a step needs grows with it.
        workers: how many processes of a Ray cluster train groups at the same time; 0 trains here, one group after
            another. Workers save their state at every step, and the group of one that is killed goes on from there.
        resume: go on with interrupted runs, and leave concepts whose file is there as they are.
        overwrite: replace adapter files, and begin anew in run folders that are in use.
        watcher: hears how it goes.

    Returns:
        Reports of the concepts that were trained now, in order.

    Raises:
        InputError: `at_once` or `workers` is out of range, or Ray is not installed.
        TrainingError: workers died over the same group again and again.
        EngramError, KeyboardInterrupt: as for `backbone.train_together`; finished concepts stay finished.
    """
    watcher = watcher or Watcher()
    if at_once < 1 or workers < 0:
        raise InputError(f"at_once is {at_once} and workers is {workers}; expected at least 1 and at least 0")
    backbone.check_concepts(settings, resume=resume, overwrite=overwrite)
    left = [each for each in settings if not (resume and not overwrite and each.output.exists())]
    if len(left) < len(settings):
        watcher.note(f"{len(settings) - len(left)} of {len(settings)} concepts are there already")
    groups = list(_split(left, at_once))
    if workers:
        from engram_core.training.workers import train_by_workers  # may need Ray

        groups = [replace(group, settings=tuple(map(_for_worker, group.settings))) for group in groups]
        return train_by_workers(
            backbone.name, groups, workers=workers, resume=resume, overwrite=overwrite, watcher=watcher
        )
    reports = []
    for group in groups:
        heard = watcher if len(groups) == 1 else _GroupWatcher(watcher, group.title)
        reports += backbone.train_together(group.settings, resume=resume, overwrite=overwrite, watcher=heard)
    return reports


def _split(settings: Sequence[Any], size: int) -> Iterator[Group]:
    for first in range(0, len(settings), size):
        yield Group(first=first + 1, total=len(settings), settings=tuple(settings[first : first + size]))


def _for_worker(settings: Any) -> Any:
    """Return settings that mean the same in another folder, and lose no step to a killed process."""
    paths = {
        field.name: value.absolute()
        for field in fields(settings)
        if isinstance(value := getattr(settings, field.name), Path)
    }
    return replace(settings, **paths, save_every=1)


class _GroupWatcher(Watcher):
    """Tells another watcher whose work it is."""

    def __init__(self, watcher: Watcher, title: str) -> None:
        self._watcher, self._title = watcher, title

    def begin(self, title: str, total: int | None = None, done: int = 0) -> None:
        self._watcher.begin(f"{self._title}: {title}", total, done)

    def advance(self, done: int, figures: Mapping[str, float] | None = None) -> None:
        self._watcher.advance(done, figures)

    def end(self) -> None:
        self._watcher.end()

    def note(self, message: str) -> None:
        self._watcher.note(f"{self._title}: {message}")
