"""Generating clips: base and engram under the same noise, files that say how they were made, and a contact sheet."""

import json

import pytest
from PIL import Image
from video_builders import FRAMES, SIZE, TRIGGER, make_adapter

from engram_core import InputError, TargetExistsError, Watcher
from engram_video import Wan22GenerateSettings
from engram_video.clips import read_clip, read_facts
from engram_video.wan22 import WAN22
from engram_vision import generation


@pytest.fixture
def settings_for(tmp_path, model, one_thread):
    make_adapter().save(tmp_path / "one.safetensors")

    def make(**changes):
        given = {
            "output": tmp_path / "out",
            "adapters": (str(tmp_path / "one.safetensors"),),
            "prompts": (f"{TRIGGER} in the snow", "a red ball"),
            "model": str(model),
            "steps": 2,
            "width": SIZE,
            "height": SIZE,
            "frames": FRAMES,
            "fps": 8,
            "precision": "fp32",
            "device": "cpu",
        }
        return Wan22GenerateSettings(**given | changes)

    return make


def test_base_and_engram_stand_side_by_side_and_the_control_is_identical(settings_for):
    report = WAN22.generate(settings_for(compare=True))
    names = [file.path.name for file in report.files]
    assert names == [
        "000-zorbit-quell-in-the-snow-0-base.mp4",
        "001-a-red-ball-0-base.mp4",
        "000-zorbit-quell-in-the-snow-0-engram.mp4",
        "001-a-red-ball-0-engram.mp4",
    ]
    base, control_base, engram, control = (read_clip(file.path).frames for file in report.files)
    assert base.shape == (FRAMES, SIZE, SIZE, 3)
    assert (base != engram).any()
    assert (control == control_base).all()
    assert report.grid.name == "sheet.png"
    with Image.open(report.grid) as sheet:
        assert sheet.size[1] > 4 * SIZE
    facts = read_facts(report.files[2].path)
    assert facts["prompt"] == f"{TRIGGER} in the snow"
    assert json.loads(facts["engrams"])[0]["strengths"] == {TRIGGER: 1.0}


def test_every_frame_of_the_control_is_the_base_models_byte_for_byte(settings_for, tmp_path):
    only = {"prompts": ("a red ball",)}
    with_engram = WAN22.generate(settings_for(**only, output=tmp_path / "with"))
    without = WAN22.generate(settings_for(**only, output=tmp_path / "without", adapters=()))
    frames = [read_clip(report.files[0].path).frames.tobytes() for report in (with_engram, without)]
    assert frames[0] == frames[1]


def test_what_was_drawn_before_it_was_stopped_is_kept(settings_for):
    class Stopping(Watcher):
        def advance(self, done, figures=None):
            if done == 1:
                raise KeyboardInterrupt

    settings = settings_for(compare=True)
    with pytest.raises(KeyboardInterrupt):
        WAN22.generate(settings, watcher=Stopping())
    (kept,) = settings.output.iterdir()
    assert kept.name == "000-zorbit-quell-in-the-snow-0-base.mp4"
    assert len(read_clip(kept).frames) == FRAMES


def test_nothing_is_overwritten_unasked(settings_for):
    WAN22.generate(settings_for())
    with pytest.raises(TargetExistsError, match="pass --force"):
        WAN22.generate(settings_for())
    WAN22.generate(settings_for(), overwrite=True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frames": 7}, ["7", "5", "9"]),
        ({"height": 30}, ["30", "32"]),
    ],
    ids=["frames", "size"],
)
def test_sizes_that_the_model_cannot_draw_are_refused_before_it_is_loaded(settings_for, monkeypatch, changes, told):
    monkeypatch.setattr(generation, "load_pipeline", None)
    with pytest.raises(InputError) as error:
        WAN22.generate(settings_for(**changes))
    assert all(part in str(error.value) for part in told), error.value


def test_a_size_must_be_told(settings_for):
    assert list(settings_for().faults()) == []
    (fault,) = settings_for(width=None).faults()
    assert fault == "width is none, expected pixels: a video model has no size of its own"
