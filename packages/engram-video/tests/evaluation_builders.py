"""A CLIP small enough for tests, reference pictures, and clips whose figures are known."""

import numpy as np
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from video_builders import LENGTH, SIZE, tokenizer

from engram_vision.quiet import quiet_libraries

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_clip_model(folder):
    """Write a model that reads pictures and words; return its folder's name."""
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    words = {**_SMALL, **ids, "vocab_size": len(tokenizer()), "max_position_embeddings": LENGTH}
    look = {**_SMALL, "image_size": SIZE, "patch_size": 8}
    with quiet_libraries():
        CLIPModel(CLIPConfig(text_config=words, vision_config=look, projection_dim=12)).save_pretrained(folder)
        CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}).save_pretrained(
            folder
        )
        tokenizer().save_pretrained(folder)
    return str(folder)


def picture(size=SIZE):
    """Return a picture of a square on a ground."""
    pixels = np.full((size, size, 3), (40, 90, 160), np.uint8)
    pixels[size // 4 : size // 2, size // 4 : size // 2] = (220, 60, 20)
    return pixels


def save_references(folder, count=1):
    """Write reference pictures, all alike."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(picture()).save(folder / f"{number}.png")
    return folder


def still(count=9):
    """Return the reference picture as a clip, [F, H, W, 3]."""
    return np.repeat(picture()[None], count, axis=0)


def fading(count=9):
    """Return a clip in which the reference picture turns into noise."""
    noise = np.random.default_rng(0).integers(0, 256, picture().shape)
    shares = np.linspace(0, 1, count)[:, None, None, None]
    return (picture() * (1 - shares) + noise * shares).round().astype(np.uint8)


def moving(count=5, size=64, step=2):
    """Return a clip of a textured square that goes to the right over a textured ground."""
    rng = np.random.default_rng(0)
    ground, square = (
        np.asarray(
            Image.fromarray(rng.integers(low, high, (side // 4, side // 4, 3), dtype=np.uint8)).resize(
                (side, side), Image.Resampling.BICUBIC
            )
        )
        for low, high, side in ((0, 100, size), (100, 256, size // 2))
    )
    clip = np.repeat(ground[None], count, axis=0)
    for number, frame in enumerate(clip):
        start = 4 + step * number
        frame[size // 4 : size // 4 + size // 2, start : start + size // 2] = square
    return clip
