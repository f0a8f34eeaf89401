"""Estimates agree with the published sizes of models, with what can be counted by hand, and with a GPU's own count."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from torch import nn
from vision_published import (
    CLIP_G,
    CLIP_L,
    SD15_UNET,
    SD35_BOTH,
    SD35_LARGE,
    SD35_MEDIUM,
    SDXL_UNET,
    T5_XXL,
    VAE,
    VAE_16,
)

from engram_core.torch.offload import BlockOffload
from engram_vision import memory
from engram_vision.families import SD15, SD35, SDXL
from engram_vision.memory import Estimate, estimate_memory, offload_blocks
from engram_vision.meter import measured, tensors_of

_CLIP = {"model_type": "clip_text_model"}  # as the configuration files say beside what their classes need
_T5 = T5_XXL | {"model_type": "t5"}
_TEXT = {"text_encoder": CLIP_L | _CLIP}
_TEXT_2 = _TEXT | {"text_encoder_2": CLIP_G | _CLIP}
_TEXT_3 = _TEXT_2 | {"text_encoder_3": _T5}
MODELS = {
    "sd15": (SD15, {"unet": SD15_UNET, "vae": VAE, **_TEXT}),
    "sdxl": (SDXL, {"unet": SDXL_UNET, "vae": VAE, **_TEXT_2}),
    "medium": (SD35, {"transformer": SD35_MEDIUM, "vae": VAE_16, **_TEXT_3}),
    "large": (SD35, {"transformer": SD35_LARGE, "vae": VAE_16, **_TEXT_3}),
}
# Small in everything.
_SMALL_CLIP = _CLIP | {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
_SMALL_CLIP |= {"projection_dim": 16, "vocab_size": 100}
_SMALL_T5 = _T5 | {"d_model": 64, "d_ff": 512, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 100}
_SMALL_VAE = VAE_16 | {"block_out_channels": [8, 8, 16, 16], "norm_num_groups": 4}
_SMALL_MMDIT = SD35_BOTH | {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 16, "sample_size": 16}
_SMALL_MMDIT |= {"caption_projection_dim": 64, "joint_attention_dim": 64, "pooled_projection_dim": 32}
_SMALL_MMDIT |= {"pos_embed_max_size": 16, "dual_attention_layers": [0]}
_SMALL_UNET = {
    "sample_size": 8,
    "cross_attention_dim": 16,
    "block_out_channels": [32, 64],
    "attention_head_dim": 4,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
_SMALL_TEXT = {"text_encoder": _SMALL_CLIP, "text_encoder_2": _SMALL_CLIP, "text_encoder_3": _SMALL_T5}
MODELS |= {
    "small": (SD35, {"transformer": _SMALL_MMDIT, "vae": _SMALL_VAE, **_SMALL_TEXT}),
    "small-unet": (
        SD15,
        {"unet": _SMALL_UNET, "vae": _SMALL_VAE | {"latent_channels": 4}, "text_encoder": _SMALL_CLIP},
    ),
}

BILLION = 1e9
OPTIONS = {"precision": "bf16", "resolution": 64, "batch_size": 1, "gradient_checkpointing": True, "low_memory": False}


@pytest.fixture
def folder(tmp_path):
    """Return a function that writes a model's configuration files, in diffusers layout and without weights."""

    def write(name, **changes):
        family, configs = MODELS[name]
        root = tmp_path / name
        index = {"_class_name": family.pipeline_class, "_diffusers_version": "0.36.0"}
        for part, (library, kind) in family.modules().items():
            index[part] = changes.get(part, [library, kind])
            (root / part).mkdir(parents=True)
            config = configs[part] if library == "transformers" else {"_class_name": kind, **configs[part]}
            (root / part / "config.json").write_text(json.dumps(config))
        (root / "model_index.json").write_text(json.dumps(index))
        return str(root)

    return write


def estimate(folder, name, **options):
    found = estimate_memory(MODELS[name][0], folder(name), **OPTIONS | options)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("name", "published"),
    [
        # Model cards, and the sizes of the published files.
        ("sd15", {"unet": 0.860, "vae": 0.084, "text_encoder": 0.123}),
        ("sdxl", {"unet": 2.567, "vae": 0.084, "text_encoder": 0.123, "text_encoder_2": 0.695}),
        ("medium", {"transformer": 2.47, "vae": 0.084, "text_encoder_2": 0.695, "text_encoder_3": 4.762}),
        ("large", {"transformer": 8.1, "vae": 0.084, "text_encoder_2": 0.695, "text_encoder_3": 4.762}),
    ],
)
def test_the_modules_have_their_published_sizes(folder, name, published):
    modules = memory._build(MODELS[name][0], folder(name), torch.bfloat16, ())
    for part, billions in published.items():
        size = sum(tensor.numel() for tensor in tensors_of(modules[part]))
        assert size == pytest.approx(billions * BILLION, rel=0.02), part
    assert {parameter.device.type for parameter in modules["vae"].parameters()} == {"meta"}


def test_number_types_are_those_of_loading(folder):
    where = folder("small")
    sizes = {
        precision: estimate_memory(SD35, where, **OPTIONS | {"precision": precision}).modules
        for precision in ("fp32", "bf16", "fp16")
    }
    assert sizes["bf16"]["transformer"] * 2 == sizes["fp32"]["transformer"]
    assert sizes["fp16"]["transformer"] == sizes["bf16"]["transformer"]
    # transformers keeps the second half of T5's feed-forward layers in float32 then.
    assert sizes["fp16"]["text_encoder_3"] - sizes["bf16"]["text_encoder_3"] == 2 * 64 * 512 * 2


def test_parts_of_an_estimate_add_up(folder):
    found = estimate(folder, "small")
    assert set(found.modules) == {"transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"}
    assert found.host == sum(found.modules.values())
    assert found.training == found.weights + found.activations
    assert found.weights == found.modules["transformer"]
    assert found.encoding > found.encoder_weights


def test_checkpoints_save_activations_and_blocks_save_weights(folder):
    where = folder("small")

    def run(**options):
        return estimate_memory(SD35, where, **OPTIONS | {"batch_size": 4, "resolution": 128} | options)

    plain, checkpointed, low = run(gradient_checkpointing=False), run(), run(low_memory=True)
    assert plain.activations > 2 * checkpointed.activations
    assert low.activations == checkpointed.activations
    assert low.weights < checkpointed.weights / 2
    assert low.host == checkpointed.host
    assert run(batch_size=8).activations > 1.8 * checkpointed.activations


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("low_memory", [True, False])
def test_unets_are_estimated_too(folder, checkpointing, low_memory):
    found = estimate(folder, "small-unet", gradient_checkpointing=checkpointing, low_memory=low_memory)
    assert (found.weights < found.modules["unet"] / 2) == low_memory
    assert found.denoiser == ("one block at a time of the unet" if low_memory else "unet")


def test_the_models_own_resolution_is_taken_where_none_is_given(folder):
    found = estimate(folder, "small", resolution=None)
    assert "at 128 px" in found.conditions  # 16 latents of 8 pixels


def test_an_encoder_that_is_left_out_is_not_counted(folder):
    where = folder("small")
    without = estimate_memory(SD35, where, **OPTIONS, without=("t5",))
    assert "text_encoder_3" not in without.modules
    assert without.activations == estimate_memory(SD35, where, **OPTIONS).activations


def test_a_model_may_lack_an_optional_encoder(folder):
    found = estimate_memory(SD35, folder("small", text_encoder_3=[None, None]), **OPTIONS)
    assert "text_encoder_3" not in found.modules


def test_the_vae_of_a_half_precision_run_encodes_in_single_precision(folder):
    where = folder("small-unet")
    half, single = (estimate_memory(SD15, where, **OPTIONS | {"precision": name}) for name in ("fp16", "fp32"))
    assert (half.encoder, half.encoding) == ("VAE", single.encoding)
    assert half.encoder_weights == single.modules["vae"] == 2 * half.modules["vae"]


def test_the_shipped_model_is_known():
    assert estimate_memory(SD15, "tiny", **OPTIONS) is not None


def test_a_single_file_is_known_with_its_repository_beside_it(folder, tmp_path):
    where = folder("small")
    beside, alone = Path(where, "sd3.5.safetensors"), tmp_path / "alone.safetensors"
    for file in (beside, alone):
        file.touch()
    assert estimate_memory(SD35, str(beside), **OPTIONS) == estimate_memory(SD35, where, **OPTIONS)
    assert estimate_memory(SD35, str(alone), **OPTIONS) is None


def test_what_cannot_be_read_is_not_known(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert estimate_memory(SD35, "nobody/nothing", **OPTIONS) is None
    assert estimate_memory(SD35, str(tmp_path), **OPTIONS) is None
    where = folder("small")
    Path(where, "vae", "config.json").write_text("{")
    assert estimate_memory(SD35, where, **OPTIONS) is None


def test_people_read_gigabytes():
    found = Estimate(
        modules={"transformer": 4_900_000_000, "text_encoder_3": 9_500_000_000},
        encoding=9_600_000_000,
        training=7_900_000_000,
        host=14_400_000_000,
        encoder="t5 encoder",
        encoder_weights=9_500_000_000,
        denoiser="transformer",
        weights=4_900_000_000,
        activations=3_000_000_000,
        conditions="at 1024 px, batch 1, gradient checkpointing",
    )
    assert found.show() == (
        "needs about 9.6 GB while encoding (t5 encoder 9.5 GB, activations 0.1 GB) and 7.9 GB while training "
        "(transformer 4.9 GB, activations 3.0 GB at 1024 px, batch 1, gradient checkpointing),\n"
        "and 14.4 GB of host memory"
    )
    assert "0.0 GB" in replace(found, activations=1).show()


def test_bytes_are_counted_as_long_as_they_live():
    layer = nn.Linear(10, 10, device="meta").requires_grad_(False)
    with measured(layer) as meter:
        states = torch.empty(5, 10, device="meta", requires_grad=True)  # 200 bytes
        first = layer(states)  # 200
        view = first.view(10, 5)
        second = torch.tanh(view)  # 200, and it is kept for the backward pass
        assert meter.peak == 600
        del first, view
        second.sum().backward()  # a sum, its gradient, three gradients of 200 of which two live at a time
    assert 800 <= meter.peak <= 820


def test_attention_keeps_no_scores():
    n_positions, bytes_of_one = 1000, 1000 * 8 * 4
    heads = [torch.empty(1, 1, n_positions, 8, device="meta", requires_grad=True) for _ in range(3)]
    with measured(nn.Identity()) as meter:
        out = torch.nn.functional.scaled_dot_product_attention(*heads)
        assert meter.peak == bytes_of_one + n_positions * 4
        out.backward(out)
    assert meter.peak <= 5 * bytes_of_one + n_positions * 4 < n_positions**2 * 4


@pytest.mark.parametrize("name", ["small", "small-unet"])
def test_blocks_hold_nearly_all_weights_and_are_apart(folder, name):
    denoiser = memory._build(MODELS[name][0], folder(name), torch.float32, ())[MODELS[name][0].denoiser]
    blocks = offload_blocks(denoiser)
    inside = [parameter for block in blocks for parameter in block.parameters()]
    assert len(set(inside)) == len(inside)
    assert sum(map(torch.numel, inside)) > 0.5 * sum(map(torch.numel, denoiser.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "plain", "checkpointed"), [("medium", 6.8, 0.65), ("large", 13.2, 1.32), ("sdxl", 5.2, 0.55)]
)
def test_estimates_of_the_published_models(folder, name, plain, checkpointed):
    where = folder(name)
    for expected, checkpointing in ((plain, False), (checkpointed, True)):
        options = OPTIONS | {"resolution": 1024, "gradient_checkpointing": checkpointing}
        found = estimate_memory(MODELS[name][0], where, **options)
        assert found.activations / BILLION == pytest.approx(expected, rel=0.1)


def test_blocks_of_a_unet_can_take_turns():
    torch.manual_seed(0)
    unet = UNet2DConditionModel(**_SMALL_UNET).requires_grad_(False)
    latents, words = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 16)

    def gradient():
        states = words.clone().requires_grad_()
        unet(latents, 5, states).sample.square().sum().backward()
        return states.grad

    expected = gradient()
    with BlockOffload(offload_blocks(unet), "cpu", model=unet):
        assert torch.equal(gradient(), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gpu_counts_the_same(folder, checkpointing):
    options = OPTIONS | {"resolution": 512, "batch_size": 4, "gradient_checkpointing": checkpointing}
    wide = _SMALL_MMDIT | {"num_attention_heads": 8, "attention_head_dim": 64, "caption_projection_dim": 512}
    wide |= {"pos_embed_max_size": 64, "sample_size": 64}
    where = folder("small")
    Path(where, "transformer", "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel", **wide}))
    found = estimate_memory(SD35, where, **options)
    denoiser = SD3Transformer2DModel(**wide).to("cuda", torch.bfloat16).requires_grad_(False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    peaks = []
    for _ in range(2):  # libraries take their workspace in the first
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        like = {"dtype": torch.bfloat16, "device": "cuda"}
        guess = denoiser(
            torch.randn(4, 16, 64, 64, **like),
            encoder_hidden_states=torch.randn(4, 333, 64, **like, requires_grad=True),
            pooled_projections=torch.randn(4, 32, **like),
            timestep=torch.zeros(4, device="cuda"),
            return_dict=False,
        )[0]
        guess.backward(torch.empty_like(guess))
        del guess
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert found.activations == pytest.approx(peaks[-1], rel=0.15)
