"""Training with sites: every block of the denoiser learns a residual of its own, by the code that generation uses."""

import numpy as np
import pytest
import torch
from vision_builders import TRIGGER, Log, captions, write_pictures
from vision_families import NAMES, TRAIN_SETTINGS, copy_family, draw_pictures, width_of

from engram_core import InputError, open_adapter
from engram_core.training.metrics import read_metrics
from engram_vision.families import family_of
from engram_vision.loading import load_engram
from engram_vision.site_hooks import attached_sites
from engram_vision.sites import name_sites
from engram_vision.training import trainer
from engram_vision.training.trainer import METRICS, train

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=NAMES)
def base(request, base_of):
    return base_of(request.param)


@pytest.fixture
def run(base, folder_of, tmp_path):
    """Return a function that trains with sites and returns report and adapter."""
    name = family_of(base).name
    write_pictures(tmp_path / "pictures", captions())

    def start(log=None, *, resume=False, overwrite=False, **values):
        fields = {
            "data": tmp_path / "pictures",
            "trigger": TRIGGER,
            "output": tmp_path / "out.safetensors",
            "model": str(folder_of(name)),
            "sites": "blocks",
            "steps": 4,
            "batch_size": 2,
            "vector_rate": 0.05,
            "scale_rate": 0.01,
            "init_scale": 0.1,
            "warm_up": 1,
            "validate_every": 0,
            "precision": "fp32",
            "device": "cpu",
        }
        report = train(TRAIN_SETTINGS[name](**fields | values), resume=resume, overwrite=overwrite, watcher=log)
        return report, open_adapter(report.output)

    return start


def tables_of(adapter):
    return next(adapter.concepts()).streams


def test_every_site_of_every_stream_learns_something_of_its_own(base, run):
    family = family_of(base)
    report, adapter = run(validate_every=2, validation_draws=1)
    assert np.isfinite(report.loss)
    assert next(adapter.records()).training["sites"] == "blocks"
    sites = name_sites(family, base)
    for stream, table in tables_of(adapter).items():
        assert adapter.manifest.streams[stream].sites == sites
        assert table.vectors.shape[1:] == table.scales.shape == (len(sites), width_of(base, stream))
        assert len({vectors.tobytes() for vectors in table.vectors[0]}) == len(sites)
        assert (np.abs(table.scales - 0.1).max(axis=1) > 1e-3).all()


def test_what_was_learned_can_be_drawn(base, run):
    _, adapter = run()
    pipeline = copy_family(base)
    load_engram(pipeline, adapter)
    assert draw_pictures(pipeline, ["a red ball"]) == draw_pictures(base, ["a red ball"])
    assert draw_pictures(pipeline, [TRIGGER]) != draw_pictures(base, [TRIGGER])


def test_the_loss_is_that_of_a_pipeline_with_the_adapter_loaded(base, run, monkeypatch):
    """The hooks that generation attaches must give the denoiser what training gave it."""
    seen = []
    losses = trainer._Run._losses

    def look(self, parts):
        found = losses(self, parts)
        ((pupil, batch, data),) = parts
        rows = batch.texts
        frozen = {}
        pooled = {s: texts.pooled[rows] for s, texts in data.texts.items() if texts.pooled is not None}
        visited = {name: stream.visited.clone() for name, stream in pupil.streams.items()}
        for stream in pupil.streams.values():
            stream.visited[:] = True
        adapter = pupil.prepared.adapter(self.settings, 0)
        for name, stream in pupil.streams.items():
            stream.visited = visited[name]
        pipeline = copy_family(base)
        load_engram(pipeline, adapter)
        with torch.no_grad():
            for stream, encoder in family_of(pipeline).encoders(pipeline).items():
                # Rows are known again by their bytes, which may differ from those of states made in other batches.
                penultimate = len(pupil.streams) > 1 and stream != "t5"
                out = encoder(data.texts[stream].ids[rows], output_hidden_states=penultimate)
                frozen[stream] = out.hidden_states[-2] if penultimate else out.last_hidden_state
            self.objective.__dict__[_attribute(self)] = getattr(pipeline, self.settings.family.denoiser)
            conditions = self.model.conditioner(frozen, pooled)
            other = self.objective.losses(batch.latents, batch.noise, batch.times, conditions)
            self.objective.__dict__[_attribute(self)] = self._denoiser
        seen.append((found[0].detach(), other))
        return found

    monkeypatch.setattr(trainer._Run, "_losses", look)
    run(steps=2)
    assert len(seen) == 2
    for found, other in seen:
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)


def _attribute(run):
    return "transformer" if hasattr(run.objective, "transformer") else "unet"


def test_an_interrupted_run_gives_the_same_file(base, run):
    def stop():
        raise KeyboardInterrupt

    options = {"steps": 5, "validate_every": 2, "validation_draws": 1, "save_every": 1}
    whole, _ = run(**options)
    expected = whole.output.read_bytes()
    lines = [line["loss"] for line in read_metrics(whole.run_dir / METRICS)]
    with pytest.raises(KeyboardInterrupt):
        run(Log({2: stop}), overwrite=True, **options)
    with pytest.raises(InputError, match="sites"):
        run(resume=True, overwrite=True, **options | {"sites": "text"})
    again, _ = run(resume=True, overwrite=True, **options)
    assert again.output.read_bytes() == expected
    assert [line["loss"] for line in read_metrics(again.run_dir / METRICS)] == lines


def test_gradient_checkpointing_changes_nothing(run):
    _, plain = run()
    _, saved = run(gradient_checkpointing=True, overwrite=True)
    for stream, table in tables_of(saved).items():
        np.testing.assert_allclose(table.vectors, tables_of(plain)[stream].vectors, rtol=1e-3, atol=1e-5)


def test_the_frozen_model_can_be_bfloat16(run):
    report, adapter = run(precision="bf16", steps=2)
    assert np.isfinite(report.loss)
    assert all(table.vectors.dtype == np.float32 for table in tables_of(adapter).values())


def test_previews_change_nothing(run, monkeypatch):
    monkeypatch.setattr("engram_vision.training.pictures._PREVIEW_STEPS", 2)
    _, adapter = run(preview_every=2, preview_prompts=(TRIGGER,), keep="last")
    _, without = run(overwrite=True, keep="last")
    for stream, table in tables_of(without).items():
        assert table.vectors.tobytes() == tables_of(adapter)[stream].vectors.tobytes()


def test_nothing_stays_attached_after_a_run(run, monkeypatch):
    denoisers = []
    steps = trainer._Run._do_steps

    def look(self):
        denoisers.append(self._denoiser)
        assert attached_sites(self._denoiser) is not None
        steps(self)

    monkeypatch.setattr(trainer._Run, "_do_steps", look)
    run(steps=1)
    assert attached_sites(denoisers[0]) is None


def test_sites_begin_alike_and_from_words(run):
    _, adapter = run(steps=1, vector_rate=1e-9, scale_rate=1e-9, init="a red ball")
    for table in tables_of(adapter).values():
        np.testing.assert_allclose(table.vectors, table.vectors[:, :1].repeat(table.vectors.shape[1], 1), atol=1e-6)
