"""Training from clips: the frozen parts run once, vectors and scale learn, and a stopped run goes on."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from video_builders import FRAMES, SIZE, TRIGGER, encode, make_clip_set
from video_files import moving, save

from engram_core import InputError, Watcher, open_adapter
from engram_video import Wan22TrainSettings, load_engram
from engram_video.training import clips
from engram_video.training.clips import CLIPS, encode_clips
from engram_video.wan22 import WAN22
from engram_vision.models import load_pipeline
from engram_vision.training import preparation
from engram_vision.training.frozen import TextReader
from engram_vision.training.trainer import METRICS, PREVIEWS, STATE, train

CPU = torch.device("cpu")


@pytest.fixture
def settings(tmp_path, model):
    folder = make_clip_set(tmp_path / "clips")
    return Wan22TrainSettings(
        data=folder,
        trigger=TRIGGER,
        output=tmp_path / "out.safetensors",
        model=str(model),
        steps=4,
        batch_size=2,
        warm_up=0,
        vector_rate=5e-2,
        scale_rate=5e-2,
        width=SIZE,
        height=SIZE,
        frames=FRAMES,
        precision="fp32",
        device="cpu",
        validate_every=2,
        save_every=2,
    )


def test_a_run_writes_an_adapter_that_changes_the_clips(settings, pipeline, base):
    report = WAN22.train(settings)
    adapter = open_adapter(report.output)
    assert adapter.manifest.backbone == "wan22"
    assert list(adapter.names()) == [TRIGGER]
    record = adapter.concept(TRIGGER).record
    assert (record.rule, record.overlap) == ("relative", "mean")
    assert record.training["clips"] == 3
    assert record.training["frames"] == FRAMES
    load_engram(pipeline, adapter, force=True)
    assert not torch.equal(encode(pipeline, TRIGGER), encode(base, TRIGGER))
    assert torch.equal(encode(pipeline, "a red ball"), encode(base, "a red ball"))


def test_the_loss_falls_and_only_vectors_and_scale_learn(settings, monkeypatch):
    loaded, load = [], preparation.load_pipeline
    monkeypatch.setattr(preparation, "load_pipeline", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    report = WAN22.train(replace(settings, steps=60, validate_every=20, save_every=60, keep="last"))
    (pipeline,) = loaded
    assert not any(parameter.requires_grad for parameter in pipeline.transformer.parameters())
    same = load(WAN22.family, settings.model).transformer.state_dict()
    assert all(torch.equal(value, same[name]) for name, value in pipeline.transformer.state_dict().items())
    lines = [json.loads(line) for line in (report.run_dir / METRICS).read_text().splitlines()]
    losses = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert losses[-1] < losses[0]


def test_latents_and_states_are_made_once_and_kept(settings, tmp_path, monkeypatch):
    cached = replace(settings, cache_dir=tmp_path / "cache")
    first = WAN22.train(cached)

    def refuse(*_, **__):
        raise AssertionError("what is kept is encoded again")

    monkeypatch.setattr(clips, "encode_clips", refuse)
    monkeypatch.setattr(TextReader, "_encode", refuse)
    second = WAN22.train(replace(cached, output=tmp_path / "second.safetensors"))
    assert second.output.read_bytes() == first.output.read_bytes()
    with pytest.raises(AssertionError, match="encoded again"):
        WAN22.train(replace(settings, output=tmp_path / "third.safetensors"))


def test_clips_of_odd_sizes_are_resized_and_cut(settings):
    for name, (width, height) in {"odd-0.mkv": (63, 47), "odd-1.mkv": (35, 101)}.items():
        save(settings.data / name, moving(FRAMES + 2, width, height), codec="ffv1", pixels="bgr0")
        with (settings.data / "metadata.jsonl").open("a") as file:
            file.write("\n" + json.dumps({"file_name": name, "text": TRIGGER}))
    report = WAN22.train(settings)
    assert open_adapter(report.output).concept(TRIGGER).record.training["clips"] == 5


def test_an_interrupted_run_ends_with_the_same_adapter(settings, tmp_path, one_thread):
    whole = WAN22.train(replace(settings, output=tmp_path / "whole.safetensors"))

    class Stopping(Watcher):
        def advance(self, done, figures=None):
            if figures is not None and done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WAN22.train(settings, watcher=Stopping())
    assert (settings.output.with_suffix(".run") / STATE).exists()
    WAN22.train(settings, resume=True)
    assert settings.output.read_bytes() == whole.output.read_bytes()


def test_previews_are_clips(settings, monkeypatch):
    monkeypatch.setattr("engram_video.training.clips._PREVIEW_STEPS", 2)
    report = WAN22.train(replace(settings, preview_every=4, steps=4))
    (preview,) = (report.run_dir / PREVIEWS).iterdir()
    assert preview.name == "step-000004-0.mp4"


def test_latents_are_those_the_pipeline_decodes(base):
    """The pipeline undoes shift and scale of the latents, so encoding must have done them."""
    clip = np.random.default_rng(0).integers(0, 256, (FRAMES, SIZE, SIZE, 3), np.uint8)
    mean, std = encode_clips(base.vae, [clip, clip], CPU)
    assert mean.shape == std.shape == (2, base.vae.config.z_dim, 2, SIZE // 4, SIZE // 4)
    pixels = torch.from_numpy(clip).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    with torch.no_grad():
        found = base.vae.encode(pixels).latent_dist
    shape = (1, -1, 1, 1, 1)
    shift, scale = (torch.tensor(base.vae.config[name]).view(shape) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(mean[:1] * scale + shift, found.mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std[:1] * scale, found.std, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frames": 6}, ["6", "5", "9"]),
        ({"width": 40}, ["40", "32", "48"]),
        ({"frames": 33}, ["fewer than 33 frames"]),
    ],
    ids=["frames", "size", "too short"],
)
def test_sizes_that_the_model_cannot_have_are_refused(settings, changes, told):
    with pytest.raises(InputError) as error:
        WAN22.train(replace(settings, **changes))
    assert all(part in str(error.value) for part in told), error.value


def test_a_model_with_two_transformers_is_refused_before_its_weights_are_read(settings, tmp_path, model):
    folder = tmp_path / "experts"
    folder.mkdir()
    index = json.loads((model / "model_index.json").read_text())
    index |= {"transformer_2": ["diffusers", "WanTransformer3DModel"], "boundary_ratio": 0.9}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="has two transformers"):
        train(replace(settings, model=str(folder)), medium=CLIPS)


def test_a_model_that_reads_one_time_for_each_clip_trains_too(settings, plain_model):
    report = WAN22.train(replace(settings, model=str(plain_model), steps=2))
    assert report.kept_step == 2


def test_the_autoencoder_computes_in_full_precision(model):
    pipeline = load_pipeline(WAN22.family, str(model), precision="bf16")
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.transformer.dtype == pipeline.text_encoder.dtype == torch.bfloat16
