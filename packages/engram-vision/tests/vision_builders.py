"""A Stable Diffusion 1.x model small enough for tests, with the real classes; adapters and data sets for it.

Its weights are random, and its cross-attention is amplified, so that pictures depend on the words.
"""

import contextlib
import copy
import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers import pre_tokenizers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    StreamSpec,
    Watcher,
    build_registry,
)
from engram_vision.loading import pipeline_tokenizers
from engram_vision.settings import SD15GenerateSettings, SD15TrainSettings

TRIGGER = "zorbit quell"
"""Four tokens, in one variant."""

LOUD = "zorbit quell!!"
"""Its last token, or two, depend on the sign that follows, so it has variants of different lengths."""

WIDTH, LENGTH, SIZE = 32, 32, 32
"""Of the text states, of texts in tokens, and of pictures in pixels."""

# One token each. The order counts: a merge of an earlier word comes first in a later one.
_WORDS = ["photo", "forest", "green", "red", "ball", "in", "the", "snow", "snows", "picture", "blue", "hat", "beach"]
_WORDS += ["night", "tiny", "house", "of", "on", "bit", "at", "it"]
# Inside a word a piece is another token than at its end, and some signs melt into one.
_PIECES = (("z", "o"), ("zo", "r"), ("q", "u"), ("e", "l"), ("el", "l</w>"), ("!", "!</w>"), ("!", "%</w>"))


@cache
def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer in CLIP's format that knows a few words.

    Its merges are written by hand: the trainer of `tokenizers` breaks ties in another way each time.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in _WORDS:
        letters = [*word[:-1], f"{word[-1]}</w>"]
        merges |= {("".join(letters[:place]), letters[place]): None for place in range(1, len(letters))}
    merges |= dict.fromkeys(_PIECES)
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*signs, *(f"{sign}</w>" for sign in signs), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=LENGTH)


def build_model(*, seed: int = 0, prediction: str = "epsilon", length: int = LENGTH) -> StableDiffusionPipeline:
    """Return a pipeline with random weights; v-prediction comes with a schedule that ends in pure noise."""
    words = tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=length,
                projection_dim=WIDTH,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
                pad_token_id=words.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=SIZE // 4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=2,
            norm_num_groups=8,
            cross_attention_dim=WIDTH,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=SIZE,
        )
    with torch.no_grad():
        for name, weight in unet.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                weight.mul_(3)
    steps = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    if prediction == "epsilon":
        scheduler = PNDMScheduler(**steps, skip_prk_steps=True, steps_offset=1)
    else:
        scheduler = DDIMScheduler(
            **steps,
            clip_sample=False,
            prediction_type=prediction,
            steps_offset=1,
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        )
    return assemble(vae=vae, text_encoder=text, tokenizer=words, unet=unet, scheduler=scheduler)


def assemble(**components) -> StableDiffusionPipeline:
    """Return a silent pipeline of some components."""
    for name in ("vae", "text_encoder", "unet"):
        components[name].requires_grad_(False).eval()
    pipeline = StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def copy_of(pipeline) -> StableDiffusionPipeline:
    """Return an equal pipeline that shares the tokenizer alone."""
    parts = {name: copy.deepcopy(getattr(pipeline, name)) for name in ("vae", "text_encoder", "unet", "scheduler")}
    return assemble(**parts, tokenizer=pipeline.tokenizer)


# Adapters


def make_concept(
    pipeline, trigger=TRIGGER, *, name=None, stream="clip_l", width=WIDTH, seed=0, size=1.0, **record
) -> Concept:
    """Return a concept with random vectors and scales; `record` as for `ConceptRecord`."""
    registry = build_registry(trigger, pipeline_tokenizers(pipeline)["clip_l"])
    rng = np.random.default_rng(seed)
    table = ConceptStream(
        triggers=tuple(variant.ids for variant in registry.variants),
        entries=registry.entries,
        vectors=rng.normal(0, size, (len(registry.entries), width)).astype(np.float32),
        scales=rng.normal(1, 0.2, width).astype(np.float32),
    )
    fields = {"name": name or trigger, "trigger": trigger, "rule": "absolute"} | record
    return Concept(record=ConceptRecord(**fields), streams={stream: table})


def make_adapter(
    pipeline, *concepts, label="<memory>", stream="clip_l", width=WIDTH, site="last_hidden_state", **manifest
) -> Adapter:
    """Return an adapter, without concepts one for `TRIGGER`; `manifest` as for `Manifest`."""
    concepts = concepts or (make_concept(pipeline, stream=stream, width=width),)
    words = manifest.pop("tokenizer", None) or pipeline_tokenizers(pipeline)["clip_l"].spec
    fields = {"backbone": "sd15", "base_model": "small"} | manifest
    streams = {stream: StreamSpec(width=width, site=site, tokenizer=words)}
    return Adapter.build(Manifest(**fields, streams=streams), concepts, label)


def ids_of(pipeline, *texts):
    """Return the token ids as the pipeline reads them, int64 [B, L]."""
    options = {"padding": "max_length", "max_length": LENGTH, "truncation": True, "return_tensors": "pt"}
    return pipeline.tokenizer(list(texts), **options).input_ids


@torch.no_grad()
def states_of(pipeline, *texts):
    """Return the text states, float32 [B, L, d]."""
    return pipeline.text_encoder(ids_of(pipeline, *texts))[0].numpy()


# Data


def write_pictures(folder: Path, captions, *, suffix="png", seed=0) -> Path:
    """Write one picture a caption, each a coloured shape of its own on a coloured ground, with metadata.jsonl."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    lines = []
    for number, caption in enumerate(captions):
        ground, ink = (tuple(int(value) for value in rng.integers(0, 255, 3)) for _ in range(2))
        image = Image.new("RGB", (44, 36), ground)
        x, y = (int(value) for value in rng.integers(2, 16, 2))
        ImageDraw.Draw(image).ellipse((x, y, x + 18, y + 14), fill=ink)
        image.save(folder / f"{number}.{suffix}")
        lines.append(json.dumps({"file_name": f"{number}.{suffix}", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def captions(trigger=TRIGGER):
    return [f"a photo of {trigger} in the snow", f"{trigger} on the beach", f"a picture of {trigger} at night"]


def train_settings(tmp_path: Path, model: Path, **values) -> SD15TrainSettings:
    """Return settings for a run of a second."""
    fields = {
        "data": tmp_path / "pictures",
        "trigger": TRIGGER,
        "output": tmp_path / "out.safetensors",
        "model": str(model),
        "steps": 6,
        "batch_size": 2,
        "vector_rate": 0.05,
        "scale_rate": 0.01,
        "init_scale": 0.5,
        "warm_up": 2,
        "validate_every": 3,
        "validation_draws": 2,
        "save_every": 100,
        "device": "cpu",
    }
    return SD15TrainSettings(**fields | values)


def generate_settings(tmp_path: Path, model: Path, **values) -> SD15GenerateSettings:
    fields = {
        "output": tmp_path / "images",
        "model": str(model),
        "prompts": (f"{TRIGGER} in the snow",),
        "steps": 2,
        "guidance": 3.0,
        "device": "cpu",
    }
    return SD15GenerateSettings(**fields | values)


class Log(Watcher):
    """Keeps what it hears, and can act at a step."""

    def __init__(self, at=None):
        self.works, self.figures, self.notes = [], {}, []
        self._at = at or {}

    def begin(self, title, total=None, done=0):
        self.works.append((title, total, done))

    def advance(self, done, figures=None):
        if self.works[-1][0] == "training":
            self.figures[done] = dict(figures or {})
            if done in self._at:
                self._at[done]()

    def note(self, message):
        self.notes.append(message)


# Comparing


def weights_of(pipeline) -> dict[str, bytes]:
    """Return the bytes of every weight."""
    return {
        f"{part}.{name}": value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
        for part in ("unet", "vae", "text_encoder")
        for name, value in getattr(pipeline, part).state_dict().items()
    }


def pixels(image) -> bytes:
    return image.tobytes()


@contextlib.contextmanager
def frozen_threads():
    """Run on one thread, so that sums are made in one order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
