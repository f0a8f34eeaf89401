"""`engram eval` for pictures: what figures mean, what is refused, and what is written."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from vision_builders import LENGTH, TRIGGER, Log, make_adapter, tokenizer

from engram_core import EvaluatingBackbone, InputError, TargetExistsError
from engram_core.settings import Layer, resolve_settings
from engram_vision.evaluation import run
from engram_vision.evaluation.measures import Figure, compare_bytes, list_spread, sum_up
from engram_vision.evaluation.plot import draw_plot
from engram_vision.evaluation.settings import SD15EvaluateSettings
from engram_vision.features import read_references
from engram_vision.generation import save_png
from engram_vision.models import load_pipeline
from engram_vision.quiet import quiet_libraries
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35
from engram_vision.sdxl import SDXL
from engram_vision.shipped import characters_folder

PROMPT, CONTROL = f"{TRIGGER} in the snow", "a red ball"
SIDE = 32
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def eye(tmp_path_factory):
    """A CLIP with random weights; returns its folder."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id, "pad_token_id": 0}
    words = {**SMALL, **ids, "vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH}
    look = {**SMALL, "image_size": SIDE, "patch_size": 8}
    with quiet_libraries():
        CLIPModel(CLIPConfig(text_config=words, vision_config=look, projection_dim=12)).save_pretrained(folder)
        crop = {"height": SIDE, "width": SIDE}
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=crop).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def references(tmp_path):
    folder = tmp_path / "references"
    folder.mkdir()
    for number in range(2):
        reference().save(folder / f"{number}.png")
    return folder


def reference():
    pixels = np.full((SIDE, SIDE, 3), (40, 90, 160), np.uint8)
    pixels[8:16, 8:16] = (220, 60, 20)
    return Image.fromarray(pixels)


@pytest.fixture
def settings_for(tmp_path, model, base, eye):
    make_adapter(base).save(tmp_path / "one.safetensors")

    def make(**changes):
        given = {
            "adapters": (str(tmp_path / "one.safetensors"),),
            "prompts": (PROMPT,),
            "model": str(model),
            "image_model": eye,
            "steps": 1,
            "force_base": True,
            "device": "cpu",
        }
        return resolve_settings(SD15EvaluateSettings, [Layer(source="test", values=given | changes)])

    return make


def by_metric(report):
    return {measure.metric: measure for measure in report.measures}


# Laws of the figures


def test_one_changed_byte_is_found():
    one = np.zeros((1, 4, 4, 3), np.uint8)
    other = one.copy()
    other[-1, -1, -1, -1] ^= 1
    assert compare_bytes([("same", one, one.copy()), ("changed", one, other)]) == (1, ["changed"])
    assert compare_bytes([("smaller", one, one[:, 1:])]) == (0, ["smaller"])


def test_means_and_spread():
    def figures(*values):
        return [[Figure(subject="eye", metric="identity", value=value, higher_is_better=True)] for value in values]

    given = {"base": figures(0.5), "engram": figures(0.6, 0.8)}
    (measure,) = sum_up(given)
    assert measure.values == pytest.approx({"base": 0.5, "engram": 0.7})
    assert measure.errors == pytest.approx({"engram": 0.1})
    assert list_spread(given)["identity"] == pytest.approx({"engram": 0.02**0.5})


@pytest.mark.parametrize("curve", [[0.5], [0.5, 0.5], [-0.2, 1.0, 0.3], [0.99, 0.9901]])
def test_curves_of_any_kind_are_drawn(curve):
    blank = np.asarray(draw_plot("identity", {"base": [np.array([0.1, 0.1], np.float32)]}))
    drawn = np.asarray(draw_plot("identity", {"base": [np.array(curve, np.float32)] * 2, "engram": [np.ones(7)]}))
    assert drawn.shape == (320, 640, 3)
    assert (drawn != blank).any()


# Drawing and measuring


def test_base_and_engram_are_measured_on_the_same_prompts_and_seeds(settings_for, tmp_path, references):
    settings = settings_for(
        control_prompts=(CONTROL,),
        seeds=(0, 1),
        text_model=settings_for().image_model,
        references=references,
        output=tmp_path / "figures",
    )
    report = SD15.evaluate(settings)
    found = by_metric(report)
    moved = {"difference from base", "distance from base"}
    assert found.keys() == {"identity", "adherence", "identical pictures of 2"} | moved
    assert {tuple(found[metric].values.items()) for metric in moved} == {(("engram", 0.0),)}
    assert found["identity"].values.keys() == found["identity"].errors.keys() == {"base", "engram"}
    assert found["identity"].difference != 0
    assert found["identical pictures of 2"].values == {"engram": 2}
    assert report.details["failures"] == []
    assert [(one["variant"], one["prompt"], one["seed"]) for one in report.details["shown"]] == [
        (variant, PROMPT, seed) for variant in ("base", "engram") for seed in (0, 1)
    ]
    folder = tmp_path / "figures"
    assert json.loads((folder / "figures.json").read_text(encoding="utf-8")) == json.loads(json.dumps(report.to_json()))
    names = sorted(path.name for path in folder.iterdir())
    assert names[8:] == ["figures.json", "grid.png"]
    with pytest.raises(TargetExistsError, match=r"figures\.json: exists; pass --force"):
        SD15.evaluate(settings)

    # The files say what they are, so the same folder can be measured without drawing, to the same figures.
    again = by_metric(
        SD15.evaluate(replace(settings, files=(folder,), prompts=(), control_prompts=(), adapters=(), output=None))
    )
    assert again["identity"].values.keys() == {"base", "engram"}
    assert again["adherence"].values.keys() == {"base", "engram"}


def test_a_picture_of_the_reference_has_identity_one(settings_for, tmp_path, references):
    facts = {"prompt": PROMPT, "engrams": '[{"file": "one"}]', "seed": "1"}
    save_png(reference(), tmp_path / "own.png", facts, overwrite=False)
    given = {"adapters": (), "prompts": (), "references": references}
    report = SD15.evaluate(settings_for(**given, files=(tmp_path / "own.png", references)))
    assert by_metric(report)["identity"].values == pytest.approx({"engram": 1, "files": 1})
    with pytest.raises(InputError, match="nothing can be measured: there is no prompt"):
        SD15.evaluate(settings_for(adapters=(), prompts=(), files=(references,)))


def test_nothing_is_written_unasked(settings_for, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    ear = Log()
    report = SD15.evaluate(settings_for(text_model=settings_for().image_model), watcher=ear)
    assert sorted(tmp_path.rglob("*")) == before
    assert report.output is None
    assert "identity is not measured: there are no reference pictures (--references)" in ear.notes


def test_a_control_picture_that_changes_is_a_failure(settings_for, monkeypatch):
    drawn = run._RecordingCanvas.draw

    def leak(self, *given):
        pictures = list(drawn(self, *given))
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2:  # with the engram
            pictures[-1].putpixel((0, 0), (1, 2, 3))
        return pictures

    monkeypatch.setattr(run._RecordingCanvas, "draw", leak)
    report = SD15.evaluate(settings_for(control_prompts=(CONTROL, "a photo of the snow")))
    assert by_metric(report)["identical pictures of 2"].values == {"engram": 1}
    assert report.details["failures"] == [
        "1 of 2 pictures of prompts without a trigger differ from the base model's: 'a photo of the snow' (seed 0)"
    ]


def test_strength_zero_changes_nothing(settings_for, references):
    report = SD15.evaluate(settings_for(strengths=("0",), references=references))
    assert {measure.difference for measure in report.measures} == {0}
    assert report.adapters[0].strength == 0


def test_a_description_is_read_in_place_of_the_trigger(settings_for, eye):
    options = {"image_model": None, "text_model": eye}
    name, words = (
        by_metric(SD15.evaluate(settings_for(**options, **more)))["adherence"].values["base"]
        for more in ({}, {"described_as": "a red ball"})
    )
    assert name != words


def test_the_shipped_judge_counts_pictures_that_are_right(settings_for, tmp_path):
    zorbit, fenny = (characters_folder() / name for name in ("zorbit-quell", "fenny-wumble"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number, each in enumerate([*read_references(zorbit)[:3], read_references(fenny)[0]]):
        save_png(each, folder / f"{number}.png", {"prompt": "Zorbit Quell somewhere"}, overwrite=False)
    ear = Log()
    settings = settings_for(
        adapters=(), prompts=(), files=(folder,), image_model="tiny", text_model="tiny", references=zorbit
    )
    found = by_metric(SD15.evaluate(settings, watcher=ear))
    assert found["subject right"].values == {"files": 0.75}
    assert "'Zorbit Quell somewhere' names no scene of the small world, or several; it is not measured" in ear.notes


# A LoRA beside the engram


def save_lora(pipeline, folder, part="unet", targets=("to_k", "to_v")):
    """Write a LoRA that changes a lot, as diffusers' scripts do; takes it out again."""
    torch.manual_seed(0)
    module = getattr(pipeline, part)
    module.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=list(targets)))
    with torch.no_grad():
        for name, value in module.named_parameters():
            if ".lora_" in name:
                value.normal_()
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
    pipeline.save_lora_weights(folder, **{f"{part}_lora_layers": layers})
    pipeline.unload_lora_weights()
    return folder


@pytest.fixture(scope="module")
def lora(tmp_path_factory, model):
    pipeline = load_pipeline(SD15.family, str(model))
    with quiet_libraries():
        return save_lora(pipeline, tmp_path_factory.mktemp("lora"))


def test_a_lora_is_drawn_with_and_measured_beside(settings_for, tmp_path, references, lora):
    settings = settings_for(
        lora=str(lora), control_prompts=(CONTROL,), references=references, output=tmp_path / "figures"
    )
    plain = by_metric(SD15.evaluate(replace(settings, lora=None, output=None)))
    report = SD15.evaluate(settings)
    found = by_metric(report)
    assert found["identity"].values.keys() == {"base", "engram", "lora"}
    assert found["identity"].values.items() >= plain["identity"].values.items()  # trying it left nothing behind
    assert found["identity"].values["lora"] not in plain["identity"].values.values()
    assert found["identical pictures of 1"].values == {"engram": 1, "lora": 0}
    for metric in ("difference from base", "distance from base"):
        assert found[metric].values["engram"] == 0
        assert found[metric].values["lora"] > 0
    assert report.details["failures"] == []  # a LoRA promises nothing
    (control,) = (tmp_path / "figures").glob("*red-ball*-lora.png")
    again = by_metric(
        SD15.evaluate(
            settings_for(files=(control,), prompts=(), adapters=(), references=references),
        )
    )
    assert again["identity"].values.keys() == {"lora"}


def test_a_lora_can_be_measured_alone(settings_for, references, lora):
    settings = settings_for(adapters=(), base=False, lora=str(lora), references=references)
    found = by_metric(SD15.evaluate(settings))
    assert found["identity"].values.keys() == {"lora"}


def test_how_much_of_a_lora_fits_is_told(settings_for, lora, tmp_path):
    values = load_file(lora / "pytorch_lora_weights.safetensors")
    values |= {"unet.nowhere.lora.down.weight": torch.ones(2, 5), "unet.nowhere.lora.up.weight": torch.ones(5, 2)}
    save_file(values, tmp_path / "part.safetensors")
    ear = Log()
    SD15.evaluate(settings_for(lora=str(tmp_path / "part.safetensors")), watcher=ear)
    (note,) = (note for note in ear.notes if "fit the model" in note)
    assert "part.safetensors: " in note


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("nowhere.safetensors", "does not exist; give a hub id, a folder or a safetensors file"),
        ("some.bin", "is no safetensors file"),
        ("", "holds 2 safetensors files; name the one with the LoRA"),
    ],
)
def test_a_lora_that_is_not_there_is_refused_before_the_model_is_loaded(
    settings_for, tmp_path, name, told, monkeypatch
):
    monkeypatch.setattr(run.generation, "generate", None)
    folder = tmp_path / "loras"
    folder.mkdir()
    for each in ("one.safetensors", "two.safetensors", "some.bin"):
        (folder / each).write_bytes(b"")
    with pytest.raises(InputError, match=told):
        SD15.evaluate(settings_for(lora=str(folder / name)))


@pytest.mark.parametrize("content", ["nothing", "other parts"])
def test_a_lora_of_another_model_is_refused_before_anything_is_drawn(settings_for, tmp_path, content):
    file = tmp_path / "wrong.safetensors"
    if content == "nothing":
        file.write_bytes(b"not a file of tensors")
    else:
        save_file({"unet.x.lora.down.weight": torch.ones(2, 5), "unet.x.lora.up.weight": torch.ones(5, 2)}, file)
    with pytest.raises(InputError, match=r"wrong\.safetensors: .*give a LoRA of this kind of model"):
        SD15.evaluate(settings_for(lora=str(file), output=tmp_path / "figures"))
    assert not (tmp_path / "figures").exists()


# What is refused


@pytest.mark.parametrize("backbone", [SD15, SDXL, SD35], ids=lambda each: each.name)
def test_every_family_can_be_measured(backbone):
    assert isinstance(backbone, EvaluatingBackbone)
    assert backbone.default_evaluate_settings("other") == {}
    values = backbone.default_evaluate_settings("tiny")
    kind = backbone.evaluate_settings
    settings = resolve_settings(kind, [Layer(source="tiny", values={**values, "prompts": ["a"]})])
    assert settings.image_model == "tiny"
    assert settings.drawing is backbone.generate_settings
    own = backbone.generate_settings(prompts=("a",))
    for name in ("model", "steps", "guidance", "width", "height", "batch_size", "precision"):
        assert getattr(kind(prompts=("a",), image_model="x"), name) == getattr(own, name), name


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"prompts": (), "control_prompts": ()}, "there is nothing to measure on; give --prompt"),
        ({"files": ("a.png",)}, "files are measured as they are; leave out prompts"),
        ({"adapters": (), "control_prompts": (CONTROL,)}, "control_prompts compare base and engram; give --adapter"),
        ({"base": False, "adapters": ()}, "nothing to draw without the base model"),
        ({"control_prompts": (PROMPT,)}, f"'{PROMPT}' is a prompt and a control prompt"),
        ({"image_model": None, "references": "."}, "references need a model to compare with; give --image-model"),
        ({"image_model": None}, "there is nothing to measure; give --image-model"),
        ({"described_as": "a ball"}, "described_as stands for triggers"),
        ({"seeds": (-1,)}, r"seeds are \[-1\], expected at least one, none below 0"),
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
        ({"image_model": "here"}, "is a clip_text_model model, which reads no pictures"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_the_model_is_loaded(settings_for, model, changes, told, monkeypatch):
    monkeypatch.setattr(run.generation, "generate", None)
    changes = {name: str(model / "text_encoder") if value == "here" else value for name, value in changes.items()}
    with pytest.raises(InputError, match=told):
        SD15.evaluate(settings_for(**changes))
