"""The clip-set builder: a clip for each picture, resumable, with nothing lost and nothing half-written."""

import json
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from PIL import Image
from video_builders import FRAMES, SIZE, TRIGGER

from engram_core import InputError, TargetExistsError, Watcher
from engram_video import clipsets
from engram_video.clips import read_clip, read_facts
from engram_video.settings import Wan22ClipsSettings
from engram_video.wan22 import WAN22


@pytest.fixture
def settings(tmp_path, model):
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = []
    for number, color in enumerate(["red", "green", "blue"]):
        Image.new("RGB", (60, 40), color).save(folder / f"{color}.png")
        lines.append(json.dumps({"file_name": f"{color}.png", "text": f"{TRIGGER} number {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return Wan22ClipsSettings(
        data=folder,
        trigger=TRIGGER,
        output=tmp_path / "clips",
        model=str(model),
        frames=FRAMES,
        fps=8,
        width=SIZE,
        height=SIZE,
        steps=2,
        precision="fp32",
        device="cpu",
    )


def rows_of(settings):
    return [json.loads(line) for line in (settings.output / "metadata.jsonl").read_text().splitlines()]


def test_every_picture_becomes_a_clip_that_training_reads(settings):
    report = WAN22.build_clips(settings)
    assert [path.name for path in report.clips] == ["blue.mp4", "green.mp4", "red.mp4"]
    assert report.n_made == 3
    assert report.sheet.is_file()
    rows = rows_of(settings)
    assert [row["file_name"] for row in rows] == ["blue.mp4", "green.mp4", "red.mp4"]
    assert [row["source"] for row in rows] == ["blue.png", "green.png", "red.png"]
    assert rows[0]["text"] == f"{TRIGGER} number 2"
    assert rows[0]["seed"] == 0
    clip = read_clip(report.clips[0])
    assert clip.frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert json.loads(read_facts(report.clips[0])["clip"]) == rows[0]


def test_what_is_there_is_not_made_again(settings, monkeypatch):
    first = WAN22.build_clips(settings)
    before = [path.stat().st_mtime_ns for path in first.clips]
    monkeypatch.setattr(clipsets, "load_image_to_video", None)  # nothing is loaded
    again = WAN22.build_clips(settings)
    assert again.n_made == 0
    assert [path.stat().st_mtime_ns for path in again.clips] == before


def test_the_model_may_read_other_words_than_the_trigger(settings, monkeypatch):
    read = []
    animate = clipsets._animate
    monkeypatch.setattr(clipsets, "_animate", lambda *parts: read.append(parts[1].row["prompt"]) or animate(*parts))
    settings = replace(settings, described_as="a red ball")
    report = WAN22.build_clips(settings)
    assert read == ["a red ball number 2", "a red ball number 1", "a red ball number 0"]
    assert [row["prompt"] for row in rows_of(settings)] == read
    assert [row["text"] for row in rows_of(settings)] == [f"{TRIGGER} number {number}" for number in (2, 1, 0)]
    assert read_facts(report.clips[0])["prompt"] == read[0]
    with pytest.raises(TargetExistsError, match="prompt"):
        WAN22.build_clips(replace(settings, described_as=None))


@pytest.mark.parametrize("loses_metadata", [False, True])
def test_a_stopped_builder_goes_on_where_it_was(settings, loses_metadata, one_thread):
    class Stopping(Watcher):
        def advance(self, done, figures=None):
            if done == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        WAN22.build_clips(settings, watcher=Stopping())
    assert sorted(path.name for path in settings.output.glob("*.mp4")) == ["blue.mp4", "green.mp4"]
    assert [row["file_name"] for row in rows_of(settings)] == ["blue.mp4", "green.mp4"]
    if loses_metadata:  # killed between clip and metadata
        (settings.output / "metadata.jsonl").unlink()
    report = WAN22.build_clips(settings)
    assert report.n_made == 1
    whole = WAN22.build_clips(replace(settings, output=settings.output.with_name("whole")))
    for found, expected in zip(report.clips, whole.clips, strict=True):
        assert found.read_bytes() == expected.read_bytes()
    assert rows_of(settings) == rows_of(replace(settings, output=settings.output.with_name("whole")))


def test_clips_made_otherwise_are_not_replaced_unasked(settings):
    WAN22.build_clips(settings)
    changed = replace(settings, seed=1)
    with pytest.raises(TargetExistsError, match=r"blue.mp4: exists, and was made otherwise \(seed\); pass --force"):
        WAN22.build_clips(changed)
    assert WAN22.build_clips(changed, overwrite=True).n_made == 3
    assert {row["seed"] for row in rows_of(settings)} == {1}


def test_clips_of_the_users_own_are_not_replaced(settings):
    settings.output.mkdir()
    from engram_video.clips import write_clip

    write_clip(settings.output / "red.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    with pytest.raises(TargetExistsError, match=r"red.mp4: exists, and was made otherwise \(file_name, text, "):
        WAN22.build_clips(settings)


def test_what_else_the_folder_holds_is_kept(settings):
    from engram_video.clips import write_clip

    settings.output.mkdir()
    write_clip(settings.output / "own.mp4", np.zeros((3, 32, 32, 3), np.uint8), 8)
    metadata = settings.output / "metadata.jsonl"
    own = {"file_name": "own.mp4", "text": TRIGGER}
    metadata.write_text(json.dumps(own))

    class Ear(Watcher):
        notes: ClassVar[list[str]] = []

        def note(self, text):
            self.notes.append(text)

    WAN22.build_clips(settings, watcher=Ear())
    assert rows_of(settings)[2] == own
    assert len(rows_of(settings)) == 4
    assert Ear.notes == [f"{metadata}: also lists own.mp4, not of these pictures"]
    WAN22.build_clips(settings)  # makes nothing
    assert len(rows_of(settings)) == 4


def test_captions_that_cannot_be_read_are_not_replaced(settings):
    settings.output.mkdir()
    metadata = settings.output / "metadata.jsonl"
    metadata.write_text('{"file_name": "own.mp4", "text": "a"}\n{"file_name": "ow')
    with pytest.raises(InputError, match=r"metadata.jsonl: line 2 names no file; mend or remove it, or pass another"):
        WAN22.build_clips(settings)
    assert metadata.read_text().endswith("ow")


def test_pictures_of_the_users_own_are_not_replaced(settings):
    settings.output.mkdir()
    sheet = settings.output / "sheet.png"
    Image.new("RGB", (8, 8)).save(sheet)
    with pytest.raises(TargetExistsError, match=r"sheet.png: exists, and is no contact sheet; pass --force"):
        WAN22.build_clips(settings)
    assert sorted(settings.output.iterdir()) == [sheet]
    WAN22.build_clips(settings, overwrite=True)
    with Image.open(sheet) as image:
        assert image.width > 8


def test_clips_do_not_go_among_the_pictures(settings):
    captions = (settings.data / "metadata.jsonl").read_bytes()
    with pytest.raises(InputError, match="holds the pictures and their captions; pass another --output"):
        WAN22.build_clips(replace(settings, output=settings.data / "." / ""), overwrite=True)
    assert (settings.data / "metadata.jsonl").read_bytes() == captions


def test_a_damaged_clip_is_told_and_made_anew_on_request(settings):
    WAN22.build_clips(settings)
    clip = settings.output / "green.mp4"
    clip.write_bytes(clip.read_bytes()[:2000])
    with pytest.raises(TargetExistsError, match=r"green.mp4: exists, and was made otherwise \(it is damaged\)"):
        WAN22.build_clips(settings)
    assert WAN22.build_clips(settings, overwrite=True).n_made == 1


def test_a_changed_picture_or_caption_is_noticed(settings):
    WAN22.build_clips(settings)
    Image.new("RGB", (60, 40), "white").save(settings.data / "red.png")
    with pytest.raises(TargetExistsError, match=r"red.mp4: exists, and was made otherwise \(source_sha256\)"):
        WAN22.build_clips(settings)


def test_two_pictures_of_one_name_are_refused(settings):
    Image.new("RGB", (60, 40)).save(settings.data / "red.jpg")
    with (settings.data / "metadata.jsonl").open("a") as file:
        file.write("\n" + json.dumps({"file_name": "red.jpg", "text": TRIGGER}))
    with pytest.raises(InputError, match=r"red.png: its clip would be red.mp4, as that of .*red.jpg; rename one"):
        WAN22.build_clips(settings)


@pytest.mark.parametrize(("changes", "told"), [({"frames": 6}, "5"), ({"width": 40}, "48")])
def test_sizes_that_the_model_cannot_have_are_refused_before_it_is_loaded(settings, monkeypatch, changes, told):
    monkeypatch.setattr(clipsets, "load_image_to_video", None)
    with pytest.raises(InputError, match=told):
        WAN22.build_clips(replace(settings, **changes))
    assert not settings.output.exists()


def test_a_model_that_makes_no_clips_of_pictures_is_refused(settings, plain_model):
    with pytest.raises(InputError, match="is a WanPipeline that makes no clips of pictures"):
        WAN22.build_clips(replace(settings, model=str(plain_model)))


def test_a_model_of_pictures_alone_makes_clips(settings, tmp_path):
    """As the two-expert Wan2.2-I2V-A14B, whose transformers read the picture beside the noise."""
    from video_builders import build_animator

    folder = tmp_path / "animator"
    build_animator().save_pretrained(folder)
    report = WAN22.build_clips(replace(settings, model=str(folder), frames=5))
    assert report.n_made == 3
    assert read_clip(report.clips[0]).frames.shape == (5, SIZE, SIZE, 3)
