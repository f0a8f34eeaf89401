"""Stable Diffusion XL: two streams, pooled states of the second, and what it is told of sizes."""

import pytest
import torch
from vision_builders import SIZE, TRIGGER
from vision_families import (
    POOLED_G,
    WIDTH_G,
    WIDTH_L,
    assemble_family,
    copy_family,
    draw_pictures,
    edited_states,
    encode,
    family_adapter,
    frozen_states,
    ids_in,
    parts_of,
)

from engram_core import InputError
from engram_vision.conditions import Conditioner
from engram_vision.drawing import Drawing, draw
from engram_vision.families import SDXL
from engram_vision.loading import load_engram
from engram_vision.models import check_pipeline

# The scheduler of diffusers is older than NumPy's way to copy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

PROMPTS = [f"a photo of {TRIGGER} in the snow", "a red ball", TRIGGER]


@pytest.fixture
def base(base_of):
    return base_of("sdxl")


@pytest.fixture
def pipeline(base):
    return copy_family(base)


def test_the_prompt_embedding_is_the_two_clips_beside_each_other(base, pipeline):
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    found = encode(pipeline, PROMPTS)
    prompt = found["prompt"].numpy()
    assert prompt.shape[2] == WIDTH_L + WIDTH_G
    assert found["pooled"].shape == (3, POOLED_G)
    assert found["pooled"].numpy().tobytes() == frozen_states(base, "clip_g", PROMPTS)[1].tobytes()
    for stream, part in {"clip_l": prompt[..., :WIDTH_L], "clip_g": prompt[..., WIDTH_L:]}.items():
        assert part.tobytes() == edited_states(base, stream, PROMPTS, adapter).tobytes()


def test_padding_differs_between_the_streams_and_never_fires(base, pipeline):
    assert ids_in(base, "clip_l", [""])[0, -1] != ids_in(base, "clip_g", [""])[0, -1]
    load_engram(pipeline, family_adapter(base))
    found, frozen = (encode(one, PROMPTS)["prompt"] for one in (pipeline, base))
    changed = (found != frozen).any(dim=-1)
    assert changed.sum(dim=1).tolist() == [4, 0, 4]


@pytest.mark.parametrize(("size", "batch"), [(32, 1), (64, 3)])
def test_training_tells_the_sizes_that_the_pipeline_tells(base, size, batch):
    states = {"clip_l": torch.zeros(batch, 3, WIDTH_L), "clip_g": torch.zeros(batch, 3, WIDTH_G)}
    told = Conditioner(SDXL, base, size)(states, {"clip_g": torch.zeros(batch, POOLED_G)})
    found = told["added_cond_kwargs"]["time_ids"]
    expected = base._get_add_time_ids(
        (size, size), (0, 0), (size, size), torch.float32, text_encoder_projection_dim=POOLED_G
    )
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected.expand(batch, -1))


def test_the_pipeline_hands_the_denoiser_what_training_does(base, monkeypatch):
    given = []
    forward = base.unet.forward
    monkeypatch.setattr(
        base.unet, "forward", lambda *args, **options: given.append(options) or forward(*args, **options)
    )
    draw_pictures(base, PROMPTS, guidance_scale=1.0, num_inference_steps=1)
    encoded = encode(base, PROMPTS)
    conditions = Conditioner(SDXL, base, SIZE)(
        {"clip_l": encoded["prompt"][..., :WIDTH_L], "clip_g": encoded["prompt"][..., WIDTH_L:]},
        {"clip_g": encoded["pooled"]},
    )
    assert torch.equal(given[0]["encoder_hidden_states"], conditions["encoder_hidden_states"])
    for name, value in conditions["added_cond_kwargs"].items():
        assert torch.equal(given[0]["added_cond_kwargs"][name], value)


def test_without_a_negative_prompt_the_states_are_zeros_and_stay_so(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    found = encode(pipeline, PROMPTS)
    assert not found["negative"].any()
    assert not found["negative_pooled"].any()
    drawings = [Drawing(prompt="a red ball", seed=0)]
    plain, negated = (draw(pipeline, drawings, steps=2, guidance=3.0, negative=text)[0] for text in ("", "a hat"))
    assert plain.tobytes() != negated.tobytes()
    assert draw(base, drawings, steps=2, guidance=3.0)[0].tobytes() == plain.tobytes()


def test_a_pipeline_with_one_encoder_alone_is_refused(base):
    refiner = assemble_family("sdxl", **parts_of(base) | {"text_encoder": None, "tokenizer": None})
    with pytest.raises(InputError, match="m: has no text_encoder, tokenizer; expected a whole Stable Diffusion XL"):
        check_pipeline(SDXL, refiner, "m")
    with pytest.raises(InputError, match="has no tokenizer and text_encoder"):
        load_engram(refiner, family_adapter(base))
