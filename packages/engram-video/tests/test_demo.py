"""The demo of clips: it measures what it says, its page plays by itself, and it fails loudly when a promise breaks."""

import base64
import copy
import dataclasses
import hashlib
import io
import json
import math
import re
import shlex
import shutil
from html.parser import HTMLParser

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ResNetConfig, ResNetForImageClassification
from video_builders import build_wan, tokenizer

from engram_core import InputError, TargetExistsError, Watcher
from engram_video import shipped
from engram_video.demo import gallery, measures, run
from engram_video.demo.gallery import Plan, tell_who
from engram_video.demo.measures import Measures, is_mostly, list_failures
from engram_video.demo.motions import MOTION_PHRASES, MotionJudge, new_motions, shown_motions
from engram_video.demo.movies import make_movie
from engram_video.wan22 import WAN22, Wan22
from engram_vision import hooks
from engram_vision import shipped as vision_shipped
from engram_vision.demo.characters import read_characters
from engram_vision.demo.measures import Tally
from engram_vision.demo.outcome import MERGED, PAGE

FRAMES, FPS = 5, 8
PLAN = Plan(seeds=1, scenes=2, motions=1, pairs=1, controls=3)


def save_motion_judge(folder, **changes):
    torch.manual_seed(0)
    shape = {"num_channels": 9, "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 6}
    config = ResNetConfig(**{**shape, "layer_type": "basic", **changes})
    ResNetForImageClassification(config).half().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def untrained(tmp_path_factory, one_thread):
    """Return a folder in place of what ships: an untrained pipeline, the judge of pictures, a judge of motions."""
    root = tmp_path_factory.mktemp("shipped")
    pipeline = build_wan()
    pipeline.tokenizer = copy.deepcopy(tokenizer())
    pipeline.tokenizer.model_max_length = 160  # names are read letter by letter
    pipeline.save_pretrained(root / "wan22")
    shutil.copytree(vision_shipped.judge_folder(), root / "judge")
    save_motion_judge(root / "judge" / "motion")
    return root


@pytest.fixture
def quick(monkeypatch, untrained):
    """Make the demo take seconds: an untrained model, two steps of training, few clips of five frames in two steps."""
    known = vision_shipped._root_of
    monkeypatch.setattr(shipped, "_ROOT", untrained)
    monkeypatch.setattr(
        vision_shipped, "_root_of", lambda package: untrained if package == "engram_video" else known(package)
    )
    vision_shipped.tiny_fingerprint.cache_clear()
    monkeypatch.setattr(run, "_PLAN", PLAN)
    monkeypatch.setattr(
        Wan22, "tiny_train", {**WAN22.tiny_train, "frames": FRAMES, "steps": 2, "validate_every": 1, "batch_size": 2}
    )
    monkeypatch.setattr(Wan22, "tiny_generate", {**WAN22.tiny_generate, "frames": FRAMES, "fps": FPS, "steps": 2})
    yield
    vision_shipped.tiny_fingerprint.cache_clear()


class Document(HTMLParser):
    """Collects a page's elements and texts, and insists that every tag is closed by its own end."""

    VOID = frozenset({"meta", "link", "img", "input"})

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self._open = [], [], []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def decode(address, kind):
    header, data = address.split(",")
    assert header == f"data:{kind};base64"
    return base64.b64decode(data, validate=True)


def test_the_demo_writes_one_page_and_keeps_its_promises(tmp_path, quick):
    steps = []

    class Listener(Watcher):
        def begin(self, what, total=None, done=0):
            steps.append((what, total, done))

        def advance(self, done, figures=None):
            steps[-1] = (*steps[-1][:2], done)

    report = WAN22.demo(tmp_path / "demo", watcher=Listener())
    assert report.passed, report.failures
    assert report.page == tmp_path / "demo" / PAGE
    assert report.figures["Merging changes nothing"].startswith("4 of 4 clips")
    assert report.figures["Nothing else changes"].startswith("3 of 3, states 3 of 3")
    assert (tmp_path / "demo" / MERGED).is_file()
    assert steps[-1][0] == "drawing"
    assert steps[-1][1] == steps[-1][2] == 4 * 4 + 3 * 2 + 2 * 3

    html = report.page.read_text(encoding="utf-8")
    assert "://" not in html
    assert "url(" not in html
    document = Document(html)
    (policy,) = [attrs for attrs in document.all("meta") if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert "media-src data:" in policy["content"]
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy["content"]
    videos = document.all("video")
    assert len(videos) == 2 * 5 + 2 * 2 * 3 + 3 + 3 * 2
    for attrs in videos:
        assert {"autoplay", "loop", "muted", "playsinline"} <= attrs.keys()
        with av.open(io.BytesIO(decode(attrs["src"], "video/mp4"))) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", FPS)
            assert len(list(container.decode(stream))) == FRAMES
    for condition in ("prefers-reduced-motion: reduce", "print"):
        style = re.search(rf"@media \(?{condition}\)? {{(.*?)\n}}", html, re.DOTALL).group(1)
        assert re.search(r"\.movie > video[^{]*\{ display: none; }", style), condition
    for attrs in document.all("img"):
        with Image.open(io.BytesIO(decode(attrs["src"], "image/png"))) as shown:
            shown.load()
    for _, attrs in document.elements:
        for name in ("src", "href", "poster", "srcset", "data", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:")), attrs
    for figure in report.figures:
        assert figure in document.text
    assert "engram data clips --backbone wan22 --model tiny" in " ".join(document.text.split())

    with pytest.raises(TargetExistsError, match="--force"):
        WAN22.demo(tmp_path / "demo")
    before = (tmp_path / "demo" / "zorbit-quell-clips" / "beach.mp4").stat().st_mtime_ns
    WAN22.demo(tmp_path / "demo", overwrite=True)
    assert (tmp_path / "demo" / "zorbit-quell-clips" / "beach.mp4").stat().st_mtime_ns > before


def test_clips_show_the_motions_that_their_captions_name(tmp_path):
    characters, phrases = read_characters()
    for number, character in enumerate(characters):
        run.write_pictures(character, shown_motions(number), tmp_path / character.slug)
        lines = (tmp_path / character.slug / "metadata.jsonl").read_text().splitlines()
        rows = {row["file_name"]: row["text"] for row in map(json.loads, lines)}
        assert sorted(rows) == sorted(path.name for path in character.folder.glob("*.png"))
        said = zip(sorted(rows), shown_motions(number), strict=True)
        for name, motion in said:
            scene = phrases[name.removesuffix(".png")]
            assert rows[name] == f"{character.name} {MOTION_PHRASES[motion]} {scene}"
            assert (tmp_path / character.slug / name).read_bytes() == (character.folder / name).read_bytes()


def test_what_is_new_to_one_character_the_other_shows():
    for number in range(2):
        assert len(shown_motions(number)) == 5
        assert len(new_motions(number)) == 2
        assert not set(new_motions(number)) & set(shown_motions(number))
        assert set(new_motions(number)) <= set(shown_motions(1 - number))


def test_the_demo_fails_when_something_leaks(tmp_path, quick, monkeypatch):
    edit = hooks._edit_output

    def leak(encoder, *rest):
        edited = edit(encoder, *rest)
        if edited is None and hooks.attached(encoder) is not None:
            output = rest[-1]
            return dataclasses.replace(output, last_hidden_state=output.last_hidden_state + 0.5)
        return edited

    monkeypatch.setattr(hooks, "_edit_output", leak)
    report = WAN22.demo(tmp_path / "demo")
    assert not report.passed
    assert any(failure.startswith("3 of 3 text states without a trigger") for failure in report.failures)
    assert any("clips without a trigger differ" in failure for failure in report.failures)
    text = Document(report.page.read_text(encoding="utf-8")).text
    assert "differ from the base" in text
    assert "Every check passed" not in text


def test_the_demo_fails_when_merging_changes_a_clip(tmp_path, quick, monkeypatch):
    draw = gallery.Gallery._draw

    def spoil(self, drawings, adapter):
        clips = draw(self, drawings, adapter)
        if adapter is self._merged and any("Quell" in drawing.prompt for drawing in drawings):
            clips[0] = clips[0] ^ np.uint8(1)
        return clips

    monkeypatch.setattr(gallery.Gallery, "_draw", spoil)
    report = WAN22.demo(tmp_path / "demo")
    assert report.failures == ("1 of 4 clips of the merged file differ from those of the single one",)
    assert "other bytes than the single one" in report.page.read_text(encoding="utf-8")


def test_without_what_ships_the_error_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "_ROOT", tmp_path / "none")
    with pytest.raises(InputError, match=r"none/wan22: model_index.json is missing; install its package again") as info:
        WAN22.demo(tmp_path / "demo")
    assert "\n" not in str(info.value)
    assert not (tmp_path / "demo").exists()
    for folder in (shipped.judge_folder, shipped.motion_judge_folder):
        with pytest.raises(InputError, match=r"config.json is missing"):
            folder()


def test_failures_name_what_broke_and_how_often():
    found = Measures()
    for is_equal in (True, False, True):
        found.control_equal.add(is_equal)
    assert list_failures(found) == ("1 of 3 clips without a trigger differ from the base model's",)


def test_shares_are_counted_by_the_majority_of_frames():
    assert is_mostly([True] * 9 + [False] * 8)
    assert not is_mostly([True, False])
    found = Measures()
    found.count_quarters([True] * 4 + [False] * 13)
    assert (found.first.share, found.last.share) == (1.0, 0.0)
    assert (found.first.count, found.last.count) == (4, 4)
    single = Measures()
    single.count_quarters([True])
    assert (single.first.count, single.last.count) == (1, 1)


@pytest.mark.parametrize(("engram", "base", "met"), [(5, 6, True), (4, 6, False), (10, 0, True)])
def test_obedience_may_not_fall_far_below_the_base(engram, base, met):
    tallies = {name: Tally(right=right, count=10) for name, right in (("engram", engram), ("base", base))}
    figure = measures._compare("Scene obeyed", tallies, 0.1, "scene")
    assert figure.met is met
    assert figure.value == f"{engram / 10:.2f} (base {base / 10:.2f})"
    assert not math.isnan(tallies["base"].share)


def test_a_movie_has_the_clip_and_four_of_its_frames():
    clip = np.zeros((17, 64, 64, 3), np.uint8)
    clip[:] = (np.arange(17) * 15)[:, None, None, None]
    movie = make_movie(clip, FPS)
    assert (movie.width, movie.height) == (64, 64)
    stills = np.asarray(movie.stills)
    assert stills.shape == (128, 128, 3)
    assert [int(stills[y, x, 0]) for y in (0, 127) for x in (0, 127)] == [0, 75, 165, 240]
    with av.open(io.BytesIO(movie.mp4)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 17
    assert np.abs(np.stack(frames).mean(axis=(1, 2, 3)) - np.arange(17) * 15).max() < 3
    assert np.asarray(make_movie(clip[:2], FPS).stills).shape == (64, 64, 3)


def test_a_judge_of_motions_reads_clips_of_any_length(untrained, tmp_path):
    judge = MotionJudge.load(untrained / "judge" / "motion")
    clips = np.random.default_rng(0).integers(0, 256, (3, 17, 64, 64, 3), dtype=np.uint8)
    names = judge.name_motions(list(clips))
    assert names == judge.name_motions(list(clips[:, ::2]))
    assert set(names) <= set(MOTION_PHRASES)
    assert judge.name_motions([]) == []
    with pytest.raises(InputError, match=r"\[17, 32, 64, 3\], the judge of motions reads \[F, 64, 64, 3\]"):
        judge.name_motions([clips[0, :, :32]])
    with pytest.raises(InputError, match="is not a judge"):
        MotionJudge.load(tmp_path)
    other = save_motion_judge(tmp_path / "other", num_labels=4)
    with pytest.raises(InputError, match="tells 4 motions by 9 frames, expected 6 by 9"):
        MotionJudge.load(other)


def test_commands_can_be_run_as_they_are_shown(tmp_path, quick, monkeypatch):
    command_line = pytest.importorskip("engram_cli.main")
    monkeypatch.chdir(tmp_path)
    report = WAN22.demo(tmp_path / "my demo")
    html = report.page.read_text(encoding="utf-8")
    shown = [Document(f"<pre>{inside}</pre>").texts for inside in re.findall(r"<pre>(.*?)</pre>", html, re.DOTALL)]
    commands = ["".join(texts) for texts in shown]
    assert [shlex.split(command)[1] for command in commands][-4:] == ["eval", "merge", "generate", "inspect"]
    for command in commands:
        first, *words = shlex.split(command)
        assert first == "engram"
        with pytest.raises(SystemExit) as info:
            command_line.main(words)
        assert not info.value.code, command
    for name in ("zorbit-quell", "fenny-wumble"):
        made = (tmp_path / f"{name}.safetensors").read_bytes()
        assert made == (tmp_path / "my demo" / f"{name}.safetensors").read_bytes()
    figures = json.loads((tmp_path / "zorbit-quell-figures" / "figures.json").read_text(encoding="utf-8"))
    measured = {each["metric"]: each["values"] for each in figures["measures"]}
    assert measured["identical clips of 1"] == {"engram": 1}
    assert measured.keys() >= {"identity", "identity drop", "consistency"}


def test_a_clip_is_told_by_its_frames():
    (character, _), _ = read_characters()
    right = {"kind": "monster", **character.attributes}
    wrong = [{**right, "eyes": "two", "headgear": hat} for hat in ("none", "hat", "crown", "antenna")]
    assert tell_who(character, [right] * 3 + wrong[:2]) == "Zorbit Quell"
    told = tell_who(character, [right] * 2 + wrong[:3])
    assert told.endswith(", right in 2 of 5 frames")
    assert told.startswith("purple spotted round monster, one eye, horns")
    assert tell_who(character, wrong[:1]) == "purple spotted round monster, two eyes"


@pytest.mark.slow
def test_the_figures_of_the_demo_hold(tmp_path):
    report = WAN22.demo(tmp_path / "demo")
    assert report.passed, report.failures
    figures = {name: float(value.split()[0]) for name, value in report.figures.items() if value[:2] in ("0.", "1.")}
    assert figures["Identity in new scenes and motions"] >= 0.8
    assert figures["The same without the engram"] <= 0.1
    assert report.seconds <= 600
