"""Many concepts: groups are split, trained and gone on with; workers that die are replaced."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from engram_core import InputError, TrainingError, TrainReport, Watcher
from engram_core.training import concepts, workers
from engram_core.training.concepts import train_concepts


@dataclass(frozen=True, kw_only=True)
class Settings:
    trigger: str
    data: Path
    output: Path
    save_every: int = 250


class Backbone:
    """Trains by writing the trigger; remembers its calls."""

    name = "toy"

    def __init__(self):
        self.checked, self.calls = [], []

    def check_concepts(self, settings, *, resume=False, overwrite=False):
        self.checked.append((list(settings), resume, overwrite))

    def train_together(self, settings, *, resume=False, overwrite=False, watcher=None):
        self.calls.append((list(settings), resume, overwrite))
        if watcher is not None:
            watcher.begin("training", 3)
            watcher.advance(3, {"loss": 0.5})
            watcher.note("a picture is small")
            watcher.end()
        for each in settings:
            each.output.write_text(each.trigger)
        return [report_of(each) for each in settings]


def report_of(settings):
    return TrainReport(
        output=settings.output,
        run_dir=settings.output.with_suffix(".run"),
        identity="ab",
        n_bytes=1,
        steps=3,
        kept_step=3,
        loss=0.5,
        seconds=1.0,
        entries={},
    )


class Heard(Watcher):
    def __init__(self):
        self.lines = []

    def begin(self, title, total=None, done=0):
        self.lines.append(f"begin {title} {total}")

    def advance(self, done, figures=None):
        self.lines.append(f"advance {done}")

    def end(self):
        self.lines.append("end")

    def note(self, message):
        self.lines.append(f"note {message}")


@pytest.fixture
def settings(tmp_path):
    return [Settings(trigger=f"t{n}", data=Path("data"), output=tmp_path / f"{n}.safetensors") for n in range(5)]


@pytest.mark.parametrize(("at_once", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_groups_follow_the_order(settings, at_once, sizes):
    backbone = Backbone()
    reports = train_concepts(backbone, settings, at_once=at_once)
    assert [report.output for report in reports] == [each.output for each in settings]
    assert [len(group) for group, _, _ in backbone.calls] == sizes
    assert [each for group, _, _ in backbone.calls for each in group] == settings
    assert backbone.checked == [(settings, False, False)]


def test_what_is_wrong_is_told_before_anything_is_trained(settings):
    class Strict(Backbone):
        def check_concepts(self, settings, *, resume=False, overwrite=False):
            raise InputError("two write the same file")

    backbone = Strict()
    with pytest.raises(InputError, match="same file"):
        train_concepts(backbone, settings)
    for wrong in ({"at_once": 0}, {"workers": -1}):
        with pytest.raises(InputError, match="expected at least 1 and at least 0"):
            train_concepts(Backbone(), settings, **wrong)
    assert not backbone.calls


def test_finished_concepts_stay_as_they_are(settings):
    for each in settings[:3]:
        each.output.write_text("done")
    backbone, heard = Backbone(), Heard()
    reports = train_concepts(backbone, settings, at_once=1, resume=True, watcher=heard)
    assert [report.output for report in reports] == [each.output for each in settings[3:]]
    assert all(resume for _, resume, _ in backbone.calls)
    assert "note 3 of 5 concepts are there already" in heard.lines
    assert [each.output.read_text() for each in settings] == ["done"] * 3 + ["t3", "t4"]
    assert len(train_concepts(Backbone(), settings, overwrite=True)) == 5


def test_watchers_hear_which_group_works(settings):
    heard = Heard()
    train_concepts(Backbone(), settings, at_once=2, watcher=heard)
    assert heard.lines[:4] == [
        "begin concepts 1 to 2 of 5: training 3",
        "advance 3",
        "note concepts 1 to 2 of 5: a picture is small",
        "end",
    ]
    assert "begin concept 5 of 5: training 3" in heard.lines
    alone = Heard()
    train_concepts(Backbone(), settings, at_once=5, overwrite=True, watcher=alone)
    assert alone.lines[0] == "begin training 3"


# Workers


class WorkerCrashedError(Exception):
    pass


class NodeDiedError(Exception):
    pass


class RayTaskError(Exception):
    def __init__(self, cause):
        super().__init__(str(cause))
        self.cause = cause


class Ray:
    """As much of Ray as is used; tasks run when they are waited for, in the order in which `wait` is told to."""

    exceptions = SimpleNamespace(
        WorkerCrashedError=WorkerCrashedError, NodeDiedError=NodeDiedError, RayTaskError=RayTaskError
    )

    def __init__(self, resources=None):
        self.resources = resources or {"CPU": 4.0}
        self.is_up, self.options, self.most, self.canceled = False, None, 0, []
        self.running = []

    def is_initialized(self):
        return self.is_up

    def init(self, **_options):
        self.is_up = True

    def shutdown(self):
        self.is_up = False

    def cluster_resources(self):
        return self.resources

    def remote(self, **options):
        self.options = options

        def wrap(function):
            def begin(*arguments):
                task = lambda: function(*arguments)  # noqa: E731 - compared by identity
                self.running.append(task)
                self.most = max(self.most, len(self.running))
                return task

            return SimpleNamespace(remote=begin)

        return wrap

    def wait(self, tasks, num_returns=1, timeout=None):
        return tasks[-num_returns:], tasks[:-num_returns]

    def get(self, task):
        self.running.remove(task)
        try:
            return task()
        except InputError as error:
            raise RayTaskError(error) from None

    def cancel(self, task):
        self.canceled.append(task)


@pytest.fixture
def crew(monkeypatch):
    """A function that trains with workers, on a fake cluster."""

    def start(settings, backbone=None, ray=None, **options):
        backbone, ray = backbone or Backbone(), ray or Ray()
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setattr(workers, "load_backbone", {"toy": backbone}.get)
        return train_concepts(backbone, settings, **options), backbone, ray

    return start


def test_workers_train_groups_and_reports_keep_their_order(settings, crew):
    heard = Heard()
    reports, backbone, ray = crew(settings, at_once=2, workers=2, watcher=heard)
    assert [report.output for report in reports] == [each.output for each in settings]
    assert ray.most == 2
    assert ray.options == {"num_cpus": 2, "max_retries": 0}
    assert not ray.is_up
    assert heard.lines[0] == "begin training concepts 5"
    assert heard.lines[-2:] == ["advance 5", "end"]
    for group, resume, overwrite in backbone.calls:
        assert (resume, overwrite) == (False, False)
        assert all(each.save_every == 1 and each.data.is_absolute() for each in group)


def test_each_worker_takes_a_gpu_where_there_are_any(settings, crew):
    _, _, ray = crew(settings, workers=1, ray=Ray({"CPU": 8.0, "GPU": 2.0}))
    assert ray.options == {"num_gpus": 1, "max_retries": 0}


def test_a_cluster_that_runs_already_is_left_running(settings, crew):
    ray = Ray()
    ray.is_up = True
    crew(settings, workers=1, ray=ray)
    assert ray.is_up


@pytest.mark.parametrize("death", [WorkerCrashedError, NodeDiedError])
def test_another_worker_goes_on_where_one_died(settings, crew, death):
    class Mortal(Backbone):
        def train_together(self, settings, *, resume=False, overwrite=False, watcher=None):
            if not resume and settings[0].trigger == "t2":
                self.calls.append((list(settings), resume, overwrite))
                raise death("killed")
            return super().train_together(settings, resume=resume, overwrite=overwrite)

    heard = Heard()
    reports, backbone, _ = crew(settings, Mortal(), at_once=2, workers=2, watcher=heard, overwrite=True)
    assert [report.output for report in reports] == [each.output for each in settings]
    assert "note concepts 3 to 4 of 5: its worker died; another goes on from the last step" in heard.lines
    (again,) = [(resume, overwrite) for group, resume, overwrite in backbone.calls if resume]
    assert again == (True, False)


def test_a_group_that_kills_every_worker_is_given_up(settings, crew):
    class Deadly(Backbone):
        def train_together(self, settings, **options):
            raise WorkerCrashedError("killed")

    with pytest.raises(TrainingError, match=r"concepts 4 to 5 of 5: 3 workers died over it; go on with --resume"):
        crew(settings, Deadly(), at_once=3, workers=2)


def test_the_first_error_stops_the_others(settings, crew):
    class Picky(Backbone):
        def train_together(self, settings, **options):
            raise InputError(f"{settings[0].trigger}: has no captions")

    ray = Ray()
    with pytest.raises(InputError, match="t4: has no captions"):
        crew(settings, Picky(), ray=ray, at_once=2, workers=3)
    assert len(ray.canceled) == 2
    assert not ray.is_up


def test_workers_need_ray(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"workers need Ray.*pip install ray"):
        train_concepts(Backbone(), settings, workers=1)


def test_groups_are_called_by_their_place(settings):
    group = concepts.Group(first=3, total=9, settings=tuple(settings[:2]))
    assert group.title == "concepts 3 to 4 of 9"
    assert replace(group, settings=group.settings[:1]).title == "concept 3 of 9"
