"""Groups of concepts trained by the workers of a Ray cluster, on this machine or on many.

Every machine needs the same packages, and sees data, outputs and run folders under the same paths.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from engram_core.backbones import TrainReport, Watcher, load_backbone
from engram_core.errors import InputError, TrainingError
from engram_core.training.concepts import Group

__all__ = ["train_by_workers"]

_DEATHS = 3  # of workers over one group, after which it is the group's fault
_PATIENCE = 30.0  # seconds in which stopped workers save their states


def train_by_workers(
    backbone: str, groups: Sequence[Group], *, workers: int, resume: bool, overwrite: bool, watcher: Watcher
) -> list[TrainReport]:
    """Train groups of concepts, so many at the same time; what a killed worker leaves, another goes on with.

    Args:
        backbone: name of the backbone, which every machine has installed.
        groups: with absolute paths, saving at every step.
        workers: how many at the same time; where the cluster has GPUs, each takes one.
        resume: as for `train_concepts`.
        overwrite: as for `train_concepts`.
        watcher: hears how many concepts are done, and of workers that died.

    Raises:
        InputError: Ray is not installed.
        TrainingError: workers died over the same group again and again.
        EngramError: what the first failing group raised; the other groups are stopped.
        KeyboardInterrupt: every state was saved.
    """
    ray = _import_ray()
    reports: dict[int, list[TrainReport]] = {}
    waiting = deque(range(len(groups)))
    deaths = [0] * len(groups)
    running: dict[Any, int] = {}
    with _cluster(ray):
        work = _remote(ray, workers)
        total = sum(len(group.settings) for group in groups)
        watcher.begin("training concepts", total)
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    number = waiting.popleft()
                    died = deaths[number] > 0  # then another goes on from its last step
                    task = work.remote(backbone, groups[number].settings, resume or died, overwrite and not died)
                    running[task] = number
                (done,), _ = ray.wait(list(running))
                number = running.pop(done)
                try:
                    reports[number] = ray.get(done)
                except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError) as error:
                    deaths[number] += 1
                    if deaths[number] == _DEATHS:
                        raise TrainingError(
                            f"{groups[number].title}: {_DEATHS} workers died over it; go on with --resume, "
                            "with fewer at once if memory ran out"
                        ) from error
                    watcher.note(f"{groups[number].title}: its worker died; another goes on from the last step")
                    waiting.appendleft(number)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from None
                watcher.advance(sum(map(len, reports.values())))
            watcher.end()
        finally:
            for task in running:
                ray.cancel(task)
            if running:
                ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE)
    return [report for number in range(len(groups)) for report in reports[number]]


def _train_group(backbone: str, settings: Sequence[Any], resume: bool, overwrite: bool) -> list[TrainReport]:
    """Train a group in a worker."""
    family: Any = load_backbone(backbone)
    reports: list[TrainReport] = family.train_together(settings, resume=resume, overwrite=overwrite)
    return reports


def _import_ray() -> Any:
    try:
        return import_module("ray")
    except ImportError:
        raise InputError(
            "workers need Ray, which is not installed; install it (`pip install ray`), or train without workers"
        ) from None


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Use the cluster that runs already or that RAY_ADDRESS names, else begin one of this machine."""
    if ray.is_initialized():
        yield
        return
    ray.init(log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def _remote(ray: Any, workers: int) -> Any:
    """Return the task: with a GPU where the cluster has any, else with its share of the processors."""
    resources = ray.cluster_resources()
    if resources.get("GPU", 0) >= 1:
        return ray.remote(num_gpus=1, max_retries=0)(_train_group)
    # Ray tells libraries to use as many threads as a task has processors.
    return ray.remote(num_cpus=max(1, int(resources.get("CPU", 1)) // workers), max_retries=0)(_train_group)
