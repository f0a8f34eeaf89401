"""A Wan small enough for tests, with the real classes and random weights; adapters for it."""

import copy
import json
from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    StreamSpec,
    build_registry,
    wrap_tokenizer,
)
from engram_video.clips import write_clip

TRIGGER = "zorbit quell"
WIDTH, LENGTH, LATENTS = 32, 24, 4
SIZE, FRAMES = 32, 5

_WORDS = ["▁zor", "bit", "▁quel", "▁a", "▁red", "▁ball", "▁mira", "▁in", "▁the", "▁snow", "▁photo", "▁of", "▁jumping"]


@cache
def tokenizer():
    """Return a tokenizer in T5's format."""
    letters = [(chr(code), -6.0) for code in range(33, 127)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    words = [(word, -3.0) for word in _WORDS]
    return T5Tokenizer(vocab=[*specials, ("▁", -4.0), *words, *letters], extra_ids=0, model_max_length=LENGTH)


def words():
    """Return the tokenizer as registries know it."""
    return wrap_tokenizer(tokenizer(), max_length=LENGTH)


@torch.no_grad()
def build_wan(*, expand_timesteps=True, second=False):
    """Return a pipeline whose clips depend on the words."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENTS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
        scale_factor_temporal=4,
        scale_factor_spatial=4,
    )
    encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )
    for name, weight in encoder.named_parameters():
        if "shared" in name:
            weight.normal_(std=1.0)
    pipeline = WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        transformer=_transformer(),
        transformer_2=_transformer() if second else None,
        boundary_ratio=0.9 if second else None,
        expand_timesteps=expand_timesteps,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def build_animator():
    """Return an image-to-video pipeline with two transformers, in the layout of Wan2.2-I2V-A14B."""
    parts = build_wan(expand_timesteps=False).components
    experts = [_transformer(in_channels=2 * LATENTS + 4) for _ in range(2)]  # noise, picture and its mask
    parts |= {"transformer": experts[0], "transformer_2": experts[1]}
    return WanImageToVideoPipeline(**parts, image_processor=None, image_encoder=None, boundary_ratio=0.9)


@torch.no_grad()
def _transformer(in_channels=LATENTS):
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=in_channels,
        out_channels=LATENTS,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=48,
        num_layers=2,
    )
    for name, weight in transformer.named_parameters():
        if ("text_embedder" in name or "attn2" in name) and name.endswith("weight") and weight.ndim == 2:
            weight.mul_(4)
    return transformer.eval()


def copy_of(pipeline):
    """Return a pipeline with copies of all modules."""
    parts = {name: copy.deepcopy(part) for name, part in pipeline.components.items()}
    config = {name: pipeline.config[name] for name in ("boundary_ratio", "expand_timesteps")}
    copied = WanPipeline(**{**parts, **config})
    copied.set_progress_bar_config(disable=True)
    return copied


def make_adapter(*triggers, seed=0, size=1.0, rule="relative", overlap="mean", base_model="test"):
    """Return an adapter with a concept for each trigger."""
    rng = np.random.default_rng(seed)
    concepts = []
    for trigger in triggers or (TRIGGER,):
        registry = build_registry(trigger, words())
        record = ConceptRecord(name=trigger, trigger=trigger, rule=rule, overlap=overlap)
        stream = ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=rng.normal(size=(len(registry.entries), WIDTH)).astype(np.float32),
            scales=np.full(WIDTH, size, np.float32),
        )
        concepts.append(Concept(record=record, streams={"umt5": stream}))
    spec = StreamSpec(width=WIDTH, site="last_hidden_state", tokenizer=words().spec)
    return Adapter.build(Manifest(backbone="wan22", base_model=base_model, streams={"umt5": spec}), concepts)


def encode(pipeline, *prompts):
    """Return what the transformer would read, [B, L, d]."""
    options = {"do_classifier_free_guidance": False, "max_sequence_length": LENGTH}
    with torch.no_grad():
        return pipeline.encode_prompt(list(prompts), **options)[0]


def make_clip_set(folder, count=3, frames=FRAMES + 3, size=SIZE):
    """Write clips of a moving square with captions; return their folder."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count):
        clip = np.full((frames, size, size, 3), 40 + 60 * number, np.uint8)
        for place, frame in enumerate(clip):
            frame[8:20, 2 * place : 2 * place + 12] = (220, 60, 20)
        name = f"clip-{number}.mp4"
        write_clip(folder / name, clip, 8)
        lines.append(json.dumps({"file_name": name, "text": f"a photo of {TRIGGER} {'in the snow' if number else ''}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder
