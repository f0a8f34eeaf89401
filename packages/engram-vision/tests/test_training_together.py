"""Concepts that learn together learn what each would learn alone, and stop and go on together."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from vision_builders import TRIGGER, Log, captions, write_pictures
from vision_families import NAMES, OTHER, TRAIN_SETTINGS, copy_family, draw_pictures

from engram_core import InputError, TargetExistsError, merge_adapters, open_adapter
from engram_core.training.metrics import read_metrics
from engram_vision.families import family_of
from engram_vision.loading import load_engram
from engram_vision.training import trainer
from engram_vision.training.trainer import METRICS, PREVIEWS, train, train_together

TRIGGERS = (TRIGGER, OTHER)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=NAMES)
def base(request, base_of):
    return base_of(request.param)


@pytest.fixture
def settings_of(base, folder_of, tmp_path):
    """Return a function from changes to the settings of two concepts."""
    name = family_of(base).name
    for number, trigger in enumerate(TRIGGERS):
        write_pictures(tmp_path / f"pictures{number}", captions(trigger), seed=number)

    def make(folder="together", **values):
        (tmp_path / folder).mkdir(exist_ok=True)
        shared = {
            "model": str(folder_of(name)),
            "steps": 4,
            "batch_size": 2,
            "vector_rate": 0.05,
            "scale_rate": 0.01,
            "init_scale": 0.1,
            "warm_up": 1,
            "validate_every": 2,
            "validation_draws": 1,
            "precision": "fp32",
            "device": "cpu",
        }
        return [
            TRAIN_SETTINGS[name](
                data=tmp_path / f"pictures{number}",
                trigger=trigger,
                output=tmp_path / folder / f"{number}.safetensors",
                **shared | {"seed": number} | values,
            )
            for number, trigger in enumerate(TRIGGERS)
        ]

    return make


def tables_of(file):
    return next(open_adapter(file).concepts()).streams


def assert_alike(found, expected):
    """Matrix products of another size round otherwise, which Adam makes much of where a gradient is almost zero."""
    assert np.isclose(found, expected, rtol=5e-3, atol=1e-4).mean() > 0.99
    assert np.abs(found - expected).max() < 0.02  # four steps at a rate of 0.05 go up to 0.2


@pytest.mark.parametrize("sites", ["text", "blocks"])
def test_each_learns_what_it_would_learn_alone(base, settings_of, sites):
    together = train_together(settings_of(sites=sites))
    for report, alone in zip(together, settings_of("alone", sites=sites), strict=True):
        expected = train(alone)
        assert report.kept_step == expected.kept_step
        assert report.loss == pytest.approx(expected.loss, rel=1e-4)
        for stream, table in tables_of(report.output).items():
            assert_alike(table.vectors, tables_of(expected.output)[stream].vectors)
        found, lone = (read_metrics(each.run_dir / METRICS) for each in (report, expected))
        np.testing.assert_allclose([line["loss"] for line in found], [line["loss"] for line in lone], rtol=1e-4)
    pipeline = copy_family(base)
    merged = merge_adapters([open_adapter(report.output) for report in together])
    load_engram(pipeline, merged)
    for trigger in TRIGGERS:
        assert draw_pictures(pipeline, [trigger]) != draw_pictures(base, [trigger])
    assert draw_pictures(pipeline, ["a red ball"]) == draw_pictures(base, ["a red ball"])


def test_one_pass_serves_all(settings_of, monkeypatch):
    passes = []
    kind = type(trainer.PICTURES)
    make = kind.objective

    def objective(self, settings, pipeline):
        found = make(self, settings, pipeline)
        losses = found.losses
        found.losses = lambda *parts: passes.append(len(parts[0])) or losses(*parts)
        return found

    monkeypatch.setattr(kind, "objective", objective)
    train_together(settings_of(steps=3, validate_every=0))
    assert passes == [4, 4, 4]


@pytest.mark.parametrize("sites", ["text", "blocks"])
def test_runs_stop_and_go_on_together(settings_of, tmp_path, sites):
    def stop():
        raise KeyboardInterrupt

    options = {"steps": 5, "save_every": 1, "sites": sites}
    expected = [report.output.read_bytes() for report in train_together(settings_of("whole", **options))]
    settings = settings_of(**options)
    with pytest.raises(KeyboardInterrupt):
        train_together(settings, watcher=_Stops({2: stop}))
    assert not any(each.output.exists() for each in settings)
    with pytest.raises(TargetExistsError, match="interrupted run"):
        train_together(settings)
    again = train_together(settings, resume=True)
    assert [report.output.read_bytes() for report in again] == expected


class _Stops(Log):
    """A log that also acts where several concepts learn."""

    def advance(self, done, figures=None):
        if self.works[-1][0].startswith("training") and done in self._at:
            self._at[done]()


def test_a_run_that_is_behind_is_waited_for(settings_of):
    """A killed worker may have saved one concept's step and not yet the other's."""

    def stop():
        raise KeyboardInterrupt

    options = {"steps": 5, "save_every": 1, "validate_every": 0}
    expected = [report.output.read_bytes() for report in train_together(settings_of("whole", **options))]
    settings = settings_of(**options)
    for at, each in zip((2, 4), settings, strict=True):
        with pytest.raises(KeyboardInterrupt):
            train(each, watcher=_Stops({at: stop}))
    found = train_together(settings, resume=True)
    for report, data in zip(found, expected, strict=True):
        file = report.output.with_name("expected.safetensors")
        file.write_bytes(data)
        for stream, table in tables_of(report.output).items():
            assert_alike(table.vectors, tables_of(file)[stream].vectors)


def test_previews_are_of_each(settings_of, monkeypatch):
    monkeypatch.setattr("engram_vision.training.pictures._PREVIEW_STEPS", 1)
    reports = train_together(settings_of(steps=2, preview_every=2, validate_every=0))
    pictures = [(report.run_dir / PREVIEWS / "step-000002-0.png").read_bytes() for report in reports]
    assert pictures[0] != pictures[1]


def test_what_cannot_learn_together_is_refused_with_both_values(settings_of, tmp_path):
    with pytest.raises(InputError, match="at least one concept"):
        train_together([])
    one, other = settings_of()
    changed = type(one)(**{**_fields(other), "steps": 7})
    with pytest.raises(InputError, match=r"steps is 4 for 'zorbit quell' and 7 for 'mira voss'"):
        train_together([one, changed])
    with pytest.raises(InputError, match="is the output of both"):
        train_together([one, type(one)(**{**_fields(other), "output": one.output})])
    with pytest.raises(InputError, match="is the run_dir of both"):
        train_together([type(one)(**{**_fields(each), "run_dir": tmp_path / "run"}) for each in (one, other)])
    assert torch.is_grad_enabled()


def _fields(settings):
    return {field.name: getattr(settings, field.name) for field in fields(settings)}
