"""Stable Diffusion 1.x is loaded from wherever it lies; everything else is refused by name, in one line."""

import json
import logging
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel
from vision_builders import assemble, build_model, tokenizer, weights_of
from vision_original import write_original
from vision_published import CLIP_L, SD15_UNET, VAE

from engram_core import InputError
from engram_vision import shipped
from engram_vision.families import SD15
from engram_vision.models import check_pipeline, load_pipeline, model_fingerprint, pick_device


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Cut the hub off and empty its cache; returns the cache."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copied(model, tmp_path):
    """Return a copy of the small model to spoil."""
    return shutil.copytree(model, tmp_path / "copied")


def refuse(model, *told):
    with pytest.raises(InputError) as caught:
        load_pipeline(SD15, str(model))
    message = str(caught.value)
    assert message.startswith(f"{model}: ") or str(model) in message.split(": ")[0]
    assert all(text in message for text in told), message
    assert message.isprintable()


# Folders


def test_a_folder_gives_its_weights_without_safety_checker_in_evaluation(model):
    pipeline = load_pipeline(SD15, str(model))
    assert weights_of(pipeline) == weights_of(build_model())
    assert pipeline.safety_checker is None
    assert not any(getattr(pipeline, part).training for part in ("unet", "vae", "text_encoder"))
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    assert pipeline.device.type == "cpu"


def test_the_precision_is_that_of_all_weights(model):
    pipeline = load_pipeline(SD15, str(model), precision="bf16", device=torch.device("cpu"))
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.bfloat16}


def test_loading_says_nothing_and_leaves_the_libraries_voices_as_they_were(model, capfd):
    from diffusers.utils import logging as diffusers_logging

    levels = [logging.getLogger(name).level for name in ("diffusers", "transformers")]
    bars = diffusers_logging.is_progress_bar_enabled()
    load_pipeline(SD15, str(model))
    with pytest.raises(InputError):
        load_pipeline(SD15, str(model / "unet"))
    assert capfd.readouterr() == ("", "")
    assert [logging.getLogger(name).level for name in ("diffusers", "transformers")] == levels
    assert diffusers_logging.is_progress_bar_enabled() == bars


def test_a_folder_without_an_index_is_refused(tmp_path):
    refuse(tmp_path, "has no model_index.json", "diffusers layout")


@pytest.mark.parametrize("text", ["{", "[]", "{}", "1"])
def test_a_damaged_index_is_refused(copied, text):
    (copied / "model_index.json").write_text(text, encoding="utf-8")
    refuse(copied, "model_index.json", "cannot be read")


@pytest.mark.parametrize(
    "kind", ["StableDiffusionXLPipeline", "StableDiffusion3Pipeline", "FluxPipeline", "WanPipeline", ["file", "Own"]]
)
def test_folders_of_other_models_are_refused_by_name(copied, kind):
    change_index(copied, _class_name=kind)
    refuse(copied, f"is a {kind}", "expected a Stable Diffusion 1.x model")


def test_an_inpainting_folder_is_refused(tmp_path, capfd):
    pipeline = build_model()
    pipeline.unet = UNet2DConditionModel(**dict(pipeline.unet.config) | {"in_channels": 9})
    pipeline.save_pretrained(tmp_path / "inpaint")
    assert not capfd.readouterr().out
    refuse(tmp_path / "inpaint", "9 input channels", "its vae 4", "inpainting")


@pytest.mark.parametrize(
    ("folder", "file"),
    [
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("vae", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_missing_weights_are_refused(copied, folder, file):
    path = copied / folder / file
    tensors = load_file(path)
    path.unlink()
    refuse(copied, "cannot be loaded")
    # A tensor of many would be made up at random, and nobody would be told.
    missing = sorted(tensors)[len(tensors) // 2]
    save_file({name: value for name, value in tensors.items() if name != missing}, path, {"format": "pt"})
    refuse(copied, "cannot be loaded", missing)


def change_index(folder, **entries):
    index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    (folder / "model_index.json").write_text(json.dumps(index | entries), encoding="utf-8")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_part_is_refused(copied, part):
    change_index(copied, **{part: [None, None]})
    refuse(copied, part)


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        ("vae", ["diffusers", "AutoencoderTiny"]),
        ("text_encoder", ["transformers", "T5EncoderModel"]),
        ("unet", ["subprocess", "Popen"]),
        ("unet", "unet"),
    ],
)
def test_a_folder_with_a_part_of_another_kind_is_refused(copied, part, kind):
    change_index(copied, **{part: kind})
    refuse(copied, f"its {part} is {kind}", "as in Stable Diffusion 1.x")


# Single files


def test_a_single_file_beside_an_index_is_loaded_without_the_hub(model, base, copied, offline):
    for weights in copied.rglob("*.safetensors"):
        weights.unlink()
    path = write_original(base, copied / "v1.safetensors")
    pipeline = load_pipeline(SD15, str(path))
    assert weights_of(pipeline) == weights_of(base)
    assert pipeline.safety_checker is None
    assert not any(getattr(pipeline, part).training for part in ("unet", "vae", "text_encoder"))
    assert pipeline.tokenizer("a red ball").input_ids == base.tokenizer("a red ball").input_ids
    assert load_pipeline(SD15, str(path), precision="bf16").unet.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "missing",
    [
        "model.diffusion_model.out.2.bias",
        "first_stage_model.decoder.conv_out.bias",
        "cond_stage_model.transformer.text_model.final_layer_norm.bias",
    ],
)
def test_a_single_file_without_all_weights_is_refused(copied, base, missing):
    path = write_original(base, copied / "v1.safetensors")
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != missing}, path)
    refuse(path, "cannot be loaded")


def test_a_single_file_beside_the_index_of_another_model_is_refused(copied, base):
    change_index(copied, _class_name="StableDiffusionXLPipeline")
    refuse(write_original(base, copied / "v1.safetensors"), "is a StableDiffusionXLPipeline")


def test_a_single_file_alone_needs_the_hub_and_the_error_says_so(base, tmp_path, offline):
    refuse(write_original(base, tmp_path / "v1.safetensors"), "configuration from the hub", "model_index.json")


@pytest.mark.parametrize("name", ["v1.safetensors", "v1.ckpt"])
def test_a_file_that_is_no_model_is_refused(copied, name):
    (copied / name).write_bytes(b"junk" * 10)
    refuse(copied / name, "cannot be loaded")


def test_a_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"junk")
    refuse(tmp_path / "model.bin", "is not a model", ".safetensors or .ckpt")


# The hub


def test_a_hub_id_in_the_cache_is_loaded_without_the_network(model, base, offline):
    snapshot = offline / "models--someone--small" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(model, snapshot)
    (offline / "models--someone--small" / "refs").mkdir()
    (offline / "models--someone--small" / "refs" / "main").write_text("a" * 40, encoding="utf-8")
    assert weights_of(load_pipeline(SD15, "someone/small")) == weights_of(base)
    change_index(snapshot, _class_name="StableDiffusionXLPipeline")
    refuse("someone/small", "is a StableDiffusionXLPipeline")


def test_a_hub_id_that_cannot_be_had_is_refused(offline):
    refuse("someone/small", "no such folder", "network or the hub's cache")


@pytest.mark.parametrize("model", ["./none", "/none/at/all", "~/none", "none", "none.safetensors", "a/b/c", ""])
def test_a_path_that_is_not_there_is_not_looked_for_on_the_hub(model, offline, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    refuse(model, "does not exist" if model else "has no model_index.json")


# Which models


def test_the_real_stable_diffusion_15_is_accepted():
    with torch.device("meta"):
        parts = {
            "unet": UNet2DConditionModel(**SD15_UNET),
            "vae": AutoencoderKL(**VAE),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP_L)),
        }
    assert sum(value.numel() for value in parts["unet"].parameters()) == 859_520_964
    pipeline = assemble(**parts, tokenizer=tokenizer(), scheduler=PNDMScheduler(steps_offset=1, skip_prk_steps=True))
    check_pipeline(SD15, pipeline, "stable-diffusion-v1-5")
    assert pipeline.vae_scale_factor == 8


def test_stable_diffusion_2_and_mismatched_parts_are_refused(pipeline):
    config = pipeline.text_encoder.config.to_dict() | {"num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.device("meta"):
        pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 1024}))
    with pytest.raises(InputError, match=r"m: is Stable Diffusion 2 \(text states of width 1024\), expected 1.x"):
        check_pipeline(SD15, pipeline, "m")
    with torch.device("meta"):
        pipeline.text_encoder = CLIPTextModel(CLIPTextConfig(**config | {"hidden_size": 48}))
    with pytest.raises(
        InputError, match="m: its unet reads states of width 32, its text encoders give text_encoder 48"
    ):
        check_pipeline(SD15, pipeline, "m")
    with pytest.raises(InputError, match="m: is a object, expected"):
        check_pipeline(SD15, object(), "m")


def test_the_shipped_checkpoint_is_accepted_and_has_a_fingerprint(one_thread):
    try:
        shipped.tiny_folder("sd15")
    except InputError:
        pytest.skip("the checkpoint is not part of this checkout")
    pipeline = load_pipeline(SD15, "tiny")
    assert pipeline.text_encoder.config.max_position_embeddings == pipeline.tokenizer.model_max_length
    assert len(model_fingerprint(SD15, "tiny")) == 64


def test_other_models_have_no_fingerprint(model):
    assert model_fingerprint(SD15, str(model)) is None


# Devices


def test_the_device_is_the_best_there_is_unless_one_is_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto", "bf16") == torch.device("cpu")
    with pytest.raises(InputError, match="device 'cuda' is not available here; available: cpu"):
        pick_device("cuda")
    for device in ("auto", "cpu"):
        with pytest.raises(InputError, match="precision fp16 needs a GPU; use bf16 or fp32"):
            pick_device(device, "fp16")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto", "fp16") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == torch.device("cuda")
    assert pick_device("cpu") == torch.device("cpu")


def test_what_ships_names_no_folder_of_the_machine_that_made_it():
    files = list(shipped.tiny_folder("sd15").parent.rglob("*.json"))
    assert files
    assert not [file for file in files if "_name_or_path" in file.read_text(encoding="utf-8")]
