"""The demo: it measures what it says, and fails loudly when a promise breaks."""

import dataclasses

import pytest
from PIL import Image
from safetensors import safe_open

from engram_core import TargetExistsError
from engram_vision import hooks
from engram_vision.demo import gallery
from engram_vision.demo.characters import read_characters
from engram_vision.demo.judge import Judge
from engram_vision.demo.measures import Measures, list_failures
from engram_vision.demo.run import MERGED, PAGE, run_demo
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35
from engram_vision.shipped import judge_folder, tiny_fingerprint, tiny_folder

BOTH = pytest.mark.parametrize("backbone", [SD15, SD35], ids=lambda backbone: backbone.name)


@pytest.fixture
def quick(monkeypatch):
    """Make the demo take seconds: two steps of training, pictures of two denoising steps, one seed."""
    monkeypatch.setattr(gallery, "_STEPS", 2)
    monkeypatch.setattr(gallery, "_SEEDS", 1)
    for backbone in (SD15, SD35):
        short = {**backbone.tiny_train, "steps": 2, "validate_every": 1, "batch_size": 4}
        monkeypatch.setattr(type(backbone), "tiny_train", short)


def test_what_ships_is_small_and_half_precision():
    root = tiny_folder("sd15").parent
    files = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    second = sum(size for path, size in files.items() if path.is_relative_to(root / "sd35"))
    assert sum(files.values()) - second <= 20_000_000
    assert second <= 20_000_000
    weights = list(root.rglob("*.safetensors"))
    assert len(weights) == 5 + 5
    for path in weights:
        with safe_open(path, "pt") as file:
            kinds = {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 - not a mapping
        assert kinds <= {"F16", "I64"}, path
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]
    assert len({tiny_fingerprint("sd15"), tiny_fingerprint("sd35")}) == 2


def test_the_judge_knows_the_reference_pictures():
    judge = Judge.load(judge_folder())
    characters, phrases = read_characters()
    assert len(characters) == 2
    for character in characters:
        paths = sorted(character.folder.glob("*.png"))
        images = [Image.open(path) for path in paths]
        assert all(character.is_seen(named) for named in judge.name_subjects(images))
        assert judge.name_scenes(images) == [path.stem for path in paths]
        assert sorted(character.shown) == [path.stem for path in paths]
        assert set(character.shown) < set(phrases)
    one, other = characters
    images = [Image.open(path) for path in other.folder.glob("*.png")]
    assert not any(one.is_seen(named) for named in judge.name_subjects(images))


def test_one_wrong_attribute_is_not_the_character():
    (character, _), _ = read_characters()
    right = {"kind": "monster", **character.attributes}
    assert character.is_seen(right)
    for name in character.attributes:
        assert not character.is_seen({**right, name: "other"})
    assert not character.is_seen({"kind": "fox"})


@BOTH
def test_the_demo_writes_one_page_and_keeps_its_promises(tmp_path, quick, backbone):
    report = run_demo(backbone, tmp_path / "demo")
    assert report.passed, report.failures
    assert report.failures == ()
    page = report.page.read_text(encoding="utf-8")
    assert report.page == tmp_path / "demo" / PAGE
    assert page.count("data:image/png") > 50
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert report.figures["Merging changes nothing"].startswith("20 of 20")
    assert report.figures["Nothing else changes"].startswith("20 of 20, states 10 of 10")
    assert (tmp_path / "demo" / MERGED).exists()
    with pytest.raises(TargetExistsError, match="--force"):
        run_demo(SD15, tmp_path / "demo")


def test_the_demo_fails_when_something_leaks(tmp_path, quick, monkeypatch):
    edit = hooks._edit_output

    def leak(encoder, *rest):
        edited = edit(encoder, *rest)
        if edited is None and hooks.attached(encoder) is not None:
            output = rest[-1]
            return dataclasses.replace(output, last_hidden_state=output.last_hidden_state + 0.05)
        return edited

    monkeypatch.setattr(hooks, "_edit_output", leak)
    report = run_demo(SD15, tmp_path / "demo")
    assert not report.passed
    assert any(failure.startswith("10 of 10 text states") for failure in report.failures)
    assert any("pictures without a trigger differ" in failure for failure in report.failures)
    assert "differ from the base" in report.page.read_text(encoding="utf-8")


def test_failures_name_what_broke_and_how_often():
    measures = Measures()
    for is_equal in (True, False, True):
        measures.merged_equal.add(is_equal)
    assert list_failures(measures) == ("1 of 3 pictures of the merged file differ from those of the single one",)


@pytest.mark.slow
@BOTH
def test_the_figures_of_the_demo_hold(tmp_path, backbone):
    report = backbone.demo(tmp_path / "demo")
    assert report.passed, report.failures
    figures = {name: float(value.split()[0]) for name, value in report.figures.items() if value[:2] in ("0.", "1.")}
    assert figures["Identity in new scenes"] >= 0.8
    assert figures["The same without the engram"] <= 0.1
    assert figures["Scene obeyed"] >= 0.9
