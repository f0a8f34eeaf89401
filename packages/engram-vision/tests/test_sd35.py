"""Stable Diffusion 3.5: three streams, the layout of its prompt embedding, and pipelines without T5."""

import warnings

import pytest
import torch
from vision_builders import LENGTH, TRIGGER
from vision_families import (
    OTHER,
    POOLED_G,
    POOLED_L,
    T5_LENGTH,
    WIDTH_G,
    WIDTH_L,
    WIDTH_T5,
    as_bytes,
    assemble_family,
    copy_family,
    draw_pictures,
    edited_states,
    encode,
    family_adapter,
    family_concept,
    frozen_states,
    ids_in,
    joined,
    parts_of,
    registry_of,
    words_of,
)

from engram_vision.conditions import Conditioner, prompt_length
from engram_vision.drawing import Drawing, draw, find_silent
from engram_vision.families import SD35, family_of
from engram_vision.hooks import attached
from engram_vision.loading import list_engrams, load_engram, pipeline_tokenizers, unload_engrams
from engram_vision.models import check_pipeline, load_pipeline
from engram_vision.training.frozen import TextReader

PROMPTS = [f"a photo of {TRIGGER} in the snow", "a red ball", TRIGGER.title()]


@pytest.fixture
def base(base_of):
    return base_of("sd35")


@pytest.fixture
def pipeline(base):
    return copy_family(base)


def without_t5(pipeline, *, tokenizer=False):
    """Return a pipeline of the same parts that lacks T5's encoder, and its tokenizer unless that is asked for."""
    parts = parts_of(pipeline) | {"text_encoder_3": None}
    return assemble_family("sd35", **parts | ({} if tokenizer else {"tokenizer_3": None}))


# Layout


def test_the_prompt_embedding_is_the_clips_beside_each_other_then_zeros_then_t5_below(base, pipeline):
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    found = encode(pipeline, PROMPTS)
    prompt = found["prompt"].numpy()
    assert prompt.shape == (3, LENGTH + T5_LENGTH, WIDTH_T5)
    assert found["pooled"].shape == (3, POOLED_L + POOLED_G)
    top, below = prompt[:, :LENGTH], prompt[:, LENGTH:]
    for stream, part in {
        "clip_l": top[..., :WIDTH_L],
        "clip_g": top[..., WIDTH_L : WIDTH_L + WIDTH_G],
        "t5": below,
    }.items():
        assert part.tobytes() == edited_states(base, stream, PROMPTS, adapter).tobytes()
        assert part.tobytes() != frozen_states(base, stream, PROMPTS)[0].tobytes()
    assert not top[..., WIDTH_L + WIDTH_G :].any()


def test_streams_cut_the_trigger_each_in_its_own_way():
    clip, t5 = registry_of("clip_l", TRIGGER), registry_of("t5", TRIGGER)
    assert [words_of("clip_l").show(variant.ids) for variant in clip.variants] == [["zor", "bit</w>", "qu", "ell</w>"]]
    assert words_of("t5").show(t5.variants[0].ids) == ["▁zor", "bit", "▁quel", "l"]
    assert len(t5.variants) > 1


def test_capitals_count_for_t5_alone(base, pipeline):
    odd = "zORBIT quell"
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    found = encode(pipeline, odd)["prompt"].numpy()
    frozen = encode(base, odd)["prompt"].numpy()
    assert found[:, :LENGTH].tobytes() != frozen[:, :LENGTH].tobytes()
    assert found[:, LENGTH:].tobytes() == frozen[:, LENGTH:].tobytes()
    (sentence,) = find_silent(base, adapter, [odd])
    assert "does not fire in t5" in sentence


# Without T5


@pytest.mark.parametrize("tokenizer", [False, True])
def test_a_pipeline_without_t5_warns_and_edits_the_clips(base, tokenizer):
    pipeline = without_t5(copy_family(base), tokenizer=tokenizer)
    adapter = family_adapter(base, label="cat.safetensors")
    check_pipeline(SD35, pipeline, "m")
    assert list(pipeline_tokenizers(pipeline)) == ["clip_l", "clip_g"]
    with pytest.warns(UserWarning, match=r"cat.safetensors: its stream 't5' is left out.*no text_encoder_3") as told:
        load_engram(pipeline, adapter)
    assert len(told) == 1
    assert told[0].filename == __file__
    states = {stream: edited_states(base, stream, PROMPTS, adapter) for stream in ("clip_l", "clip_g")}
    assert encode(pipeline, PROMPTS)["prompt"].numpy().tobytes() == joined(SD35, states).tobytes()
    plain = without_t5(base, tokenizer=tokenizer)
    same = [
        one == other for one, other in zip(*(draw_pictures(each, PROMPTS) for each in (pipeline, plain)), strict=True)
    ]
    assert same == [False, True, False]
    unload_engrams(pipeline)
    assert as_bytes(encode(pipeline, PROMPTS)) == as_bytes(encode(plain, PROMPTS))


def test_an_adapter_without_a_t5_stream_needs_none(base):
    pipeline = without_t5(copy_family(base))
    adapter = family_adapter(pipeline)
    assert list(adapter.streams) == ["clip_g", "clip_l"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_engram(pipeline, adapter)
    whole = copy_family(base)
    load_engram(whole, adapter)
    assert attached(whole.text_encoder_3) is None
    states = {stream: edited_states(base, stream, PROMPTS, adapter) for stream in SD35.streams}
    assert encode(whole, PROMPTS)["prompt"].numpy().tobytes() == joined(SD35, states).tobytes()


@pytest.mark.parametrize("tokenizer", [False, True])
def test_training_without_t5_reads_what_such_a_pipeline_reads(base, tokenizer):
    pipeline = without_t5(base, tokenizer=tokenizer)
    texts = PROMPTS
    words = pipeline_tokenizers(pipeline)
    frozen = {name: TextReader(SD35, pipeline, name, words[name], torch.device("cpu")).read(texts) for name in words}
    conditions = Conditioner(SD35, pipeline, 32)(
        {name: found.states for name, found in frozen.items()}, {name: found.pooled for name, found in frozen.items()}
    )
    found = pipeline.encode_prompt(texts, None, None, "cpu", max_sequence_length=prompt_length(pipeline))
    assert torch.equal(conditions["encoder_hidden_states"], found[0])
    assert torch.equal(conditions["pooled_projections"], found[2])
    assert prompt_length(pipeline) == (T5_LENGTH if tokenizer else 256)


def test_t5_may_be_left_out_when_loading(folder_of, base):
    pipeline = load_pipeline(SD35, str(folder_of("sd35")), without=("t5",))
    assert pipeline.text_encoder_3 is None
    assert prompt_length(pipeline) == T5_LENGTH  # the tokenizer stays and tells it
    expected = without_t5(base, tokenizer=True)
    # Weights that lie elsewhere in memory may give sums of another order.
    for name, value in encode(pipeline, PROMPTS).items():
        torch.testing.assert_close(value, encode(expected, PROMPTS)[name])
    drawings = [Drawing(prompt=TRIGGER, seed=1)]
    pictures = [draw(one, drawings, steps=2, guidance=3.0)[0].size for one in (pipeline, expected)]
    assert pictures == [(32, 32)] * 2


def test_a_pipeline_without_t5_shares_its_clips_with_one_that_has_it(base, pipeline):
    half = without_t5(pipeline)
    adapter = family_adapter(base)
    encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]

    def attachments():
        return [attached(encoder) is not None for encoder in encoders]

    load_engram(pipeline, adapter, name="one")
    assert [one.name for one in list_engrams(half)] == ["one"]
    assert attachments() == [True] * 3
    unload_engrams(half)
    assert attachments() == [False] * 3
    assert list_engrams(pipeline) == ()
    assert not any(encoder._forward_hooks for encoder in encoders)
    with pytest.warns(UserWarning, match="'t5' is left out"):
        load_engram(half, adapter, name="one")
    assert attachments() == [True, True, False]
    load_engram(pipeline, family_adapter(base, family_concept(base, OTHER)), name="two")
    assert attachments() == [True] * 3
    both = family_adapter(base, *adapter.concepts(), family_concept(base, OTHER))
    texts = [*PROMPTS, OTHER]
    states = {stream: edited_states(base, stream, texts, both) for stream in SD35.streams}
    assert encode(pipeline, texts)["prompt"].numpy().tobytes() == joined(SD35, states).tobytes()
    unload_engrams(half, "one", "two")
    assert attachments() == [False] * 3
    assert as_bytes(encode(pipeline, texts)) == as_bytes(encode(base, texts))


# T5


def test_t5_reads_what_the_pipeline_says_and_triggers_beyond_that_stay_silent(base, pipeline):
    adapter = family_adapter(base, family_concept(base, streams=["t5"]))
    load_engram(pipeline, adapter)
    text = f"a red ball in the snow {TRIGGER}"
    assert ids_in(base, "t5", [text]).shape == (1, T5_LENGTH)
    for length, differs in ((T5_LENGTH, True), (12, True), (9, False)):
        found, frozen = (encode(one, text, max_sequence_length=length)["prompt"].numpy() for one in (pipeline, base))
        assert found.shape == (1, LENGTH + length, WIDTH_T5)
        assert (found.tobytes() != frozen.tobytes()) == differs


def test_t5_keeps_its_types(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    ids = ids_in(base, "t5", PROMPTS)
    with torch.no_grad():
        for options in ({}, {"return_dict": False}):
            found, frozen = (one.text_encoder_3(ids, **options) for one in (pipeline, base))
            assert type(found) is type(frozen)
            assert len(found) == len(frozen) == 1
            assert [torch.equal(*pair) for pair in zip(found[0], frozen[0], strict=True)] == [False, True, False]


def test_the_family_is_that_of_any_pipeline_with_three_encoders(base):
    assert family_of(base) is family_of(without_t5(base)) is SD35
