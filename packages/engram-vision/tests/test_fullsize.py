"""The published models at their real sizes, without weights: shapes alone are computed."""

import pytest
import torch
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
from vision_published import CLIP_G, CLIP_L, SD15_UNET, SD35_LARGE, SD35_MEDIUM, SDXL_UNET, T5_XXL

from engram_vision.conditions import Conditioner
from engram_vision.families import FAMILIES, PENULTIMATE, SD15, SD35, SDXL

META = torch.device("meta")

ENCODERS = {
    "sd15": {"clip_l": CLIP_L},
    "sdxl": {"clip_l": CLIP_L, "clip_g": CLIP_G},
    "sd35": {"clip_l": CLIP_L, "clip_g": CLIP_G, "t5": T5_XXL},
}
POOLED = {"CLIPTextModelWithProjection"}

DENOISERS = {
    "sd15": (SD15, UNet2DConditionModel, SD15_UNET, 859_520_964),
    "sdxl": (SDXL, UNet2DConditionModel, SDXL_UNET, 2_567_463_684),
    "sd35-medium": (SD35, SD3Transformer2DModel, SD35_MEDIUM, 2_243_171_520),
    "sd35-large": (SD35, SD3Transformer2DModel, SD35_LARGE, 8_056_627_520),
}


def build_encoder(kind, config):
    with META:
        if kind == "T5EncoderModel":
            return T5EncoderModel(T5Config(**config))
        return {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}[kind](
            CLIPTextConfig(**config)
        )


class Pipeline:
    """What the conditions take of a pipeline."""

    tokenizer_3 = None

    def __init__(self, family, denoiser):
        setattr(self, family.denoiser, denoiser)


def text_states(family, streams, batch):
    """Return states and pooled states by stream as the encoders give them."""
    states, pooled = {}, {}
    for stream in streams:
        part = family.streams[stream]
        encoder = build_encoder(part.encoder_class, ENCODERS[family.name][stream]).eval()
        assert part.read_length(Words, encoder) == part.max_length
        ids = torch.zeros(batch, part.max_length, dtype=torch.int64, device=META)
        if part.site == PENULTIMATE:
            output = encoder(ids, output_hidden_states=True)
            states[stream] = output.hidden_states[-2]
            if part.encoder_class in POOLED:
                pooled[stream] = output.text_embeds
        else:
            states[stream] = encoder(ids)[0]
    return states, pooled


class Words:
    """A tokenizer that cuts nothing off."""

    model_max_length = 512


@pytest.mark.parametrize(
    ("name", "streams", "shapes", "joined", "pooled_width"),
    [
        ("sd15", ["clip_l"], [(2, 77, 768)], (2, 77, 768), None),
        ("sdxl", ["clip_l", "clip_g"], [(2, 77, 768), (2, 77, 1280)], (2, 77, 2048), 1280),
        ("sd35", ["clip_l", "clip_g", "t5"], [(2, 77, 768), (2, 77, 1280), (2, 256, 4096)], (2, 333, 4096), 2048),
        ("sd35", ["clip_l", "clip_g"], [(2, 77, 768), (2, 77, 1280)], (2, 333, 4096), 2048),
    ],
)
@torch.no_grad()
def test_text_states_are_joined_to_what_the_denoiser_reads(name, streams, shapes, joined, pooled_width):
    family = FAMILIES[name]
    states, pooled = text_states(family, streams, 2)
    assert [tuple(states[stream].shape) for stream in streams] == shapes
    denoiser = torch.nn.Module()
    denoiser.config = type("Config", (), {"joint_attention_dim": 4096})
    conditions = Conditioner(family, Pipeline(family, denoiser), 1024)(states, pooled)
    assert tuple(conditions["encoder_hidden_states"].shape) == joined
    if family is SD35:
        assert tuple(conditions["pooled_projections"].shape) == (2, pooled_width)
    if family is SDXL:
        added = conditions["added_cond_kwargs"]
        assert tuple(added["text_embeds"].shape) == (2, pooled_width)
        assert tuple(added["time_ids"].shape) == (2, 6)


@pytest.mark.parametrize("name", DENOISERS)
@torch.no_grad()
def test_the_denoiser_takes_its_conditions_and_gives_latents(name):
    family, kind, config, n_weights = DENOISERS[name]
    with META:
        denoiser = kind(**config).eval()
    assert sum(weight.numel() for weight in denoiser.parameters()) == n_weights
    widths = {"clip_l": 768, "clip_g": 1280, "t5": 4096}
    lengths = {stream: part.max_length for stream, part in family.streams.items()}
    states = {stream: torch.zeros(2, length, widths[stream], device=META) for stream, length in lengths.items()}
    pooled_from = [stream for stream, part in family.streams.items() if part.encoder_class in POOLED]
    pooled = {stream: torch.zeros(2, widths[stream], device=META) for stream in pooled_from}
    side, channels = config["sample_size"], 16 if family is SD35 else 4
    conditions = Conditioner(family, Pipeline(family, denoiser), side * 8)(states, pooled)
    latents = torch.zeros(2, channels, side, side, device=META)
    times = torch.zeros(2, device=META)
    guess = denoiser(latents, timestep=times, **conditions).sample
    assert guess.shape == latents.shape
