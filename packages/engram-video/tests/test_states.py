"""The edit of the text states, as the pipelines of Wan read them."""

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from video_builders import LENGTH, TRIGGER, encode, make_adapter, tokenizer

from engram_core import IncompatibleAdaptersError, Matcher, Residual
from engram_video import list_engrams, load_engram, set_strength, unload_engrams

PROMPTS = [f"a photo of {TRIGGER} in the snow", "a red ball", f"{TRIGGER} jumping", f"a red {TRIGGER}, a {TRIGGER}"]


def reference(base, adapter, prompts, strength=1.0):
    """The states that NumPy's arithmetic gives, padding zero."""
    found = tokenizer()(prompts, padding="max_length", max_length=LENGTH, return_tensors="np")
    lengths = found["attention_mask"].sum(axis=1)
    with torch.no_grad():
        ids, mask = (torch.from_numpy(found[name]) for name in ("input_ids", "attention_mask"))
        states = base.text_encoder(ids, mask)[0].numpy()
    matches = Matcher(adapter, "umt5").match(found["input_ids"])
    edited = Residual(adapter, "umt5").apply(states, matches, strength=strength, lengths=lengths)
    return edited * found["attention_mask"][..., None]


@pytest.mark.parametrize("overlap", ["mean", "sum"])
@pytest.mark.parametrize("strength", [1.0, 0.4, -1.0])
def test_states_are_those_of_the_reference(base, pipeline, overlap, strength):
    adapter = make_adapter(TRIGGER, "mira voss", overlap=overlap)
    load_engram(pipeline, adapter, strength=strength)
    expected = reference(base, adapter, PROMPTS, strength)
    found = encode(pipeline, *PROMPTS).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(found[0] - encode(base, *PROMPTS).numpy()[0]).max() > 0.1


def test_how_much_padding_there_is_does_not_matter(pipeline):
    load_engram(pipeline, make_adapter())
    with torch.no_grad():
        short = pipeline.encode_prompt(PROMPTS[:1], do_classifier_free_guidance=False, max_sequence_length=14)[0]
    torch.testing.assert_close(short, encode(pipeline, PROMPTS[0])[:, :14], atol=1e-5, rtol=1e-5)


def test_rows_without_trigger_keep_their_bytes(base, pipeline):
    load_engram(pipeline, make_adapter())
    found, plain = encode(pipeline, *PROMPTS), encode(base, *PROMPTS)
    assert found[1].numpy().tobytes() == plain[1].numpy().tobytes()
    assert not torch.equal(found[0], plain[0])


def draw(pipeline, prompt, **options):
    options = {"width": 32, "height": 32, "num_frames": 5, "num_inference_steps": 2, "output_type": "np"} | options
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt, generator=generator, max_sequence_length=LENGTH, **options).frames[0]


def test_without_trigger_a_clip_is_the_base_models_byte_for_byte(base, pipeline, one_thread):
    load_engram(pipeline, make_adapter())
    assert draw(pipeline, "a red ball").tobytes() == draw(base, "a red ball").tobytes()
    assert draw(pipeline, TRIGGER).tobytes() != draw(base, TRIGGER).tobytes()
    set_strength(pipeline, TRIGGER, 0.0)
    assert draw(pipeline, TRIGGER).tobytes() == draw(base, TRIGGER).tobytes()
    unload_engrams(pipeline)
    assert not pipeline.text_encoder._forward_hooks


def test_the_pipeline_that_makes_clips_of_pictures_reads_the_same_states(base, pipeline):
    animating = WanImageToVideoPipeline(**pipeline.components, expand_timesteps=True)
    load_engram(animating, make_adapter(), name="one")
    assert [one.name for one in list_engrams(animating)] == ["one"]
    options = {"do_classifier_free_guidance": False, "max_sequence_length": LENGTH}
    with torch.no_grad():
        found = animating.encode_prompt([TRIGGER], **options)[0]
    assert torch.equal(found, encode(pipeline, TRIGGER))  # they share the encoder
    assert not torch.equal(found, encode(base, TRIGGER))


def test_adapters_of_pictures_are_refused(pipeline):
    adapter = make_adapter()
    object.__setattr__(adapter.manifest, "backbone", "sd15")
    with pytest.raises(IncompatibleAdaptersError, match=r"was made for sd15, this is wan22 \(Wan 2.2\)"):
        load_engram(pipeline, adapter)
