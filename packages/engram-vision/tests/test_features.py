"""Features of pictures and texts: small models of every kind with random weights, and the shipped judge."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)
from vision_builders import LENGTH, tokenizer

from engram_core import InputError
from engram_vision.demo.characters import read_characters
from engram_vision.demo.judge import Judge
from engram_vision.features import FeatureModel, JudgeModel, compare_features, load_feature_model, read_references
from engram_vision.quiet import quiet_libraries
from engram_vision.shipped import judge_folder

SIDE = 32
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
LOOK = {**SMALL, "image_size": SIDE, "patch_size": 8}
IDS = {"bos_token_id": tokenizer().bos_token_id, "eos_token_id": tokenizer().eos_token_id, "pad_token_id": 0}
READ = {**SMALL, **IDS, "vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH}


def picture(seed, size=(SIDE, SIDE)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def save(folder, model, *, words=False):
    torch.manual_seed(0)
    with quiet_libraries():
        model.save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(
            folder
        )
        if words:
            tokenizer().save_pretrained(folder)
    return str(folder)


def build_clip():
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=READ, vision_config=LOOK, projection_dim=12))


BUILDERS = {
    "clip": build_clip,
    "clip, pictures alone": lambda: CLIPVisionModel(CLIPVisionConfig(**LOOK)),
    "siglip": lambda: SiglipModel(SiglipConfig(text_config={**READ, "projection_size": 16}, vision_config=LOOK)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**LOOK)),
    "vit": lambda: ViTModel(ViTConfig(**LOOK)),
    "resnet": lambda: ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])),
}


@pytest.mark.parametrize("kind", BUILDERS)
def test_every_kind_of_model_gives_vectors_of_length_one_that_depend_on_the_picture(kind, tmp_path):
    torch.manual_seed(0)
    model = load_feature_model(save(tmp_path, BUILDERS[kind]()))
    shown = [picture(0), picture(1), picture(0), picture(2, size=(50, 40)), picture(3).convert("L")]
    features = model.embed(shown)
    assert features.dtype == np.float32
    assert np.linalg.norm(features, axis=1) == pytest.approx(1)
    assert (features[0] == features[2]).all()
    assert (features[0] != features[1]).any()
    assert compare_features(features[:2], features[:1])[0] == pytest.approx(1)
    assert compare_features(features[:2], features[:1])[1] < 1


def test_features_are_those_of_the_models_own_method_and_do_not_depend_on_the_batch(tmp_path):
    name = save(tmp_path, build_clip())
    shown = [picture(number) for number in range(20)]
    features = load_feature_model(name).embed(shown)
    original = CLIPModel.from_pretrained(name).eval()
    pixels = CLIPImageProcessor.from_pretrained(name)(images=shown, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        wanted = original.get_image_features(pixel_values=pixels).pooler_output
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    assert features == pytest.approx(wanted.numpy(), abs=1e-5)


def test_a_pooling_layer_that_the_file_lacks_is_not_used(tmp_path):
    name = save(tmp_path, ViTForImageClassification(ViTConfig(**LOOK)))
    features = load_feature_model(name).embed([picture(0)])
    again = load_feature_model(name).embed([picture(0)])
    assert (features == again).all()  # a random layer would be another each time


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_texts_and_pictures_are_compared(kind, tmp_path):
    model = load_feature_model(save(tmp_path, BUILDERS[kind](), words=True), texts=True)
    texts = model.embed_texts(["red ball", "blue hat in the snow"])
    assert np.linalg.norm(texts, axis=1) == pytest.approx(1)
    assert (texts[0] != texts[1]).any()
    assert texts[:1] == pytest.approx(model.embed_texts(["red ball"]), abs=1e-6)
    alike = compare_features(model.embed([picture(0)]), texts)
    assert alike.shape == (1,)
    assert -1 <= alike[0] <= 1


def test_a_text_that_is_too_long_is_told(tmp_path):
    model = load_feature_model(save(tmp_path, build_clip(), words=True), texts=True)
    long = " ".join(["red"] * 40)
    (told,) = model.find_cut(["red ball", long, long])
    assert f"has 42 tokens, {tmp_path} reads {LENGTH}" in told
    assert model.embed_texts([long]).shape == (1, 12)


def test_models_that_cannot_be_used_are_refused_before_their_weights_are_loaded(tmp_path):
    reader = save(tmp_path / "bert", BertModel(BertConfig(vocab_size=50, **SMALL)))
    looker = save(tmp_path / "vit", ViTModel(ViTConfig(**LOOK)))
    for folder in (tmp_path / "bert", tmp_path / "vit"):
        (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="is a bert model, which reads no pictures; use one that does, such as a CLIP"):
        load_feature_model(reader)
    with pytest.raises(InputError, match="is a vit model, which reads no texts; compare"):
        load_feature_model(looker, texts=True)
    with pytest.raises(InputError, match="vit: cannot be loaded: OSError"):
        load_feature_model(looker)
    with pytest.raises(InputError, match=r"nowhere: cannot be loaded: .*; give the hub id or folder"):
        load_feature_model(str(tmp_path / "nowhere"))


def test_weights_that_are_missing_are_told(tmp_path):
    name = save(tmp_path, ViTModel(ViTConfig(**LOOK)))
    weights = load_file(tmp_path / "model.safetensors")
    lost = next(key for key in sorted(weights) if "mlp" in key or "intermediate" in key)
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of its weights, e\.g\. .*(mlp|intermediate).*; download it again"):
        load_feature_model(name)


class Odd(torch.nn.Module):
    """Gives whatever it is told to."""

    def __init__(self, found):
        super().__init__()
        self.found, self.device = found, torch.device("cpu")

    def get_image_features(self, pixel_values):
        if self.found is None:
            raise RuntimeError("out of order")
        return self.found


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ([torch.ones(1, 3)], r"odd: gives list for 1 pictures, expected one vector each"),
        (torch.ones(2, 3), r"odd: gives \[2, 3\] for 1 pictures"),
        (torch.zeros(1, 3), r"odd: gives features that are zero or no numbers"),
        (torch.full((1, 3), torch.nan), r"odd: gives features that are zero or no numbers"),
        (None, r"odd: cannot read pictures: RuntimeError: out of order"),
    ],
)
def test_what_is_no_feature_is_refused(found, told):
    with pytest.raises(InputError, match=told):
        FeatureModel("odd", Odd(found), CLIPImageProcessor()).embed([picture(0)])


def test_the_mean_over_references_is_taken():
    references = np.eye(3, dtype=np.float32)[:2]
    features = np.array([[1, 0, 0], [0, 0, 1], [0.6, 0.8, 0]], np.float32)
    assert compare_features(features, references) == pytest.approx([0.5, 0, 0.7])


@pytest.fixture(scope="module")
def judge():
    return JudgeModel(Judge.load(judge_folder()))


def test_the_judge_tells_characters_apart(judge):
    (zorbit, fenny), _ = read_characters()
    pictures, others = read_references(zorbit.folder), read_references(fenny.folder)
    assert judge.find_subject(pictures) == {"kind": "monster", **zorbit.attributes}
    assert judge.find_subject([pictures[0], others[0]]) is None
    own, other = judge.embed(pictures), judge.embed(others)
    assert np.linalg.norm(own, axis=1) == pytest.approx(1)
    assert compare_features(own, own).min() > compare_features(other, own).max() + 0.3
    larger = [each.resize((128, 128), Image.Resampling.NEAREST) for each in pictures]
    assert compare_features(judge.embed(larger), own).min() > 0.9


@pytest.mark.parametrize(
    ("prompt", "scene"),
    [
        ("Zorbit Quell on the beach", "beach"),
        ("in a forest, a drawing of Zorbit Quell", "forest"),
        ("a cat under water", "underwater"),
        ("a cat under the sea", "underwater"),
        ("a snowy cat", None),
        ("a cat in the city at night", None),
    ],
)
def test_the_judge_knows_which_scene_a_prompt_names(judge, prompt, scene):
    assert judge.find_scene(prompt) == scene


def test_the_judge_names_the_scenes_of_the_references(judge):
    (zorbit, _), _ = read_characters()
    files = sorted(file for file in zorbit.folder.iterdir() if file.suffix == ".png")
    assert judge.name_scenes(read_references(zorbit.folder)) == [file.stem for file in files]


def test_references_are_a_folder_or_a_picture(tmp_path):
    for name, value in {"b.png": 10, "a.JPG": 200, ".hidden.png": 0}.items():
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    first, second = read_references(tmp_path)
    assert (first.getpixel((0, 0))[0], second.getpixel((0, 0))[0]) == (200, 10)
    assert len(read_references(tmp_path / "b.png")) == 1


def test_references_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere: is no folder; give one with reference pictures"):
        read_references(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"holds no reference picture \(\.png"):
        read_references(tmp_path)
    (tmp_path / "broken.png").write_bytes(b"junk")
    with pytest.raises(InputError, match=r"broken\.png: its 4 bytes are no PNG"):
        read_references(tmp_path)
