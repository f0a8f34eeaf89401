"""Clips arrive upright, in RGB and whole, or are refused with a reason; what is written plays everywhere."""

import os
import subprocess
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import grey, misstate_frames, moving, save, save_sound, turn

from engram_core import AdapterWriteError, InputError, TargetExistsError
from engram_video import clips, decoding
from engram_video.clips import ClipInfo, probe_clip, read_clip, read_facts, write_clip
from engram_video.frames import fit_frames

FORMATS = [
    ("clip.mp4", "libx264", "yuv420p"),
    ("clip.mov", "mpeg4", "yuv420p"),
    ("clip.mkv", "libx264", "yuv420p"),
    ("clip.webm", "libvpx", "yuv420p"),
    ("clip.avi", "libx264", "yuv420p"),
    ("clip.gif", "gif", "rgb8"),
]
EVEN = "and H.264 in 4:2:0 takes even sizes from 2x2 only"


def refusal(function, *args, **options):
    with pytest.raises(InputError) as caught:
        function(*args, **options)
    message = str(caught.value)
    assert message.isprintable()
    return message


def difference(one, other):
    assert one.shape == other.shape
    return float(np.abs(one.astype(int) - other.astype(int)).mean())


def boxes(data):
    """Return the kinds of the boxes that an MP4 consists of, in order."""
    kinds, place = [], 0
    while place < len(data):
        kinds.append(data[place + 4 : place + 8].decode())
        place += int.from_bytes(data[place : place + 4], "big")
    return kinds


@pytest.mark.parametrize(("name", "codec", "pixels"), FORMATS)
def test_formats(tmp_path, name, codec, pixels):
    path = save(tmp_path / name, codec=codec, pixels=pixels, rate=25)
    assert probe_clip(path) == ClipInfo(frames=12, fps=25.0, width=64, height=48, duration=12 / 25)
    clip = read_clip(path)
    assert clip.fps == 25.0
    assert clip.frames.dtype == np.uint8
    assert difference(clip.frames, moving()) < (30 if codec == "gif" else 9)


def test_content_decides_not_the_name(tmp_path):
    path = save(tmp_path / "clip.webm", codec="libvpx-vp9").rename(tmp_path / "clip.mp4")
    assert probe_clip(path).frames == 12


def test_wanted_frames_only_in_the_wanted_order(tmp_path):
    path = save(tmp_path / "clip.mp4", grey([0, 40, 80, 120, 160, 200]))
    assert read_clip(path, frames=[5, 0, 2, 2]).frames[:, 4, 4, 0].astype(int) == pytest.approx([200, 0, 80, 80], abs=3)
    assert refusal(read_clip, path, frames=[0, 6]) == f"{path}: has 6 frames, and frame 6 was asked for, from 0"
    for frames in ([], [-1, 2]):
        assert refusal(read_clip, path, frames=frames) == (
            f"{path}: frames are {frames}, expected indices from 0, at least one"
        )


def test_frames_are_resized_while_decoding(tmp_path):
    path = save(tmp_path / "clip.mp4")
    assert np.array_equal(read_clip(path, size=(20, 30)).frames, fit_frames(read_clip(path).frames, 20, 30))


def test_only_wanted_frames_are_held(tmp_path):
    path = save(tmp_path / "clip.mp4", np.broadcast_to(moving(1, 320, 240), (60, 240, 320, 3)))
    tracemalloc.start()
    try:
        read_clip(path, frames=[0, 59])
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 8 * 240 * 320 * 3


def test_more_than_memory_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "clip.mp4")
    monkeypatch.setattr(clips, "_MOST_BYTES", 5 * 64 * 48 * 3)
    assert "its frames of 64x48 need more than" in refusal(read_clip, path)
    assert len(read_clip(path, frames=range(5)).frames) == 5


@pytest.mark.parametrize("matrix", [((a, 0), (0, d)) for a in (1, -1) for d in (1, -1)])
@pytest.mark.parametrize("is_across", [False, True])
def test_phones_turn_clips(tmp_path, matrix, is_across):
    if is_across:
        matrix = (matrix[0][::-1], matrix[1][::-1])
    path = save(tmp_path / "clip.mp4")
    flat = read_clip(path).frames
    turn(path, matrix)
    # The definition, pixel by pixel: (x, y) times the matrix, moved so that the least is 0.
    y, x = np.mgrid[0:48, 0:64]
    (a, b), (c, d) = matrix
    new_x, new_y = a * x + c * y, b * x + d * y
    new_x, new_y = new_x - new_x.min(), new_y - new_y.min()
    expected = np.zeros((12, new_y.max() + 1, new_x.max() + 1, 3), np.uint8)
    expected[:, new_y, new_x] = flat
    assert np.array_equal(read_clip(path).frames, expected)
    assert (probe_clip(path).width, probe_clip(path).height) == (expected.shape[2], expected.shape[1])


def test_a_quarter_turn_clockwise(tmp_path):
    path = turn(save(tmp_path / "clip.mp4"), ((0, 1), (-1, 0)))  # what a phone held upright writes
    frame = read_clip(path).frames[0].astype(int)
    assert frame.shape == (64, 48, 3)
    assert frame[4, -4] == pytest.approx([255, 0, 0], abs=8)  # red was at the left of the top
    assert frame[4, 4] == pytest.approx([0, 0, 255], abs=8)


def test_slanting_clips_are_refused(tmp_path):
    path = turn(save(tmp_path / "clip.mp4"), ((0.8660, 0.5), (-0.5, 0.8660)))
    assert f"{path}: is to be shown turned by 30 degrees, not a multiple of 90" in refusal(read_clip, path)


def test_pixels_become_square(tmp_path):
    path = save(tmp_path / "clip.mp4", sample_aspect_ratio=Fraction(3, 2))
    assert (probe_clip(path).width, probe_clip(path).height) == (96, 48)
    assert read_clip(path).frames.shape == (12, 48, 96, 3)


def test_transparency_is_dropped(tmp_path):
    path = tmp_path / "clip.gif"
    images = [Image.new("RGBA", (16, 16), (0, 0, 0, 0)) for _ in range(3)]
    for number, image in enumerate(images):
        image.paste((255, 0, 0, 255), (0, 0, 8, 4 * number + 4))
    images[0].save(path, save_all=True, append_images=images[1:], duration=100, disposal=2)
    clip = read_clip(path)
    assert clip.frames.shape == (3, 16, 16, 3)
    assert clip.fps == pytest.approx(10)
    assert clip.frames[0, 1, 1].tolist() == [255, 0, 0]


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_high_dynamic_range_is_refused(tmp_path, transfer, name):
    path = save(tmp_path / "clip.mp4", pixels="yuv420p10le", color_trc=transfer, color_primaries=9, colorspace=9)
    message = refusal(probe_clip, path)
    assert message.startswith(f"{path}: has high dynamic range ({name}); convert it: ffmpeg -i clip.mp4 -vf zscale=")


def test_ten_bits_are_no_high_dynamic_range(tmp_path):
    path = save(tmp_path / "clip.mp4", grey([0, 100, 255]), pixels="yuv420p10le")
    assert read_clip(path).frames[:, 4, 4, 0].astype(int).tolist() == pytest.approx([0, 100, 255], abs=2)


def test_titles_may_be_in_any_encoding(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, moving(2), 24, facts={"prompt": "caf\N{LATIN SMALL LETTER E WITH ACUTE}"})
    path.write_bytes(path.read_bytes().replace(b"caf\xc3\xa9", b"caf\xe9\xe9"))
    assert probe_clip(path).frames == 2
    assert read_facts(path)["prompt"].startswith("caf")


def test_full_range_is_told_from_limited(tmp_path):
    for color_range in (1, 2):
        path = save(tmp_path / f"{color_range}.mp4", grey([0, 100, 255]), color_range=color_range)
        found = read_clip(path).frames[:, 4, 4, 0].astype(int)
        # The encoder is given the same values in both; only the mark differs.
        assert found.tolist() == pytest.approx([0, 100, 255] if color_range == 1 else [16, 102, 235], abs=2)


def test_frames_are_counted_not_believed(tmp_path):
    path = misstate_frames(save(tmp_path / "clip.avi", codec="mpeg4"), 99)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 99
    assert probe_clip(path).frames == 12


@pytest.mark.parametrize("rate", ["24", "30000/1001", "16", "59.94"])
@pytest.mark.parametrize("name", ["clip.mkv", "clip.mp4"])
def test_rates_survive_rounded_times(tmp_path, rate, name):
    rate = Fraction(rate)
    assert probe_clip(save(tmp_path / name, rate=rate)).fps == pytest.approx(float(rate), rel=1e-6)


def test_variable_rates_are_refused(tmp_path):
    times = [0, 4, 8, 12, 16, 28, 32, 36, 40, 44, 48, 52]
    path = save(tmp_path / "a phone's.mp4", times=times, tick=Fraction(1, 96))
    expected = (
        f"{path}: has a variable frame rate: its 12 frames are 41.7 to 125.0 ms apart; make it constant: "
        "ffmpeg -i 'a phone'\"'\"'s.mp4' -vf fps=20 constant.mp4"
    )
    assert refusal(probe_clip, path) == expected
    assert refusal(read_clip, path, frames=[0]) == expected


def test_clocks_may_tremble(tmp_path):
    times = [n * 100 + (n * 37) % 11 - 5 + 5 for n in range(12)]
    info = probe_clip(save(tmp_path / "clip.mp4", times=times, tick=Fraction(1, 3000)))
    assert info.fps == pytest.approx(30, rel=0.01)


def test_one_frame_is_a_clip(tmp_path):
    info = probe_clip(save(tmp_path / "clip.mp4", moving(1)))
    assert (info.frames, info.fps) == (1, 24.0)


def test_files_that_are_no_clips(tmp_path):
    empty, text, picture, folder = (tmp_path / name for name in ("empty.mp4", "text.mp4", "picture.mp4", "folder"))
    empty.touch()
    text.write_text("https://example.org/clip.mp4\n")
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    folder.mkdir()
    assert refusal(probe_clip, empty) == f"{empty}: is empty (0 bytes); copy or make it again"
    assert f"{text}: begins with b'https://', as no .mp4, .mov, .mkv, .webm, .avi, .gif file does" in refusal(
        probe_clip, text
    )
    assert f"{picture}: is a picture, expected a clip" in refusal(probe_clip, picture)
    assert refusal(probe_clip, folder) == f"{folder}: is no file; give the file of a clip"
    gone = tmp_path / "gone.mp4"
    assert refusal(probe_clip, gone) == (
        f"{gone}: cannot be read: No such file or directory; check the path and its permissions"
    )
    assert "null byte" in refusal(probe_clip, Path("a\0b.mp4"))
    sound = save_sound(tmp_path / "sound.mp4")
    assert refusal(read_clip, sound) == f"{sound}: holds no video, only audio; replace it"


def test_playlists_are_not_followed(tmp_path):
    save(tmp_path / "clip.mp4")
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.mp4\n#EXT-X-ENDLIST\n")
    assert "begins with b'#EXTM3U" in refusal(probe_clip, path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_pipes_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "clip.mp4")
    assert "is no file" in refusal(probe_clip, tmp_path / "clip.mp4")


@pytest.mark.parametrize(("name", "codec", "pixels"), FORMATS)
@pytest.mark.parametrize("share", [0.3, 0.7, 0.99])
def test_files_that_are_cut_off(tmp_path, name, codec, pixels, share):
    path = save(tmp_path / name, codec=codec, pixels=pixels)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    message = refusal(read_clip, path, frames=[0])
    assert message.startswith(f"{path}: is cut off: it has {int(len(data) * share)} ")
    assert message.endswith(" bytes and lacks its end; copy or make it again")
    if name.endswith(("webm", "avi")):
        assert f" of at least {len(data)} bytes" in message


def test_damaged_frames_are_refused(tmp_path):
    path = save(tmp_path / "clip.mp4", options={"g": "1"})
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 1500
    data[start : start + 400] = bytes(400)
    path.write_bytes(data)
    message = refusal(read_clip, path)
    assert message.startswith(f"{path}: is damaged")
    assert "convert it to MP4 with H.264" in message or "copy or make it again" in message


def test_missing_parts_of_matroska_are_noticed(tmp_path):
    path = save(tmp_path / "clip.mkv", moving(48), options={"g": "4"}, muxing={"cluster_time_limit": "200"})
    data = bytearray(path.read_bytes())
    cluster, cues = b"\x1f\x43\xb6\x75", b"\x1c\x53\xbb\x6b"
    assert data.count(cluster) > 5
    start = [place for place in range(len(data)) if data.startswith(cluster, place)][3]
    data[start : data.rindex(cues)] = bytes(data.rindex(cues) - start)
    path.write_bytes(data)
    assert f"{path}: is damaged" in refusal(probe_clip, path)


def test_encrypted_clips_are_refused(tmp_path):
    keys = {"encryption_key": "76a6c65c5ea762046bd749a2e632ccbb", "encryption_kid": "a7e61c373e219033c21091fa607bf3b8"}
    path = save(tmp_path / "clip.mp4", muxing={"encryption_scheme": "cenc-aes-ctr", **keys})
    assert refusal(probe_clip, path) == f"{path}: is encrypted; replace it by a copy that is not"


def test_absurd_sizes_are_refused(tmp_path, monkeypatch):
    path = save(tmp_path / "clip.mp4")
    for module in (decoding, clips):
        monkeypatch.setattr(module, "MAX_SIDE", 60)
    assert refusal(probe_clip, path) == f"{path}: is 64x48, larger than 60 pixels a side; scale it down"
    assert "frames are 64x48, at most 60 pixels a side" in refusal(write_clip, tmp_path / "b.mp4", moving(), 24)


def test_sizes_that_change_are_refused(tmp_path):
    first, second = (tmp_path / f"{name}.gif" for name in "ab")
    path = save(first, codec="gif", pixels="rgb8")
    with av.open(str(second), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuvj420p"
        for number, width in enumerate((64, 64, 32)):
            encoder = av.CodecContext.create("mjpeg", "w")
            encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = width, 48, "yuvj420p", Fraction(1, 24)
            frame = av.VideoFrame.from_ndarray(moving(1, width)[0]).reformat(format="yuvj420p")
            for packet in encoder.encode(frame):
                packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 24)
                container.mux(packet)
    assert probe_clip(path).width == 64
    assert f"{second}: changes its size at frame 2, from 64x48 to 32x48" in refusal(probe_clip, second)


def test_decoding_says_nothing(tmp_path, capfd):
    path = save(tmp_path / "clip.mp4")
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 600
    data[start : start + 100] = bytes(100)
    path.write_bytes(data)
    refusal(probe_clip, path)
    write_clip(tmp_path / "new.mp4", moving(), 24)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files cannot be counted here")
def test_no_file_stays_open(tmp_path):
    good, bad = save(tmp_path / "good.mp4"), tmp_path / "bad.mp4"
    bad.write_bytes(good.read_bytes().replace(b"avcC", b"junk"))
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    read_clip(good, frames=[0])
    read_facts(good)
    write_clip(tmp_path / "new.mp4", moving(2), 24)
    for _ in range(3):
        refusal(probe_clip, bad)
        refusal(read_clip, good, frames=[99])
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


@pytest.mark.parametrize("seed", range(40))
def test_junk_is_refused_or_decoded(tmp_path, seed):
    random = np.random.default_rng(seed)
    name, codec, pixels = FORMATS[seed % len(FORMATS)]
    data = bytearray(save(tmp_path / name, moving(6), codec=codec, pixels=pixels).read_bytes())
    for place in random.integers(0, len(data), random.integers(1, 12)):
        data[place] = random.integers(0, 256)
    (tmp_path / name).write_bytes(data)
    try:
        message = ""
        assert probe_clip(tmp_path / name).frames >= 1
    except InputError as error:
        message = str(error)
    assert message.isprintable()
    assert not message or message.startswith(f"{tmp_path / name}: ")


def test_written_clips_come_back(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, moving(), 24)
    assert probe_clip(path) == ClipInfo(frames=12, fps=24.0, width=64, height=48, duration=0.5)
    found = read_clip(path).frames.astype(int)
    assert difference(found, moving()) < 6  # at the edges, where colours have half the resolution
    for corner, color in ((np.s_[4, 4], (255, 0, 0)), (np.s_[4, -4], (0, 255, 0)), (np.s_[-4, 4], (0, 0, 255))):
        assert found[(3, *corner)] == pytest.approx(color, abs=4)
    levels = list(range(0, 256, 5))
    write_clip(path, grey(levels), 24, overwrite=True)
    assert read_clip(path).frames[:, 8, 16].astype(int).mean(-1) == pytest.approx(levels, abs=1.5)


def test_written_clips_play_everywhere(tmp_path):
    path = tmp_path / "clip.mp4"
    write_clip(path, moving(), Fraction(30000, 1001), facts={"prompt": "a red ball"})
    assert boxes(path.read_bytes())[:2] == ["ftyp", "moov"]
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range, context.color_primaries, context.color_trc) == (1, 1, 1, 1)
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)
        assert "creation_time" not in container.metadata
        assert container.metadata["comment"] == '{"prompt": "a red ball"}'


def test_same_frames_give_the_same_bytes(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, moving(20, 128, 96), 24, facts={"seed": "7"})
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    write_clip(tmp_path / "c.mp4", moving(20, 128, 96), 24, facts={"seed": "8"})
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()


def test_frames_may_lie_in_memory_in_any_way(tmp_path):
    write_clip(tmp_path / "a.mp4", moving()[:, ::-1, ::-1], 24)
    write_clip(tmp_path / "b.mp4", np.ascontiguousarray(moving()[:, ::-1, ::-1]), 24)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


def test_the_smallest_and_a_narrow_clip(tmp_path):
    for width, height in ((2, 2), (2, 64), (130, 2)):
        write_clip(tmp_path / "clip.mp4", moving(1, 130, 64)[:, :height, :width], 8, overwrite=True)
        assert read_clip(tmp_path / "clip.mp4").frames.shape == (1, height, width, 3)


@pytest.mark.parametrize(
    ("frames", "fps", "expected"),
    [
        (
            moving(2, 63, 48),
            24,
            "frames are 63x48, and H.264 in 4:2:0 takes even sizes from 2x2 only; cut them to 62x48",
        ),
        (
            moving(2, 64, 49),
            24,
            "frames are 64x49, and H.264 in 4:2:0 takes even sizes from 2x2 only; cut them to 64x48",
        ),
        (moving()[:0], 24, "frames are none, expected at least 1"),
        (moving().astype(np.float32), 24, "frames are float32 [12, 48, 64, 3], expected uint8 [F, H, W, 3]"),
        (moving()[0], 24, "frames are uint8 [48, 64, 3], expected uint8 [F, H, W, 3]"),
        (moving(), 0, "fps is 0, expected 0.1 to 1000 frames a second"),
        (moving(), float("nan"), "fps is nan, expected 0.1 to 1000 frames a second"),
    ],
)
def test_what_cannot_be_written(tmp_path, frames, fps, expected):
    assert refusal(write_clip, tmp_path / "clip.mp4", frames, fps) == expected
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_replaced_unasked(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"mine")
    with pytest.raises(TargetExistsError):
        write_clip(path, moving(), 24)
    assert path.read_bytes() == b"mine"
    write_clip(path, moving(), 24, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert probe_clip(path).frames == 12


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"mine")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(clips, "write_all", fail)
    with pytest.raises(AdapterWriteError, match="No space left on device"):
        write_clip(path, moving(2), 24, overwrite=True)
    assert [file.name for file in tmp_path.iterdir()] == ["clip.mp4"]
    assert path.read_bytes() == b"mine"
    with pytest.raises(AdapterWriteError, match="there is no folder"):
        write_clip(tmp_path / "gone" / "clip.mp4", moving(2), 24)


@settings(max_examples=25, deadline=None)
@given(facts=st.dictionaries(st.text(max_size=8), st.text(max_size=40), max_size=4))
def test_facts_come_back(tmp_path_factory, facts):
    path = tmp_path_factory.mktemp("facts") / "clip.mp4"
    write_clip(path, moving(1, 16, 16), 24, facts=facts)
    assert read_facts(path) == facts


def test_long_facts_come_back(tmp_path):
    facts = {"prompt": "Zörbit 猫 \N{ROBOT FACE}\n" * 5000, "empty": ""}
    write_clip(tmp_path / "clip.mp4", moving(1), 24, facts=facts)
    assert read_facts(tmp_path / "clip.mp4") == facts


def test_half_a_character_in_facts_is_refused(tmp_path):
    message = refusal(write_clip, tmp_path / "clip.mp4", moving(1), 24, facts={"prompt": "a \ud800"})
    assert "its facts hold half a character" in message


@pytest.mark.parametrize("comment", ["", "a day at the sea", "[1, 2]", '{"prompt": 3}', "[" * 10_000])
def test_comments_of_others_are_no_facts(tmp_path, comment):
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = comment
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(moving(1, 16, 16)[0])))
        container.mux(stream.encode(None))
    assert read_facts(path) == {}


def test_no_torch_is_imported():
    code = "import sys, engram_video.clips, engram_video.dataset, engram_video.sheet; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
