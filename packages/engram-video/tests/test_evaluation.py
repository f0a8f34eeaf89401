"""`engram eval` for clips: what figures mean, what is refused, and what is written."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_builders import fading, moving, picture, save_clip_model, save_references, still
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from video_builders import FRAMES, SIZE, TRIGGER, make_adapter

from engram_core import EvaluatingBackbone, InputError, TargetExistsError, Watcher
from engram_core.settings import Layer, resolve_settings
from engram_video import shipped
from engram_video.clips import read_clip, write_clip
from engram_video.evaluation import clips as kind
from engram_video.evaluation.warping import has_flow
from engram_video.settings import Wan22EvaluateSettings
from engram_video.wan22 import WAN22
from engram_vision.demo.characters import read_characters
from engram_vision.demo.judge import Judge
from engram_vision.evaluation import run
from engram_vision.evaluation.measures import measure_consistency, measure_identity
from engram_vision.features import JudgeModel, load_feature_model, read_references
from engram_vision.generation import save_png
from engram_vision.models import load_pipeline
from engram_vision.quiet import quiet_libraries
from engram_vision.shipped import characters_folder, judge_folder

PROMPT, CONTROL = f"{TRIGGER} in the snow", "a red ball"


class Ear(Watcher):
    def __init__(self):
        self.notes = []

    def note(self, message):
        self.notes.append(message)


@pytest.fixture(scope="session")
def eye(tmp_path_factory, one_thread):
    return save_clip_model(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def settings_for(tmp_path, model, eye):
    make_adapter().save(tmp_path / "one.safetensors")

    def make(**changes):
        given = {
            "adapters": (str(tmp_path / "one.safetensors"),),
            "prompts": (PROMPT,),
            "model": str(model),
            "image_model": eye,
            "steps": 1,
            "width": SIZE,
            "height": SIZE,
            "frames": FRAMES,
            "fps": 8,
            "batch_size": 4,
            "precision": "fp32",
            "device": "cpu",
            "warping": False,
        }
        return resolve_settings(Wan22EvaluateSettings, [Layer(source="test", values=given | changes)])

    return make


def by_metric(report):
    return {measure.metric: measure for measure in report.measures}


# Laws of the figures


def test_a_clip_of_the_reference_has_identity_one_and_a_fading_one_drops(eye, tmp_path):
    model = load_feature_model(eye)
    references = model.embed(read_references(save_references(tmp_path / "references", 2)))

    def measure(clip):
        figures, curve = measure_identity("eye", model.embed([Image.fromarray(frame) for frame in clip]), references)
        return {figure.metric: figure.value for figure in figures}, curve

    same, curve = measure(still())
    assert same == pytest.approx({"identity": 1, "identity drop": 0}, abs=1e-6)
    assert curve == pytest.approx(np.ones(9))
    lost, curve = measure(fading())
    assert lost["identity"] < 1
    assert lost["identity drop"] == pytest.approx(curve[:2].mean() - curve[-2:].mean())
    assert lost["identity drop"] > 0.01
    back, _ = measure(fading()[::-1])
    assert back["identity drop"] == pytest.approx(-lost["identity drop"], abs=1e-6)
    assert "identity drop" not in measure(still(1))[0]


def test_a_clip_that_stands_still_has_consistency_one(eye):
    model = load_feature_model(eye)
    values = []
    for clip in (still(), fading(), moving(size=SIZE)):
        (figure,) = measure_consistency("eye", model.embed([Image.fromarray(frame) for frame in clip]))
        values.append(figure.value)
    assert values[0] == pytest.approx(1)
    assert max(values[1:]) < 1 - 1e-6
    assert measure_consistency("eye", model.embed([Image.fromarray(picture())])) == []


# Drawing and measuring


def test_base_and_engram_are_measured_on_the_same_prompts_and_seeds(settings_for, tmp_path):
    settings = settings_for(
        control_prompts=(CONTROL,),
        seeds=(0, 1),
        text_model=settings_for().image_model,
        references=save_references(tmp_path / "references"),
        output=tmp_path / "figures",
        warping=has_flow(),
    )
    report = WAN22.evaluate(settings)
    found = by_metric(report)
    wanted = {"identity", "identity drop", "consistency", "adherence", "identical clips of 2"}
    assert found.keys() >= wanted
    assert ({"warping error", "motion"} <= found.keys()) == has_flow()
    assert found["identity"].values.keys() == found["identity"].errors.keys() == {"base", "engram"}
    assert found["identity"].difference != 0
    assert found["identical clips of 2"].values == {"engram": 2}
    assert report.details["failures"] == []
    assert [(clip["variant"], clip["prompt"], clip["seed"]) for clip in report.details["shown"]] == [
        (variant, PROMPT, seed) for variant in ("base", "engram") for seed in (0, 1)
    ]
    (used,) = report.adapters
    assert used.strength == 1
    folder = tmp_path / "figures"
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report.to_json()))
    assert sorted(path.name for path in folder.iterdir()) == [
        *(
            f"{number:03d}-{name}-{seed}-{variant}.mp4"
            for number, (name, seed) in enumerate(
                [("zorbit-quell-in-the-snow", 0), ("zorbit-quell-in-the-snow", 1), ("a-red-ball", 0), ("a-red-ball", 1)]
            )
            for variant in ("base", "engram")
        ),
        "figures.json",
        "identity.png",
        "sheet.png",
    ]
    with pytest.raises(TargetExistsError, match=r"figures\.json: exists; pass --force"):
        WAN22.evaluate(settings)
    (folder / "figures.json").unlink()
    (folder / "identity.png").unlink()
    with pytest.raises(TargetExistsError, match=r"mp4 and 8 more: exists"):
        WAN22.evaluate(settings)

    # The files say what they are, so the same folder can be measured without drawing; encoding changes little.
    again = by_metric(
        WAN22.evaluate(replace(settings, files=(folder,), prompts=(), control_prompts=(), adapters=(), output=None))
    )
    assert again["identity"].values == pytest.approx(found["identity"].values, abs=0.1)
    assert again["adherence"].values.keys() == {"base", "engram"}


def test_nothing_is_written_unasked(settings_for, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    ear = Ear()
    report = WAN22.evaluate(settings_for(), watcher=ear)
    assert sorted(tmp_path.rglob("*")) == before
    assert report.output is None
    assert by_metric(report).keys() == {"consistency"}
    assert "identity is not measured: there are no reference pictures (--references)" in ear.notes


def test_a_control_clip_that_changes_is_a_failure(settings_for, monkeypatch):
    drawn = run._RecordingCanvas.draw

    def leak(self, *given):
        clips = drawn(self, *given)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:  # with the engram
            clips[-1][0, 0, 0, 0] ^= 1
        return clips

    monkeypatch.setattr(run._RecordingCanvas, "draw", leak)
    report = WAN22.evaluate(settings_for(control_prompts=(CONTROL, "a photo of the snow"), batch_size=8))
    assert by_metric(report)["identical clips of 2"].values == {"engram": 1}
    assert report.details["failures"] == [
        "1 of 2 clips of prompts without a trigger differ from the base model's: 'a photo of the snow' (seed 0)"
    ]


def test_strength_zero_changes_nothing(settings_for, tmp_path):
    settings = settings_for(strengths=("0",), references=save_references(tmp_path / "references"))
    report = WAN22.evaluate(settings)
    assert {measure.difference for measure in report.measures} == {0}
    assert report.adapters[0].strength == 0


def test_one_side_alone_can_be_measured(settings_for):
    base = WAN22.evaluate(settings_for(adapters=(), prompts=(CONTROL,)))
    engram = WAN22.evaluate(settings_for(base=False))
    assert base.measures[0].values.keys() == {"base"}
    assert engram.measures[0].values.keys() == {"engram"}


def test_a_description_is_read_in_place_of_the_trigger(settings_for, eye):
    options = {"image_model": None, "text_model": eye}
    name, words = (
        by_metric(WAN22.evaluate(settings_for(**options, **more)))["adherence"].values["base"]
        for more in ({}, {"described_as": "a red ball"})
    )
    assert name != words


# Clips on disk


def test_clips_on_disk_are_measured_with_the_prompts_beside_them(settings_for, eye, tmp_path):
    folder = tmp_path / "clips"
    folder.mkdir()
    write_clip(folder / "still.mp4", still(), 8)
    write_clip(folder / "fading.mp4", fading(), 8, facts={"prompt": PROMPT, "engrams": "[]", "seed": "3"})
    save_png(Image.fromarray(picture()), folder / "sheet.png", {}, overwrite=False)
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "still.mp4", "text": CONTROL}), encoding="utf-8")
    settings = settings_for(
        adapters=(), prompts=(), files=(folder,), references=save_references(tmp_path / "references"), text_model=eye
    )
    report = WAN22.evaluate(settings)
    assert [(clip["variant"], clip["prompt"], clip["seed"]) for clip in report.details["shown"]] == [
        ("base", PROMPT, 3),
        ("files", CONTROL, None),
    ]
    found = by_metric(report)
    assert found["identity"].values["files"] == pytest.approx(1, abs=0.02)
    assert found["identity drop"].values["base"] > found["identity drop"].values["files"]
    assert found["adherence"].values.keys() == {"base", "files"}
    assert read_clip(folder / "still.mp4").frames.shape[0] == 9


def test_pictures_are_clips_of_one_frame(settings_for, eye, tmp_path):
    folder = save_references(tmp_path / "references", 2)
    facts = {"prompt": PROMPT, "engrams": '[{"file": "one"}]', "seed": "1"}
    save_png(Image.fromarray(picture()), tmp_path / "own.png", facts, overwrite=False)
    given = {"adapters": (), "prompts": (), "references": folder, "text_model": eye}
    report = WAN22.evaluate(settings_for(**given, files=(tmp_path / "own.png", folder)))
    found = by_metric(report)
    assert found.keys() == {"identity", "adherence"}
    assert found["identity"].values == pytest.approx({"engram": 1, "files": 1})
    with pytest.raises(InputError, match="nothing can be measured: there is no prompt"):
        WAN22.evaluate(settings_for(adapters=(), prompts=(), files=(folder,)))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("nowhere", None, "nowhere: does not exist; give files, or a folder"),
        ("folder", {}, "folder: holds neither clips"),
        ("folder", {"a.mp4": b"junk"}, r"a\.mp4: begins with b'junk'"),
        ("folder", {"a.png": b"junk"}, r"a\.png: its 4 bytes are no PNG"),
        ("folder", {"a.png": None, "metadata.jsonl": b"{"}, r"metadata\.jsonl: cannot be read"),
    ],
)
def test_files_that_cannot_be_measured_are_refused(settings_for, tmp_path, name, content, told):
    if content is not None:
        (tmp_path / name).mkdir()
        for file, data in content.items():
            if data is None:
                Image.fromarray(picture()).save(tmp_path / name / file)
            else:
                (tmp_path / name / file).write_bytes(data)
    with pytest.raises(InputError, match=told):
        WAN22.evaluate(settings_for(adapters=(), prompts=(), files=(tmp_path / name,)))


# The judge of the small world


def test_the_shipped_judge_counts_frames_that_are_right(settings_for, tmp_path, monkeypatch):
    monkeypatch.setattr(kind, "judge_folder", judge_folder)  # of pictures, which always ships
    zorbit, fenny = (characters_folder() / name for name in ("zorbit-quell", "fenny-wumble"))
    shown = [np.asarray(each) for each in read_references(zorbit)][:1] * 3
    shown += [np.asarray(each) for each in read_references(fenny)][:1]
    write_clip(tmp_path / "own.mp4", np.stack(shown), 8, facts={"prompt": "Zorbit Quell on the beach"})
    write_clip(tmp_path / "other.mp4", np.stack(shown), 8, facts={"prompt": "Zorbit Quell somewhere"})
    ear = Ear()
    settings = settings_for(
        adapters=(),
        prompts=(),
        files=(tmp_path / "own.mp4", tmp_path / "other.mp4"),
        image_model="tiny",
        text_model="tiny",
        references=zorbit,
    )
    report = WAN22.evaluate(settings, watcher=ear)
    found = by_metric(report)
    assert found["subject right"].values == {"files": 0.75}
    assert found["scene right"].values == {"files": 0.75}
    assert found["identity drop"].values["files"] > 0.3
    assert "'Zorbit Quell somewhere' names no scene of the small world, or several; it is not measured" in ear.notes
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for folder in (zorbit, fenny):
        read_references(folder)[0].save(mixed / f"{folder.name}.png")
    report = WAN22.evaluate(replace(settings, references=mixed), watcher=ear)
    assert "subject right" not in by_metric(report)
    assert f"{mixed}: the pictures do not show one subject, so none can be right" in ear.notes


def test_a_judge_that_is_missing_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_ROOT", tmp_path)
    with pytest.raises(
        InputError, match=r"judge: config\.json is missing; install its package again, or run its recipe"
    ):
        shipped.judge_folder()


def test_the_judge_of_tinys_clips_knows_the_demos_characters():
    if not (Path(shipped.__file__).parent / "tiny" / "judge").is_dir():
        pytest.skip("the tiny checkpoint of wan22 does not ship yet")
    judge = JudgeModel(Judge.load(shipped.judge_folder()))
    for character in read_characters()[0]:
        assert judge.find_subject(read_references(character.folder)) == {"kind": "monster", **character.attributes}


def test_a_lora_is_drawn_with_and_measured_beside(settings_for, tmp_path, model):
    pipeline = load_pipeline(WAN22.family, str(model))
    torch.manual_seed(0)
    with quiet_libraries():
        targets = ["attn2.to_k", "attn2.to_v"]
        pipeline.transformer.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        layers = get_peft_model_state_dict(pipeline.transformer)
        pipeline.save_lora_weights(tmp_path / "lora", transformer_lora_layers=layers)
    found = by_metric(WAN22.evaluate(settings_for(lora=str(tmp_path / "lora"), control_prompts=(CONTROL,))))
    assert found["consistency"].values.keys() == {"base", "engram", "lora"}
    assert found["identical clips of 1"].values == {"engram": 1, "lora": 0}
    assert found["difference from base"].values["engram"] == 0 < found["difference from base"].values["lora"]


# What is refused


def test_it_can_evaluate_and_tiny_has_settings_of_its_own():
    assert isinstance(WAN22, EvaluatingBackbone)
    assert WAN22.default_evaluate_settings("other") == {}
    values = WAN22.default_evaluate_settings("tiny")
    settings = resolve_settings(Wan22EvaluateSettings, [Layer(source="tiny", values={**values, "prompts": ["a"]})])
    assert (settings.image_model, settings.frames) == ("tiny", 9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": (), "control_prompts": ()}, "there is nothing to measure on; give --prompt"),
        ({"files": ("a.mp4",)}, "files are measured as they are; leave out prompts"),
        ({"adapters": (), "control_prompts": (CONTROL,)}, "control_prompts compare base and engram; give --adapter"),
        ({"base": False, "control_prompts": (CONTROL,)}, "control_prompts compare base and engram"),
        ({"base": False, "adapters": ()}, "nothing to draw without the base model"),
        ({"control_prompts": (PROMPT,)}, f"'{PROMPT}' is a prompt and a control prompt"),
        ({"image_model": None, "references": "."}, "references need a model to compare with; give --image-model"),
        ({"image_model": None}, "there is nothing to measure; give --image-model"),
        ({"described_as": "a ball"}, "described_as stands for triggers"),
        ({"seeds": (-1,)}, r"seeds are \[-1\], expected at least one, none below 0"),
        ({"frames": 0}, "frames is 0, expected at least 1"),
        ({"guidance": -1.0}, r"guidance is -1\.0, expected a finite number"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(settings_for, changes, told):
    with pytest.raises(InputError, match=told):
        settings_for(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": (CONTROL,)}, f"prompt '{CONTROL}' holds no trigger, .*; put '{TRIGGER}' into it"),
        (
            {"control_prompts": (f"a photo of {TRIGGER}",)},
            f"holds the trigger '{TRIGGER}', which changes what is drawn",
        ),
        ({"references": "nowhere"}, "nowhere: is no folder; give one with reference pictures"),
        ({"image_model": "here"}, "is a umt5 model, which reads no pictures"),
        ({"text_model": "here"}, "is a umt5 model, which reads no pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(settings_for, model, changes, told, monkeypatch):
    monkeypatch.setattr(run.generation, "generate", None)
    changes = {name: str(model / "text_encoder") if value == "here" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=told):
        WAN22.evaluate(settings_for(**changes))


def test_the_warping_error_is_refused_or_left_out_without_its_library(settings_for, monkeypatch):
    monkeypatch.setattr("engram_video.evaluation.clips.has_flow", lambda: False)
    monkeypatch.setattr("engram_video.evaluation.warping.has_flow", lambda: False)
    with pytest.raises(InputError, match="the warping error needs OpenCV"):
        WAN22.evaluate(settings_for(warping=True))
    ear = Ear()
    report = WAN22.evaluate(settings_for(warping=None), watcher=ear)
    assert by_metric(report).keys() == {"consistency"}
    assert any("the warping error is left out: OpenCV is not installed" in note for note in ear.notes)
