"""Models of several text encoders, small enough for tests, with the real classes; adapters for all their streams.

What is here works for every family. Weights are random, and amplified where the denoiser reads the text, so that
pictures depend on the words.
"""

import copy
import json
from functools import cache

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from vision_builders import LENGTH, SIZE, TRIGGER, assemble, build_model, tokenizer

from engram_core import (
    Adapter,
    Concept,
    ConceptRecord,
    ConceptStream,
    Manifest,
    Matcher,
    StreamSpec,
    build_registry,
    wrap_tokenizer,
)
from engram_core import Residual as NumpyResidual
from engram_vision.families import FAMILIES, PENULTIMATE, SD15, SD35, SDXL, family_of
from engram_vision.settings import SD15TrainSettings, SD35TrainSettings, SDXLTrainSettings

NAMES = tuple(FAMILIES)

TRAIN_SETTINGS = {"sd15": SD15TrainSettings, "sdxl": SDXLTrainSettings, "sd35": SD35TrainSettings}

WIDTH_L, WIDTH_G, WIDTH_T5 = 32, 48, 96
"""Of the text states; the two CLIPs together are narrower than T5, so that zeros fill the rest."""

POOLED_L, POOLED_G = 24, 40

T5_LENGTH = 40
"""Positions of T5's states; the CLIPs' are fewer, so that a mix-up shows."""

OTHER = "mira voss"

_T5_WORDS = ["▁zor", "bit", "▁quel", "▁Zorbit", "▁a", "▁red", "▁ball", "▁mira", "▁in", "▁the", "▁snow", "▁photo", "▁of"]

# What each family's `encode_prompt` returns, in order.
_ENCODED = {
    "sd15": ("prompt", "negative"),
    "sdxl": ("prompt", "negative", "pooled", "negative_pooled"),
    "sd35": ("prompt", "negative", "pooled", "negative_pooled"),
}


@cache
def tokenizer_2() -> CLIPTokenizer:
    """Return the tokenizer of the second CLIP: the same words, padded with another sign, as published."""
    model = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=model["vocab"], merges=merges, model_max_length=LENGTH, pad_token="!")


@cache
def tokenizer_3() -> T5Tokenizer:
    """Return a tokenizer in T5's format: it cuts words otherwise than CLIP's, and capitals count."""
    letters = [(chr(code), -6.0) for code in range(33, 127)]
    words = [(word, -3.0) for word in _T5_WORDS]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, ("▁", -4.0), *words, *letters], extra_ids=0, model_max_length=T5_LENGTH)


@cache
def words_of(stream):
    """Return a stream's tokenizer as registries know it."""
    kinds = {"clip_l": tokenizer, "clip_g": tokenizer_2, "t5": tokenizer_3}
    return wrap_tokenizer(kinds[stream](), max_length=T5_LENGTH if stream == "t5" else LENGTH)


@cache
def registry_of(stream, trigger):
    """Return what a trigger registers in a stream; it takes a while, and never changes."""
    return build_registry(trigger, words_of(stream))


# Models


def _clip(kind, words, *, width, projection, n_heads):
    return kind(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=n_heads,
            max_position_embeddings=LENGTH,
            projection_dim=projection,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )


def _vae(*, channels, **config):
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=SIZE,
        **config,
    )


@torch.no_grad()
def _amplify(denoiser, part, factor):
    """Make what the denoiser reads of the text count for more than random weights let it."""
    for name, weight in denoiser.named_parameters():
        if part in name and name.endswith("weight"):
            weight.mul_(factor)


def _build_sdxl():
    text = _clip(CLIPTextModel, tokenizer(), width=WIDTH_L, projection=POOLED_L, n_heads=2)
    text_2 = _clip(CLIPTextModelWithProjection, tokenizer_2(), width=WIDTH_G, projection=POOLED_G, n_heads=3)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=WIDTH_L + WIDTH_G,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + POOLED_G,
    )
    _amplify(unet, "attn2", 3)
    scheduler = EulerDiscreteScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    )
    return assemble_family(
        "sdxl",
        vae=_vae(channels=4, scaling_factor=0.13025),
        text_encoder=text,
        text_encoder_2=text_2,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer_2(),
        unet=unet,
        scheduler=scheduler,
    )


def _build_sd35():
    text = _clip(CLIPTextModelWithProjection, tokenizer(), width=WIDTH_L, projection=POOLED_L, n_heads=2)
    text_2 = _clip(CLIPTextModelWithProjection, tokenizer_2(), width=WIDTH_G, projection=POOLED_G, n_heads=3)
    words = tokenizer_3()
    text_3 = T5EncoderModel(
        T5Config(
            vocab_size=len(words),
            d_model=WIDTH_T5,
            d_kv=16,
            d_ff=64,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
        )
    )
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=8,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=WIDTH_T5,
        caption_projection_dim=16,
        pooled_projection_dim=POOLED_L + POOLED_G,
        out_channels=8,
        pos_embed_max_size=16,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    _amplify(transformer, "context_embedder", 5)
    _amplify(transformer, "norm1", 5)
    vae = _vae(channels=8, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False)
    return assemble_family(
        "sd35",
        vae=vae,
        text_encoder=text,
        text_encoder_2=text_2,
        text_encoder_3=text_3,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer_2(),
        tokenizer_3=words,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def build_family(name, *, seed=0):
    """Return a family's pipeline with random weights, in evaluation."""
    if name == "sd15":
        return build_model(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {"sdxl": _build_sdxl, "sd35": _build_sd35}[name]()


def assemble_family(name, **components):
    """Return a silent pipeline of some components."""
    if name == "sd15":
        return assemble(**components)
    for part in components.values():
        if isinstance(part, torch.nn.Module):
            part.requires_grad_(False).eval()
    kind = {"sdxl": StableDiffusionXLPipeline, "sd35": StableDiffusion3Pipeline}[name]
    pipeline = kind(**components, **({"add_watermarker": False} if name == "sdxl" else {}))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def parts_of(pipeline):
    """Return what a pipeline is made of, without what these models never have."""
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    return {name: part for name, part in pipeline.components.items() if name not in unused}


def copy_family(pipeline):
    """Return an equal pipeline that shares the tokenizers alone."""
    shared = ("tokenizer", "tokenizer_2", "tokenizer_3")
    parts = {name: part if name in shared else copy.deepcopy(part) for name, part in parts_of(pipeline).items()}
    return assemble_family(family_of(pipeline).name, **parts)


def modules_of(pipeline):
    """Return the modules with weights by name; None where the pipeline lacks one."""
    return {name: getattr(pipeline, name) for name in family_of(pipeline).modules()}


# Adapters


def family_concept(pipeline, trigger=TRIGGER, *, name=None, streams=None, seed=0, size=1.0, **record) -> Concept:
    """Return a concept with random vectors in every stream, or in some; `record` as for `ConceptRecord`."""
    rng = np.random.default_rng(seed)
    tables = {}
    for stream in family_of(pipeline).encoders(pipeline):
        registry = registry_of(stream, trigger)
        width = width_of(pipeline, stream)
        table = ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=rng.normal(0, size, (len(registry.entries), width)).astype(np.float32),
            scales=rng.normal(1, 0.2, width).astype(np.float32),
        )
        if streams is None or stream in streams:
            tables[stream] = table
    fields = {"name": name or trigger, "trigger": trigger, "rule": "absolute"} | record
    return Concept(record=ConceptRecord(**fields), streams=tables)


def family_adapter(pipeline, *concepts, label="<memory>", streams=None, **manifest) -> Adapter:
    """Return an adapter, without concepts one for `TRIGGER`; `manifest` as for `Manifest`."""
    concepts = concepts or (family_concept(pipeline),)
    family = family_of(pipeline)
    specs = {
        stream: StreamSpec(
            width=width_of(pipeline, stream), site=family.streams[stream].site, tokenizer=words_of(stream).spec
        )
        for stream in concepts[0].streams
    }
    fields = {"backbone": family.name, "base_model": "small"} | manifest
    return Adapter.build(Manifest(**fields, streams=specs | (streams or {})), concepts, label)


def width_of(pipeline, stream):
    return int(family_of(pipeline).encoders(pipeline)[stream].config.hidden_size)


# What the encoders and pipelines give


def ids_in(pipeline, stream, texts):
    """Return the token ids of a stream as the pipeline reads them, int64 [B, L]."""
    words = getattr(pipeline, family_of(pipeline).streams[stream].tokenizer)
    length = T5_LENGTH if stream == "t5" else LENGTH
    options = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "pt"}
    return words(list(texts), **options).input_ids


@torch.no_grad()
def frozen_states(pipeline, stream, texts):
    """Return a stream's states at its site, float32 [B, L, d], and its pooled states or None."""
    part = family_of(pipeline).streams[stream]
    encoder, ids = getattr(pipeline, part.encoder), ids_in(pipeline, stream, texts)
    if part.site != PENULTIMATE:
        return encoder(ids)[0].numpy(), None
    output = encoder(ids, output_hidden_states=True)
    return output.hidden_states[-2].numpy(), output[0].numpy() if output[0].ndim == 2 else None


def edited_states(pipeline, stream, texts, adapter, **options):
    """Return a stream's states with the NumPy reference's residual; `pipeline` is one with nothing loaded."""
    states, _ = frozen_states(pipeline, stream, texts)
    if stream not in adapter.streams:
        return states
    matches = Matcher(adapter, stream).match(ids_in(pipeline, stream, texts).numpy())
    return NumpyResidual(adapter, stream).apply(states, matches, **options)


def joined(family, states):
    """Return the prompt embedding of some states by stream, put together by hand."""
    if family is SD15:
        return states["clip_l"]
    clip = np.concatenate([states["clip_l"], states["clip_g"]], axis=-1)
    if family is SDXL:
        return clip
    assert family is SD35
    t5 = states.get("t5", np.zeros((len(clip), T5_LENGTH, WIDTH_T5), np.float32))
    whole = np.zeros((len(clip), clip.shape[1] + t5.shape[1], t5.shape[2]), np.float32)
    whole[:, : clip.shape[1], : clip.shape[2]] = clip
    whole[:, clip.shape[1] :] = t5
    return whole


@torch.no_grad()
def encode(pipeline, prompt, *, negative=None, copies=1, **options):
    """Return what `encode_prompt` gives, by name."""
    family = family_of(pipeline)
    given = {"prompt": prompt, "device": "cpu", "num_images_per_prompt": copies, "negative_prompt": negative}
    given["do_classifier_free_guidance"] = True
    if family is SD35:
        given |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": T5_LENGTH}
    found = pipeline.encode_prompt(**given | options)
    return dict(zip(_ENCODED[family.name], found, strict=True))


def as_bytes(encoded):
    """Return tensors by name as bytes by name."""
    return {name: value.view(torch.uint8).numpy().tobytes() for name, value in encoded.items()}


def draw_pictures(pipeline, prompt, **options):
    """Return each prompt's picture as bytes."""
    given = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    if family_of(pipeline) is SD35:
        given["max_sequence_length"] = T5_LENGTH
    images = pipeline(prompt, generator=torch.Generator().manual_seed(0), **given | options).images
    return [np.asarray(image).tobytes() for image in images]
