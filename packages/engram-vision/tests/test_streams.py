"""Models of several text encoders: each stream is edited as the reference says, and only what the denoiser reads."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from vision_builders import LENGTH, TRIGGER, make_adapter, make_concept
from vision_families import (
    OTHER,
    T5_LENGTH,
    as_bytes,
    copy_family,
    draw_pictures,
    edited_states,
    encode,
    family_adapter,
    family_concept,
    ids_in,
    joined,
    modules_of,
    parts_of,
    registry_of,
    width_of,
    words_of,
)

from engram_core import IncompatibleAdaptersError, InputError
from engram_vision.conditions import Conditioner
from engram_vision.drawing import find_silent
from engram_vision.families import FAMILIES, SD35, SDXL, family_of
from engram_vision.hooks import TextEdit, attach, attached, detach
from engram_vision.loading import check_base, list_engrams, load_engram, pipeline_tokenizers, unload_engrams
from engram_vision.models import check_pipeline, load_pipeline
from engram_vision.training.frozen import TextReader

PROMPTS = [f"a photo of {TRIGGER} in the snow", "a red ball", f"{OTHER}, {TRIGGER.title()}", ""]
EXACT = ["absolute", "absolute-tanh"]
"""Rules that take nothing from the states, so that the two implementations agree in every bit."""

# The scheduler of diffusers is older than NumPy's way to copy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(params=["sdxl", "sd35"])
def base(request, base_of):
    return base_of(request.param)


@pytest.fixture
def pipeline(base):
    return copy_family(base)


def streams_of(pipeline):
    return list(family_of(pipeline).encoders(pipeline))


def expected_prompt(base, adapter, texts, **options):
    """Return the prompt embedding that the reference gives, put together by hand."""
    states = {stream: edited_states(base, stream, texts, adapter, **options) for stream in streams_of(base)}
    return joined(family_of(base), states)


# Families


def test_a_pipeline_tells_its_family_streams_and_parts(base):
    family = family_of(base)
    assert family is FAMILIES[family.name] is {"sdxl": SDXL, "sd35": SD35}[family.name]
    assert family.encoders(base) == {stream: getattr(base, part.encoder) for stream, part in family.streams.items()}
    found = {name: type(module).__name__ for name, module in modules_of(base).items()}
    assert found == {name: kind for name, (_, kind) in family.modules().items()}
    check_pipeline(family, base, "m")


def test_a_saved_model_gives_its_weights_back(base, folder_of):
    family = family_of(base)
    loaded = modules_of(load_pipeline(family, str(folder_of(family.name))))
    for name, module in modules_of(base).items():
        expected = module.state_dict()
        assert loaded[name].state_dict().keys() == expected.keys()
        assert all(torch.equal(value, expected[key]) for key, value in loaded[name].state_dict().items())


def test_every_stream_has_a_registry_of_its_own_tokenizer(base):
    family, words = family_of(base), pipeline_tokenizers(base)
    assert list(words) == list(family.streams)
    for stream, part in family.streams.items():
        own = getattr(base, part.tokenizer)
        ids = tuple(own(TRIGGER, add_special_tokens=False).input_ids)
        assert words[stream].spec == words_of(stream).spec
        assert ids in [variant.ids for variant in registry_of(stream, TRIGGER).variants]
        assert words[stream].max_tokens == (T5_LENGTH - 1 if stream == "t5" else LENGTH - 2)


# States


@pytest.mark.parametrize("strength", [1.0, -0.5])
@pytest.mark.parametrize("overlap", ["sum", "mean"])
@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_the_prompt_embedding_is_the_references_of_every_stream_joined_by_hand(base, pipeline, rule, overlap, strength):
    adapter = family_adapter(base, family_concept(base, rule=rule, overlap=overlap))
    load_engram(pipeline, adapter, strength=strength)
    found = encode(pipeline, PROMPTS)["prompt"].numpy()
    expected = expected_prompt(base, adapter, PROMPTS, strength=strength)
    assert np.abs(found - encode(base, PROMPTS)["prompt"].numpy()).max() > 0.05
    if rule in EXACT:
        assert found.tobytes() == expected.tobytes()
    else:
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_each_stream_may_be_edited_alone(base):
    for stream in streams_of(base):
        pipeline = copy_family(base)
        adapter = family_adapter(base, family_concept(base, streams=[stream]))
        load_engram(pipeline, adapter)
        found = encode(pipeline, PROMPTS)["prompt"].numpy()
        assert found.tobytes() == expected_prompt(base, adapter, PROMPTS).tobytes()
        assert found.tobytes() != encode(base, PROMPTS)["prompt"].numpy().tobytes()


def test_pooled_states_keep_their_bytes_while_the_trigger_fires(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    negative = [TRIGGER] * len(PROMPTS)
    found, frozen = (as_bytes(encode(one, PROMPTS, negative=negative)) for one in (pipeline, base))
    assert [name for name in found if found[name] == frozen[name]] == ["pooled", "negative_pooled"]


def test_rows_without_a_trigger_keep_their_bytes_in_a_mixed_batch(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    found, frozen = (encode(one, PROMPTS)["prompt"].numpy() for one in (pipeline, base))
    assert [one.tobytes() == other.tobytes() for one, other in zip(found, frozen, strict=True)] == [False, True] * 2
    outside = ~(found != frozen).any(axis=-1)
    assert found[outside].tobytes() == frozen[outside].tobytes()


def test_the_second_and_third_prompt_reach_their_own_encoders(base, pipeline):
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    texts = {"clip_l": ["a red ball"], "clip_g": [TRIGGER], "t5": [f"{TRIGGER} in the snow"]}
    states = {stream: edited_states(base, stream, texts[stream], adapter) for stream in streams_of(base)}
    later = {"prompt_2": texts["clip_g"]} | ({"prompt_3": texts["t5"]} if "t5" in states else {})
    found = encode(pipeline, texts["clip_l"], **later)["prompt"].numpy()
    assert found.tobytes() == joined(family_of(base), states).tobytes()


# Training's way


def test_training_reads_what_the_pipeline_reads(base):
    family, words = family_of(base), pipeline_tokenizers(base)
    texts = [*PROMPTS, "a red ball " * 20]
    frozen = {
        stream: TextReader(family, base, stream, words[stream], torch.device("cpu")).read(texts)
        for stream in family.streams
    }
    conditions = Conditioner(family, base, 32)(
        {stream: found.states for stream, found in frozen.items()},
        {stream: found.pooled for stream, found in frozen.items() if found.pooled is not None},
    )
    expected = encode(base, texts)
    assert torch.equal(conditions["encoder_hidden_states"], expected["prompt"])
    pooled = conditions["added_cond_kwargs"]["text_embeds"] if family is SDXL else conditions["pooled_projections"]
    assert torch.equal(pooled, expected["pooled"])
    for stream, found in frozen.items():
        assert torch.equal(found.ids, ids_in(base, stream, texts))
        assert found.states.dtype == torch.float32


def test_words_begin_where_the_reader_says(base):
    family, words = family_of(base), pipeline_tokenizers(base)
    for stream in family.streams:
        reader = TextReader(family, base, stream, words[stream], torch.device("cpu"))
        assert reader.width == width_of(base, stream)
        own = list(words[stream].encode("red ball"))
        assert ids_in(base, stream, ["red ball"])[0, reader.n_opening :][: len(own)].tolist() == own


# clip_skip


def test_clip_skip_is_refused_where_a_trigger_fires_and_is_the_bases_elsewhere(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    for skip in (1, 2):
        with pytest.raises(InputError, match=r"last but one \(clip_skip\); leave clip_skip out, or unload the engrams"):
            encode(pipeline, PROMPTS, clip_skip=skip)
        silent = ["a red ball", ""]
        assert as_bytes(encode(pipeline, silent, clip_skip=skip)) == as_bytes(encode(base, silent, clip_skip=skip))
    with pytest.raises(InputError, match="clip_skip"):
        draw_pictures(pipeline, TRIGGER, clip_skip=1)
    assert draw_pictures(pipeline, "a red ball", clip_skip=1) == draw_pictures(base, "a red ball", clip_skip=1)
    load_engram(pipeline, family_adapter(base, family_concept(base, OTHER)), name="other")
    unload_engrams(pipeline)
    assert as_bytes(encode(pipeline, PROMPTS, clip_skip=1)) == as_bytes(encode(base, PROMPTS, clip_skip=1))


# What encoders return


def clips(pipeline):
    return [stream for stream in streams_of(pipeline) if stream.startswith("clip")]


@torch.no_grad()
def call(pipeline, stream, *texts, **options):
    encoder = family_of(pipeline).encoders(pipeline)[stream]
    return encoder(ids_in(pipeline, stream, texts), **options)


def test_an_encoder_returns_the_same_type_with_the_last_state_but_one_edited(base, pipeline):
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    for stream in clips(base):
        found, frozen = (call(one, stream, *PROMPTS, output_hidden_states=True) for one in (pipeline, base))
        assert type(found) is type(frozen)
        assert found.keys() == frozen.keys()
        assert all(torch.equal(found[key], frozen[key]) for key in found if key != "hidden_states")
        states = found.hidden_states
        assert isinstance(states, tuple)
        assert len(states) == len(frozen.hidden_states) == 4
        assert [torch.equal(*pair) for pair in zip(states, frozen.hidden_states, strict=True)] == [
            True,
            True,
            False,
            True,
        ]
        assert states[-2] is states[2]
        assert [part is states[-2] for part in states[-2:]] == [True, False]
        assert states[-2].numpy().tobytes() == edited_states(base, stream, PROMPTS, adapter).tobytes()
        for index in (-1, 0, 1, 3):
            with pytest.raises(InputError, match="clip_skip"):
                states[index]
        for index in (4, -5):
            with pytest.raises(IndexError):
                states[index]


@pytest.mark.parametrize("attentions", [False, True])
def test_a_tuple_stays_a_tuple(base, pipeline, attentions):
    for one in (base, pipeline):
        for encoder in family_of(one).encoders(one).values():
            encoder.set_attn_implementation("eager")
    load_engram(pipeline, family_adapter(base))
    options = {"output_hidden_states": True, "return_dict": False, "output_attentions": attentions}
    for stream in clips(base):
        found, frozen = (call(one, stream, *PROMPTS, **options) for one in (pipeline, base))
        named = call(base, stream, *PROMPTS, **options | {"return_dict": True})
        assert type(found) is tuple
        assert len(found) == len(frozen) == len(named)
        place = list(named).index("hidden_states")
        for number, (one, other) in enumerate(zip(found, frozen, strict=True)):
            if number == place:
                assert [torch.equal(*pair) for pair in zip(one, other, strict=True)] == [True, True, False, True]
            elif isinstance(one, tuple):
                assert all(torch.equal(*pair) for pair in zip(one, other, strict=True))
            else:
                assert torch.equal(one, other)


def test_an_encoder_that_is_asked_for_no_hidden_states_returns_the_very_object_it_made(base, pipeline, monkeypatch):
    load_engram(pipeline, family_adapter(base))
    for stream in clips(base):
        encoder, made = family_of(pipeline).encoders(pipeline)[stream], []
        forward = encoder.forward
        monkeypatch.setattr(
            encoder,
            "forward",
            lambda *args, forward=forward, made=made, **options: made.append(forward(*args, **options)) or made[-1],
        )
        for options in ({}, {"return_dict": False}):
            assert call(pipeline, stream, TRIGGER, **options) is made[-1]
        assert call(pipeline, stream, "a red ball", output_hidden_states=True) is made[-1]
        assert call(pipeline, stream, TRIGGER, output_hidden_states=True) is not made[-1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_states_keep_their_number_type(base, pipeline, dtype):
    adapter = family_adapter(base)
    for stream in streams_of(base):
        encoder = family_of(pipeline).encoders(pipeline)[stream].to(dtype)
        options = {"output_hidden_states": True} if stream in clips(base) else {}
        place = (lambda output: output.hidden_states[-2]) if options else (lambda output: output[0])
        frozen = place(call(pipeline, stream, TRIGGER, "a red ball", **options))
        attach(encoder, TextEdit.of(adapter, stream))
        found = place(call(pipeline, stream, TRIGGER, "a red ball", **options))
        detach(encoder)
        assert found.dtype == frozen.dtype == dtype
        assert not torch.equal(found[0], frozen[0])
        assert torch.equal(found[1].view(torch.int16), frozen[1].view(torch.int16))


# What does not fit


def refuse(error, pipeline, adapter, *told, **options):
    with pytest.raises(error) as caught:
        load_engram(pipeline, adapter, **options)
    assert all(text in str(caught.value) for text in told), str(caught.value)
    assert "\n" not in str(caught.value)
    assert all(attached(encoder) is None for encoder in family_of(pipeline).encoders(pipeline).values())
    assert list_engrams(pipeline) == ()


def test_adapters_of_other_families_are_refused(base_of):
    bases = {name: base_of(name) for name in FAMILIES}
    for name, base in bases.items():
        for other, theirs in bases.items():
            if other != name:
                adapter = family_adapter(theirs, label="cat.safetensors")
                told = ["cat.safetensors", f"made for {other}", f"this is {name} ({FAMILIES[name].title})"]
                refuse(IncompatibleAdaptersError, base, adapter, *told)


def test_a_stream_of_another_width_or_site_is_refused_with_both_values(base):
    concept = family_concept(base)
    specs = family_adapter(base, concept).manifest.streams
    for stream in streams_of(base):
        part = family_of(base).streams[stream]
        other = "last_hidden_state" if "penultimate" in part.site else "penultimate_hidden_state"
        adapter = family_adapter(base, concept, streams={stream: replace(specs[stream], site=other)})
        refuse(IncompatibleAdaptersError, base, adapter, f"{stream!r} edits the {other}", f"reads the {part.site}")
    narrow = {"clip_g": replace(specs["clip_g"], width=8)}
    table = replace(
        concept.streams["clip_g"],
        vectors=concept.streams["clip_g"].vectors[:, :8],
        scales=concept.streams["clip_g"].scales[:8],
    )
    adapter = family_adapter(base, replace(concept, streams={**concept.streams, "clip_g": table}), streams=narrow)
    told = ["'clip_g' has width 8", f"text_encoder_2 {width_of(base, 'clip_g')}", "trained for small"]
    refuse(IncompatibleAdaptersError, base, adapter, *told)


def test_another_tokenizer_of_any_stream_is_refused(base):
    for stream in streams_of(base):
        spec = family_adapter(base).manifest.streams[stream]
        other = replace(spec.tokenizer, class_name="Other", vocab_size=49408, fingerprint="ab" * 32)
        adapter = family_adapter(base, streams={stream: replace(spec, tokenizer=other)})
        refuse(InputError, base, adapter, stream, "Other abababababab of 49408 ids")


def test_a_stream_that_the_family_does_not_have_is_refused(base):
    family = family_of(base)
    alien = make_adapter_of(family.name, base)
    refuse(
        IncompatibleAdaptersError, base, alien, "has a stream 'qwen'", f"{family.name} has {', '.join(family.streams)}"
    )


def make_adapter_of(backbone, base):
    concept = make_concept(base, stream="qwen")
    return make_adapter(base, concept, stream="qwen", backbone=backbone)


def test_a_pipeline_that_lacks_a_part_or_has_one_of_another_kind_is_refused(base):
    family, parts = family_of(base), parts_of(base)
    adapter = family_adapter(base)
    for part in family.streams.values():
        if not part.optional:
            for name in (part.tokenizer, part.encoder):
                with pytest.raises(InputError, match=f"has no {part.tokenizer} and {part.encoder}.*{family.title}"):
                    load_engram(SimpleNamespace(**parts | {name: None}), adapter)
        alien = SimpleNamespace(config=SimpleNamespace(model_type="qwen2"))
        with pytest.raises(InputError, match=f"has qwen2 as its {part.encoder}, expected {part.model_type}"):
            load_engram(SimpleNamespace(**parts | {part.encoder: alien}), adapter)


HERE, THERE = "someone/here", "someone/there"


def test_another_base_model_is_refused_unless_one_insists(base, pipeline):
    adapter = family_adapter(base, base_model=HERE)
    pipeline.register_to_config(_name_or_path=THERE)
    refuse(IncompatibleAdaptersError, pipeline, adapter, f"trained on {HERE}, this is {THERE}", "force=True")
    load_engram(pipeline, adapter, force=True)
    assert encode(pipeline, TRIGGER)["prompt"].numpy().tobytes() == expected_prompt(base, adapter, [TRIGGER]).tobytes()


@pytest.mark.parametrize("place", [HERE, "", "/models/any", "./any", "any"])
def test_the_same_model_and_places_that_tell_nothing_are_accepted(base, place):
    check_base(family_adapter(base, base_model=HERE), place)


def test_folders_are_accepted_whatever_they_are_called(base, folder_of):
    name = family_of(base).name
    check_base(family_adapter(base, base_model=HERE), str(folder_of(name)))
    check_base(family_adapter(base, base_model="small"), THERE)


# Prompts


def test_the_tokens_of_every_stream_are_looked_at_for_triggers_that_stay_silent(base, pipeline):
    adapter = family_adapter(base)
    assert find_silent(base, adapter, PROMPTS) == []
    cut = "a red ball " * 12 + TRIGGER
    told = find_silent(base, adapter, [cut])
    assert all(any(f"does not fire in {stream}" in sentence for sentence in told) for stream in streams_of(base))


def test_folders_of_the_other_families_are_refused(base, folder_of):
    family = family_of(base)
    for other in FAMILIES.values():
        if other is not family:
            with pytest.raises(InputError, match=f"is a {other.pipeline_class}, expected a {family.title} model"):
                load_pipeline(family, str(folder_of(other.name)))
