"""Loading changes nothing but the states of triggers, refuses what does not fit, and unloading leaves no trace."""

import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from vision_builders import (
    LENGTH,
    TRIGGER,
    WIDTH,
    assemble,
    copy_of,
    ids_of,
    make_adapter,
    make_concept,
    states_of,
    weights_of,
)

from engram_core import (
    AdapterReadError,
    ConceptNotFoundError,
    ConflictError,
    IncompatibleAdaptersError,
    InputError,
    Matcher,
    Residual,
    merge_files,
    open_adapter,
)
from engram_vision.loading import list_engrams, load_engram, pipeline_tokenizers, unload_engrams

OTHER = "mira voss"
PROMPTS = [f"a photo of {TRIGGER} in the snow", "a red ball", f"{OTHER} and {TRIGGER}", OTHER]
SILENT = ["a red ball", "a blue hat at night", ""]


def draw(pipeline, prompt, **options):
    """Return prompt images as bytes."""
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"} | options
    images = pipeline(prompt, generator=torch.Generator().manual_seed(0), **options).images
    return [image.tobytes() for image in images]


def embeddings(pipeline, prompt, *, copies=1, negative=None):
    """Return prompt and negative prompt as the U-Net gets them, as arrays."""
    with torch.no_grad():
        return [part.numpy() for part in pipeline.encode_prompt(prompt, "cpu", copies, True, negative)]


def names(pipeline):
    return [loaded.name for loaded in list_engrams(pipeline)]


# The base model


def test_without_a_trigger_pictures_and_embeddings_are_those_of_a_pipeline_that_never_loaded_anything(pipeline, base):
    load_engram(pipeline, make_adapter(base))
    for found, expected in zip(embeddings(pipeline, SILENT), embeddings(base, SILENT), strict=True):
        assert found.tobytes() == expected.tobytes()
    assert draw(pipeline, SILENT) == draw(base, SILENT)


def test_a_trigger_changes_its_own_picture_alone(pipeline, base):
    load_engram(pipeline, make_adapter(base))
    prompts = [SILENT[0], f"{TRIGGER} in the snow", SILENT[1]]
    same = [one == other for one, other in zip(draw(pipeline, prompts), draw(base, prompts), strict=True)]
    assert same == [True, False, True]


def test_strength_zero_is_the_base_model(pipeline, base):
    load_engram(pipeline, make_adapter(base), strength=0)
    assert draw(pipeline, PROMPTS) == draw(base, PROMPTS)


def test_unloading_restores_the_pipeline(pipeline, base):
    before = weights_of(pipeline)
    load_engram(pipeline, make_adapter(base), name="one")
    load_engram(pipeline, make_adapter(base, make_concept(base, OTHER)), name="two")
    draw(pipeline, PROMPTS)
    unload_engrams(pipeline)
    assert names(pipeline) == []
    assert not pipeline.text_encoder._forward_hooks
    assert weights_of(pipeline) == before == weights_of(base)
    assert draw(pipeline, PROMPTS) == draw(base, PROMPTS)
    unload_engrams(pipeline)  # nothing is loaded, and nothing is to be done


# Prompts


def test_a_trigger_in_the_negative_prompt_fires_there(pipeline, base):
    adapter = make_adapter(base)
    load_engram(pipeline, adapter)
    prompt, negative = ["a red ball", TRIGGER], [f"{TRIGGER} at night", "a hat"]
    found = embeddings(pipeline, prompt, negative=negative)
    for part, texts in zip(found, (prompt, negative), strict=True):
        assert part.tobytes() == expected_states(adapter, base, texts).tobytes()
    assert draw(pipeline, "a red ball", negative_prompt=TRIGGER) != draw(base, "a red ball", negative_prompt=TRIGGER)


def test_every_picture_of_a_prompt_gets_the_edited_states(pipeline, base):
    adapter = make_adapter(base)
    load_engram(pipeline, adapter)
    found, _ = embeddings(pipeline, PROMPTS, copies=2)
    assert found.tobytes() == expected_states(adapter, base, PROMPTS).repeat(2, axis=0).tobytes()
    assert len(draw(pipeline, TRIGGER, num_images_per_prompt=2)) == 2


def test_clip_skip_is_refused_where_a_trigger_fires(pipeline, base):
    load_engram(pipeline, make_adapter(base))
    with pytest.raises(InputError, match=r"clip_skip.*unload the engrams"):
        draw(pipeline, TRIGGER, clip_skip=1)


def expected_states(adapter, base, texts, **options):
    matches = Matcher(adapter, "clip_l").match(ids_of(base, *texts).numpy())
    return Residual(adapter, "clip_l").apply(states_of(base, *texts), matches, **options)


# Several adapters


@pytest.mark.parametrize("backwards", [False, True])
def test_adapters_loaded_together_act_as_their_merged_file(pipeline, base, tmp_path, backwards):
    concepts = [make_concept(base, rule="relative"), make_concept(base, OTHER, seed=1)]
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    for file, concept in zip(files, concepts, strict=True):
        make_adapter(base, concept).save(file)
    merge_files(files, tmp_path / "merged.safetensors")
    merged = copy_of(base)
    load_engram(merged, tmp_path / "merged.safetensors")
    for file in reversed(files) if backwards else files:
        load_engram(pipeline, file)
    assert states_of(pipeline, *PROMPTS).tobytes() == states_of(merged, *PROMPTS).tobytes()
    assert states_of(pipeline, *PROMPTS).tobytes() != states_of(base, *PROMPTS).tobytes()
    assert draw(pipeline, PROMPTS) == draw(merged, PROMPTS)
    unload_engrams(pipeline, "two")
    alone = copy_of(base)
    load_engram(alone, files[0])
    assert names(pipeline) == ["one"]
    assert states_of(pipeline, *PROMPTS).tobytes() == states_of(alone, *PROMPTS).tobytes()


def test_strengths_belong_to_the_adapter_and_to_its_concepts(pipeline, base):
    one = make_adapter(base, make_concept(base), make_concept(base, "red ball", seed=2))
    two = make_adapter(base, make_concept(base, OTHER, seed=1))
    both = make_adapter(base, *one.concepts(), *two.concepts())
    strengths = {TRIGGER: 0.5, OTHER: -1.5}
    given = {TRIGGER: 0.5}
    load_engram(pipeline, one, name="one", strength=given)
    given[TRIGGER] = 9.0  # what was loaded does not change with the caller's dictionary
    alone = expected_states(one, base, PROMPTS, strength={TRIGGER: 0.5})
    assert states_of(pipeline, *PROMPTS).tobytes() == alone.tobytes()
    load_engram(pipeline, two, name="two", strength=-1.5)
    expected = expected_states(both, base, PROMPTS, strength=strengths)
    assert states_of(pipeline, *PROMPTS).tobytes() == expected.tobytes()
    assert [loaded.factors() for loaded in list_engrams(pipeline)] == [{TRIGGER: 0.5, "red ball": 1.0}, {OTHER: -1.5}]


def test_the_same_concept_loaded_twice_acts_once(pipeline, base):
    load_engram(pipeline, make_adapter(base), name="one", strength=0.5)
    once = states_of(pipeline, *PROMPTS)
    load_engram(pipeline, make_adapter(base), name="two", strength=0.5)
    assert states_of(pipeline, *PROMPTS).tobytes() == once.tobytes()
    with pytest.raises(InputError, match=f"concept '{TRIGGER}' is loaded twice with different strengths"):
        load_engram(pipeline, make_adapter(base), name="three", strength=0.6)
    assert names(pipeline) == ["one", "two"]
    assert states_of(pipeline, *PROMPTS).tobytes() == once.tobytes()


def test_a_conflict_leaves_what_was_loaded(pipeline, base):
    load_engram(pipeline, make_adapter(base), name="one")
    before = states_of(pipeline, *PROMPTS)
    with pytest.raises(ConflictError, match=TRIGGER):
        load_engram(pipeline, make_adapter(base, make_concept(base, name="other", seed=1)), name="two")
    with pytest.raises(IncompatibleAdaptersError, match="other/model"):
        load_engram(pipeline, make_adapter(base, make_concept(base, OTHER), base_model="other/model"), name="two")
    assert names(pipeline) == ["one"]
    assert states_of(pipeline, *PROMPTS).tobytes() == before.tobytes()


# Names


def test_an_adapter_is_called_by_its_file_or_its_first_concept_or_as_the_caller_says(pipeline, base, tmp_path):
    make_adapter(base).save(tmp_path / "some file.v2.safetensors")
    load_engram(pipeline, str(tmp_path / "some file.v2.safetensors"))
    load_engram(pipeline, make_adapter(base, make_concept(base, OTHER)))
    load_engram(pipeline, make_adapter(base, make_concept(base, "red ball")), name="ball")
    assert names(pipeline) == ["some file.v2", OTHER, "ball"]
    with pytest.raises(InputError, match=r"'ball' is loaded already; unload it first, or pass another name"):
        load_engram(pipeline, make_adapter(base, make_concept(base, "blue hat")), name="ball")
    with pytest.raises(InputError, match=rf"'bal' is loaded; loaded: 'some file.v2', '{OTHER}', 'ball'"):
        unload_engrams(pipeline, "ball", "bal")
    assert names(pipeline) == ["some file.v2", OTHER, "ball"]
    unload_engrams(pipeline, "ball", "some file.v2")
    assert names(pipeline) == [OTHER]
    unload_engrams(pipeline, OTHER)
    with pytest.raises(InputError, match="no engram named 'ball' is loaded; loaded: nothing"):
        unload_engrams(pipeline, "ball")


# What does not fit


def refuse(error, pipeline, source, *told, **options):
    with pytest.raises(error) as caught:
        load_engram(pipeline, source, **options)
    assert all(text in str(caught.value) for text in told), str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(pipeline) == []
    assert not pipeline.text_encoder._forward_hooks


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"backbone": "sd35"}, ["made for sd35", "this is sd15"]),
        ({"stream": "t5"}, ["stream 't5'", "sd15 has clip_l"]),
        ({"width": 48}, ["width 48", f"text_encoder {WIDTH}", "trained for small"]),
        ({"site": "penultimate_hidden_state"}, ["edits the penultimate_hidden_state", "reads the last_hidden_state"]),
    ],
)
def test_an_adapter_of_another_family_is_refused_with_both_values(pipeline, base, fields, told):
    adapter = make_adapter(base, label="cat.safetensors", **fields)
    refuse(IncompatibleAdaptersError, pipeline, adapter, "cat.safetensors", *told)


def test_an_adapter_of_another_tokenizer_is_refused_with_both_values(pipeline, base):
    own = pipeline_tokenizers(base)["clip_l"].spec
    other = replace(own, class_name="Other", vocab_size=49408, fingerprint="ab" * 32)
    adapter = make_adapter(base, tokenizer=other, label="cat.safetensors")
    told = ["cat.safetensors", "Other abababababab of 49408 ids", f"CLIPTokenizer {own.fingerprint[:12]} of"]
    refuse(InputError, pipeline, adapter, *told)


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39, "1", None, {TRIGGER: float("nan")}])
def test_a_strength_that_is_no_finite_number_is_refused_when_loading(pipeline, base, strength):
    refuse(InputError, pipeline, make_adapter(base), "strength", "finite number", strength=strength)


def test_a_strength_of_a_concept_that_is_not_there_is_refused_when_loading(pipeline, base):
    refuse(ConceptNotFoundError, pipeline, make_adapter(base), "'zorbit'", TRIGGER, strength={"zorbit": 0.5})


def test_numbers_of_numpy_are_strengths(pipeline, base):
    load_engram(pipeline, make_adapter(base), strength={TRIGGER: np.float32(0.5)})
    expected = expected_states(make_adapter(base), base, PROMPTS, strength=0.5)
    assert states_of(pipeline, *PROMPTS).tobytes() == expected.tobytes()


def test_a_file_that_is_not_there_is_refused(pipeline, tmp_path):
    refuse(AdapterReadError, pipeline, tmp_path / "none.safetensors", "none.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text_encoder": None}, "has no tokenizer and text_encoder"),
        ({"tokenizer": None}, "has no tokenizer and text_encoder"),
        ({"text_encoder_2": object()}, "has no tokenizer_2 and text_encoder_2"),
        ({"text_encoder": SimpleNamespace(config=SimpleNamespace(model_type="t5"))}, "has t5"),
        ({"text_encoder": object()}, "has None"),
    ],
)
def test_pipelines_of_other_families_are_refused(base, change, told):
    parts = {"tokenizer": base.tokenizer, "text_encoder": base.text_encoder} | change
    with pytest.raises(InputError, match=f"SimpleNamespace {told}.*Stable Diffusion 1.x"):
        load_engram(SimpleNamespace(**parts), make_adapter(base))


def test_a_tokenizer_reads_no_more_than_the_pipeline_and_the_encoder(base, model):
    def max_tokens(words, encoder):
        return pipeline_tokenizers(SimpleNamespace(tokenizer=words, text_encoder=encoder))["clip_l"].max_tokens

    words = CLIPTokenizer.from_pretrained(model / "tokenizer")
    assert max_tokens(words, base.text_encoder) == LENGTH - 2
    words.model_max_length = 20
    assert max_tokens(words, base.text_encoder) == 18
    config = CLIPTextConfig(**base.text_encoder.config.to_dict() | {"max_position_embeddings": 12})
    assert max_tokens(words, CLIPTextModel(config)) == 10


# Sharing


def test_pipelines_that_share_an_encoder_share_what_is_loaded(pipeline, base):
    other = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    load_engram(pipeline, make_adapter(base), name="one")
    assert names(other) == ["one"]
    with pytest.raises(InputError, match="loaded already"):
        load_engram(other, make_adapter(base), name="one")
    unload_engrams(other, "one")
    assert names(pipeline) == []
    assert draw(pipeline, TRIGGER) == draw(base, TRIGGER)


def test_nothing_that_is_loaded_keeps_a_pipeline_alive(base, model):
    pipeline = copy_of(base)
    parts = {name: getattr(pipeline, name) for name in ("vae", "unet", "text_encoder", "scheduler")}
    pipeline = assemble(**parts, tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"))
    load_engram(pipeline, make_adapter(base))
    draw(pipeline, TRIGGER)
    watched = [weakref.ref(part) for part in (pipeline, pipeline.text_encoder, pipeline.tokenizer, pipeline.unet)]
    adapter = weakref.ref(list_engrams(pipeline)[0].adapter)
    del pipeline, parts
    gc.collect()
    assert [one() for one in watched] == [None] * 4
    assert adapter() is None


def test_one_adapter_stays_in_its_file(pipeline, base, tmp_path):
    make_adapter(base).save(tmp_path / "one.safetensors")
    load_engram(pipeline, tmp_path / "one.safetensors")
    (loaded,) = list_engrams(pipeline)
    assert loaded.adapter.path == tmp_path / "one.safetensors"
    assert loaded.adapter.identity() == open_adapter(tmp_path / "one.safetensors").identity()
