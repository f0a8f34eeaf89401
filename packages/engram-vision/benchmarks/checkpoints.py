"""What is measured on: models of full size with random weights, and pictures with captions.

`python checkpoints.py sd15|sd35 FOLDER` writes such a model in bfloat16; time and memory do not depend on the weights.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TRIGGER = "zorbit quell"
SCENES = ("on the beach", "in the snow", "in space", "under water", "in a meadow")

# The values of Stable Diffusion 1.5's own configuration files.
UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
VAE = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
# The values of Stable Diffusion 3.5 medium's configuration files.
TRANSFORMER = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
VAE_16 = VAE | {
    "sample_size": 1024,
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
TEXT = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 49407,
}
TEXT_G = TEXT | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def make_text_encoder() -> Any:
    """Return a text encoder of CLIP ViT-L/14's size."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig(**TEXT)).eval()


def make_second_encoder() -> Any:
    """Return a text encoder of OpenCLIP ViT-bigG/14's size, the second one of XL and 3.5."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_G)).eval()


def make_t5_encoder(layers: int) -> Any:
    """Return a text encoder of T5-XXL's width with the first of its 24 layers."""
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**T5 | {"num_layers": layers})).eval()


def write_sd15(folder: Path) -> None:
    """Write a pipeline of Stable Diffusion 1.5's size in diffusers layout: random weights, CLIP's own tokenizer."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTokenizer

    write_tokenizer(folder / "words")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    StableDiffusionPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=make_text_encoder(),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "words"),
        unet=UNet2DConditionModel(**UNET),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder / "model")


def write_sd35(folder: Path) -> None:
    """Write a pipeline of Stable Diffusion 3.5 medium's size; T5 reads with the tiny checkpoint's tokenizer."""
    import torch
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5Tokenizer,
    )

    from engram_vision.shipped import tiny_folder

    write_tokenizer(folder / "words")
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    words = CLIPTokenizer.from_pretrained(folder / "words")
    StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**TRANSFORMER),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=AutoencoderKL(**VAE_16),
        text_encoder=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT)),
        tokenizer=words,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_G)),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(T5Config(**T5)),
        tokenizer_3=T5Tokenizer.from_pretrained(tiny_folder("sd35") / "tokenizer_3", model_max_length=512),
    ).save_pretrained(folder / "model")


def write_tokenizer(folder: Path) -> None:
    """Write CLIP's tokenizer, from the vocabulary that open_clip ships."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("open_clip_torch, which ships CLIP's vocabulary, is not installed")
    archive = Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"
    merges = gzip.decompress(archive.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    # Bytes without a printable sign of their own follow, with letters from 256 on in their place.
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(256 - len(plain))]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    vocabulary = {token: number for number, token in enumerate(tokens)}
    options = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT["max_position_embeddings"]}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(options), encoding="utf-8")


def write_pictures(folder: Path, resolution: int, *, trigger: str = TRIGGER, seed: int = 0) -> None:
    """Write a data set: a picture and a caption with the trigger for each scene."""
    random = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    lines = []
    for number, scene in enumerate(SCENES):
        pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
        picture = Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BICUBIC)
        picture.save(folder / f"{number}.png")
        lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a photo of {trigger} {scene}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    {"sd15": write_sd15, "sd35": write_sd35}[sys.argv[1]](Path(sys.argv[2]))
