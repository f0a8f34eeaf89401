"""Folders of captioned clips: captions as of pictures, and a reason for every refusal."""

import json

import pytest
from PIL import Image
from video_files import moving, save

from engram_core import InputError
from engram_video.clips import ClipInfo, write_clip
from engram_video.dataset import read_clips

TRIGGER = "Zorbit the robot"
ENDINGS = ".mp4, .mov, .mkv, .webm, .avi, .gif"


def add_clip(path, count=5, width=32, height=16):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_clip(path, moving(count, width, height), 8)


def add_pair(folder, name="run.mp4", caption=f"{TRIGGER} runs"):
    add_clip(folder / name)
    (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")


def add_lines(folder, *lines):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")


def found(folder, **options):
    return [(clip.path.relative_to(folder).as_posix(), clip.caption) for clip in read_clips(folder, TRIGGER, **options)]


def refusal(folder, **options):
    with pytest.raises(InputError) as caught:
        read_clips(folder, options.pop("trigger", TRIGGER), **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_json_lines_with_what_the_builder_adds(tmp_path):
    add_clip(tmp_path / "a.mp4")
    add_clip(tmp_path / "sub" / "b.mp4", 9)
    add_lines(
        tmp_path,
        {"file_name": "sub/b.mp4", "text": "{trigger} jumps"},
        {"file_name": "a.mp4", "text": f" {TRIGGER} runs ", "source": "a.png", "seed": 7, "text_2": [1]},
    )
    first, second = read_clips(tmp_path, TRIGGER)
    assert (first.path, first.caption) == (tmp_path / "a.mp4", f"{TRIGGER} runs")
    assert first.extra == {"source": "a.png", "seed": 7, "text_2": [1]}
    assert first.info == ClipInfo(frames=5, fps=8.0, width=32, height=16, duration=0.625)
    assert (second.caption, second.extra, second.info.frames) == (f"{TRIGGER} jumps", {}, 9)


def test_sidecars(tmp_path):
    add_pair(tmp_path, "b.mp4", f"\ufeff{TRIGGER} runs\r\n")
    save(tmp_path / "a.WEBM.webm", codec="libvpx")
    (tmp_path / "a.WEBM.txt").write_text("{trigger} at sea")
    (tmp_path / "a.WEBM.webm").rename(tmp_path / "a.WEBM")
    (tmp_path / "a.WEBM.txt").rename(tmp_path / "a.txt")
    assert found(tmp_path) == [("a.WEBM", f"{TRIGGER} at sea"), ("b.mp4", f"{TRIGGER} runs")]


@pytest.mark.parametrize("is_inside", [True, False])
def test_tinyengram(tmp_path, is_inside):
    root = tmp_path / "preprocessed" if is_inside else tmp_path
    add_clip(root / "a.mp4")
    (tmp_path / "metadata.json").write_text(json.dumps({"a.mp4": {"training_prompt": f"{TRIGGER} runs"}}))
    notes = []
    (clip,) = read_clips(tmp_path, TRIGGER, note=notes.append)
    assert (clip.path, clip.caption) == (root / "a.mp4", f"{TRIGGER} runs")
    used = [f"{tmp_path}: the clips in preprocessed are used, as in TinyEngram, and no others"] if is_inside else []
    assert notes == [*used, f"{root / 'a.mp4'}: is the only clip; with several the subject is learned more reliably"]


def test_pictures_beside_clips_are_ignored(tmp_path):
    add_pair(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "sheet.png")
    assert [name for name, _ in found(tmp_path)] == ["run.mp4"]


def test_captions_without_trigger_and_clips_without_caption(tmp_path):
    add_pair(tmp_path, "a.mp4", "a dog")
    add_clip(tmp_path / "b.mp4")
    assert refusal(tmp_path) == (
        f"{tmp_path}: the trigger '{TRIGGER}' is not in the caption of a.mp4, and there is no caption for b.mp4; write "
        "captions with the trigger, or pass --insert-trigger to put it in front"
    )
    assert found(tmp_path, insert_trigger=True) == [("a.mp4", f"{TRIGGER}, a dog"), ("b.mp4", TRIGGER)]
    assert refusal(tmp_path, trigger=" ") == "the trigger is ' '; give the phrase that shall recall the subject"


def test_bad_folders(tmp_path):
    assert refusal(tmp_path / "gone") == f"{tmp_path / 'gone'}: does not exist; give the folder that holds the clips"
    assert refusal(tmp_path) == f"{tmp_path}: is empty; put the clips and their captions into it"
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert refusal(tmp_path) == (
        f"{tmp_path}: holds no clips ({ENDINGS}); put them there, or name those in subfolders in metadata.jsonl"
    )
    (tmp_path / "a.txt").write_text(TRIGGER)
    assert refusal(tmp_path) == (
        f"{tmp_path / 'a.txt'}: there is no clip for this caption; put one of the same name beside it"
    )


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"file_name": "b.mp4", "text": "a"},
            "names 'b.mp4', which is not there; put it into FOLDER, or drop its capt",
        ),
        ({"file_name": "a.png", "text": "a"}, f"names 'a.png', which is no clip ({ENDINGS}); drop its caption"),
        ({"file_name": "a.mp4", "text": "a"}, "names 'a.mp4' a second time; keep one caption for a clip"),
        ({"file_name": "../a.mp4", "text": "a"}, "names '../a.mp4', which leaves the folder; give the name relative"),
        ({"file_name": "a.mp4"}, "lacks text; it has ['file_name']"),
    ],
)
def test_bad_lines(tmp_path, row, expected):
    add_clip(tmp_path / "a.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    add_lines(tmp_path, {"file_name": "a.mp4", "text": TRIGGER}, row)
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path / 'metadata.jsonl'}, line 2: ")
    assert expected.replace("FOLDER", str(tmp_path)) in message


def test_several_kinds_of_captions(tmp_path):
    add_pair(tmp_path)
    add_lines(tmp_path, {"file_name": "run.mp4", "text": TRIGGER})
    assert f"{tmp_path}: has captions of several kinds: " in refusal(tmp_path)


def test_a_caption_of_several_clips(tmp_path):
    add_pair(tmp_path)
    (tmp_path / "run.mov").write_bytes((tmp_path / "run.mp4").read_bytes())
    expected = f"{tmp_path / 'run.txt'}: is the caption of several clips, run.mov, run.mp4; rename all but one"
    assert refusal(tmp_path) == expected


def test_damaged_clips_are_refused(tmp_path):
    add_pair(tmp_path, "a.mp4")
    add_pair(tmp_path, "b.mp4")
    data = (tmp_path / "b.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[:-20])
    assert f"{tmp_path / 'b.mp4'}: is cut off: it has {len(data) - 20} of at least {len(data)} bytes" in refusal(
        tmp_path
    )


def test_clips_that_are_too_short_are_named_together(tmp_path):
    for name, count in (("a", 9), ("b", 5), ("c", 1)):
        add_clip(tmp_path / f"{name}.mp4", count)
    assert refusal(tmp_path, insert_trigger=True, frames=9) == (
        f"{tmp_path}: fewer than 9 frames are in b.mp4 (5), c.mp4 (1); use longer clips or fewer frames"
    )
    assert len(found(tmp_path, insert_trigger=True, frames=1)) == 3


def test_small_clips_are_noted(tmp_path):
    add_pair(tmp_path, "a.mp4")
    add_clip(tmp_path / "b.mp4", 5, 64, 64)
    notes = []
    found(tmp_path, insert_trigger=True, size=(64, 16), note=notes.append)
    assert notes == [f"{tmp_path / 'a.mp4'}: is 32x16, smaller than 64x16; it is enlarged"]
