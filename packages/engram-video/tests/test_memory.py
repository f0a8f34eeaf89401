"""Estimates for clips agree with the published sizes of Wan2.2-TI2V-5B, and with what settings are meant to save."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from engram_video.memory import estimate_memory
from engram_video.settings import Wan22TrainSettings
from engram_video.training.clips import CLIPS

BILLION = 1e9
CARD = 24 * 2**30  # bytes
# As the repository of Wan2.2-TI2V-5B-Diffusers has them.
CONFIGS = {
    "transformer": {
        "patch_size": [1, 2, 2],
        "num_attention_heads": 24,
        "attention_head_dim": 128,
        "in_channels": 48,
        "out_channels": 48,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": 14336,
        "num_layers": 30,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    },
    "vae": {
        "base_dim": 160,
        "decoder_base_dim": 256,
        "z_dim": 48,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "temperal_downsample": [False, True, True],
        "is_residual": True,
        "in_channels": 12,
        "out_channels": 12,
        "patch_size": 2,
        "scale_factor_temporal": 4,
        "scale_factor_spatial": 16,
    },
    "text_encoder": {
        "model_type": "umt5",
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
        "vocab_size": 256384,
        "feed_forward_proj": "gated-gelu",
    },
}
PARTS = {
    "transformer": ["diffusers", "WanTransformer3DModel"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_encoder": ["transformers", "UMT5EncoderModel"],
    "tokenizer": ["transformers", "T5TokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """The defaults, for a folder with the configuration files of TI2V-5B and no weights."""
    root = tmp_path_factory.mktemp("ti2v")
    for part, config in CONFIGS.items():
        (root / part).mkdir()
        (root / part / "config.json").write_text(json.dumps(config))
    (root / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **PARTS}))
    return Wan22TrainSettings(data=Path("clips"), trigger="Zorbit Quell", output=Path("z.safetensors"), model=str(root))


@pytest.fixture(scope="module")
def estimate(settings):
    found = estimate_memory(settings)
    assert found is not None
    return found


def test_the_parts_have_their_published_sizes(estimate):
    sizes = {"transformer": (5.0, 2), "vae": (0.705, 4), "text_encoder": (5.68, 2)}  # the VAE computes in float32
    for part, (billions, width) in sizes.items():
        assert estimate.modules[part] == pytest.approx(billions * BILLION * width, rel=0.01), part


def test_the_default_run_fits_a_card_of_24_gb(estimate):
    assert max(estimate.encoding, estimate.training) < CARD
    assert estimate.weights == estimate.modules["transformer"]
    assert "9 frames of 1280x704, batch 1, gradient checkpointing" in estimate.show()


def test_without_checkpoints_it_would_not(settings, estimate):
    plain = estimate_memory(replace(settings, gradient_checkpointing=False))
    assert plain.activations > 5 * estimate.activations
    assert plain.training > CARD


def test_blocks_that_take_turns_save_the_weights(settings, estimate):
    low = estimate_memory(replace(settings, low_memory=True))
    assert low.weights < estimate.weights / 15
    assert low.activations == estimate.activations
    assert low.host == estimate.host


def test_more_and_larger_frames_need_more(settings, estimate):
    assert estimate_memory(replace(settings, frames=17)).activations > 1.5 * estimate.activations
    assert estimate_memory(replace(settings, width=640, height=352)).activations < estimate.activations / 3


def test_training_tells_the_estimate(settings, estimate):
    assert CLIPS.estimate(settings) == estimate


def test_what_cannot_be_known_is_not_estimated(settings, tmp_path):
    assert estimate_memory(replace(settings, model=str(tmp_path))) is None
