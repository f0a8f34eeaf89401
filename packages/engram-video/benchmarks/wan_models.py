"""What training is measured on: models with the widths of Wan2.2-TI2V-5B and random weights, and clips with captions.

`python wan_models.py cpu|cuda FOLDER` writes such a model, with the layers that the device can bear; time and memory
do not depend on the weights.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engram_video.clips import write_clip

TRIGGER = "zorbit quell"
SCENES = ("on the beach", "in the snow")

# The values of TI2V-5B's configuration files but for the numbers of layers, and latents that are centred already.
TRANSFORMER = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 14336,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
VAE = {
    "base_dim": 160,
    "decoder_base_dim": 256,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
    "latents_mean": [0.0] * 48,
    "latents_std": [1.0] * 48,
}
UMT5 = {
    "vocab_size": 256384,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# By device: of the transformer's 30 layers, and of the text encoder's 24.
LAYERS = {"cpu": (2, 2), "cuda": (30, 24)}
LENGTH = 512  # tokens that the pipeline reads, padded


def write_model(folder: Path, device: str) -> None:
    """Write a pipeline in diffusers layout, its transformer and text encoder in bfloat16."""
    import torch
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    n_blocks, n_layers = LAYERS[device]
    torch.manual_seed(0)
    with torch.device(device):  # where random numbers are drawn fast
        vae = AutoencoderKLWan(**VAE).eval()
        torch.set_default_dtype(torch.bfloat16)
        transformer = WanTransformer3DModel(**TRANSFORMER, num_layers=n_blocks).eval()
        text_encoder = UMT5EncoderModel(UMT5Config(**UMT5, num_layers=n_layers)).eval()
        torch.set_default_dtype(torch.float32)
    WanPipeline(
        tokenizer=make_tokenizer(),
        text_encoder=text_encoder,
        vae=vae,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        transformer=transformer,
        expand_timesteps=True,
    ).save_pretrained(folder)


def make_tokenizer() -> Any:
    """Return a tokenizer in T5's format that cuts a trigger into a few pieces; the real one's words are not here."""
    from transformers import T5Tokenizer

    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = ["▁zor", "bit", "▁quel", "l", "▁a", "▁in", "▁on", "▁the", "▁snow", "▁beach", "▁jumping"]
    letters = [(chr(code), -6.0) for code in range(33, 127) if chr(code) not in pieces]
    words = [(piece, -3.0) for piece in pieces]
    return T5Tokenizer(vocab=[*specials, ("▁", -4.0), *words, *letters], extra_ids=0, model_max_length=LENGTH)


def write_clips(folder: Path, width: int, height: int, frames: int) -> None:
    """Write a data set: for each scene a clip of a square that moves, and a caption with the trigger."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    lines = []
    for number, scene in enumerate(SCENES):
        ground = random.integers(0, 256, (height // 8, width // 8, 3), np.uint8).repeat(8, axis=0).repeat(8, axis=1)
        clip = np.repeat(ground[None], frames, axis=0)
        for place, frame in enumerate(clip):
            frame[height // 4 : height // 2, 2 * place : 2 * place + width // 4] = (220, 60, 20)
        write_clip(folder / f"{number}.mp4", clip, 8)
        lines.append(json.dumps({"file_name": f"{number}.mp4", "text": f"{TRIGGER} jumping {scene}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_model(Path(sys.argv[2]), sys.argv[1])
