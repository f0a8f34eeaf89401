"""Sites: each block of the denoiser reads text states of its own at the trigger, and everything else stays as it is."""

import copy
import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from vision_builders import TRIGGER
from vision_families import (
    NAMES,
    OTHER,
    as_bytes,
    assemble_family,
    copy_family,
    draw_pictures,
    edited_states,
    encode,
    family_adapter,
    family_concept,
    ids_in,
    joined,
    parts_of,
    width_of,
    words_of,
)
from vision_modes import (
    COMPILED_MODES,
    EAGER_MODES,
    FIRES,
    MIXED,
    SILENT,
    check_law,
    denoiser_of,
    differing,
    encoders_of,
)

from engram_core import Concept, IncompatibleAdaptersError, InputError, StreamSpec, extract_concepts, merge_adapters
from engram_core import Residual as NumpyResidual
from engram_vision.families import family_of
from engram_vision.loading import (
    disable_engrams,
    enable_engrams,
    list_engrams,
    load_engram,
    set_strength,
    unload_engrams,
)
from engram_vision.site_hooks import attached_sites
from engram_vision.sites import find_places, name_sites

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
]


@pytest.fixture(params=NAMES)
def base(request, base_of):
    return base_of(request.param)


@pytest.fixture
def pipeline(base):
    return copy_family(base)


def with_sites(concept, count, *, seed=None):
    """Return a concept with its memory at every site; with a seed, each site's is another one."""
    rng = np.random.default_rng(seed)

    def spread(values, axis):
        values = np.repeat(np.expand_dims(values, axis), count, axis)
        return values if seed is None else (values * rng.normal(1, 0.5, values.shape)).astype(np.float32)

    streams = {
        name: replace(stream, vectors=spread(stream.vectors, 1), scales=spread(stream.scales, 0))
        for name, stream in concept.streams.items()
    }
    return Concept(record=concept.record, streams=streams)


def site_specs(pipeline, streams):
    family, sites = family_of(pipeline), name_sites(family_of(pipeline), pipeline)
    return {
        stream: StreamSpec(
            width=width_of(pipeline, stream),
            site=family.streams[stream].site,
            tokenizer=words_of(stream).spec,
            sites=sites,
        )
        for stream in streams
    }


def site_adapter(pipeline, *concepts, seed=7, **options):
    """Return an adapter with sites of concepts without; the default one is for `TRIGGER`."""
    concepts = concepts or (family_concept(pipeline),)
    count = len(name_sites(family_of(pipeline), pipeline))
    spread = [with_sites(concept, count, seed=seed) for concept in concepts]
    return family_adapter(pipeline, *spread, streams=site_specs(pipeline, concepts[0].streams), **options)


def pictures(pipeline, prompts, **options):
    return np.stack([np.frombuffer(each, np.float32) for each in draw_pictures(pipeline, prompts, **options)])


# What the blocks read


def test_sites_are_the_blocks_that_read_text(base):
    family = family_of(base)
    expected = {
        "sd15": ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2", 4),
        "sdxl": ("unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2", 8),
        "sd35": ("transformer.transformer_blocks.0", 2),
    }
    sites = name_sites(family, base)
    assert (sites[0], len(sites)) == expected[family.name]
    places = list(find_places(family, denoiser_of(base)).values())
    assert len({*places}) == len(sites)


def test_equal_sites_draw_what_one_edit_of_the_text_draws(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    expected = pictures(pipeline, MIXED)
    unload_engrams(pipeline)
    load_engram(pipeline, site_adapter(base, seed=None))
    found = pictures(pipeline, MIXED)
    if family_of(base).passes_on:
        # Joint blocks pass the text on, edited: each adds its own once more.
        assert np.abs(found - expected).max() > 1e-3
    else:
        assert found.tobytes() == expected.tobytes()


def test_a_first_site_alone_is_one_edit_of_the_text_where_blocks_pass_it_on(base_of):
    base = base_of("sd35")
    pipeline = copy_family(base)
    load_engram(pipeline, family_adapter(base))
    expected = pictures(pipeline, MIXED)
    unload_engrams(pipeline)
    concept = with_sites(family_concept(base), 2)
    for stream in concept.streams.values():
        stream.vectors[:, 1] = 0
    load_engram(pipeline, family_adapter(base, concept, streams=site_specs(base, concept.streams)))
    np.testing.assert_allclose(pictures(pipeline, MIXED), expected, atol=2e-4)


def spy(pipeline, call):
    """Return what each site read at a call, in the order of reading, as (site, states)."""
    seen, handles = [], []
    for number, place in enumerate(find_places(family_of(pipeline), denoiser_of(pipeline)).values()):

        def look(_, args, kwargs, number=number):
            seen.append((number, kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None).clone()))

        handles.append(place.register_forward_pre_hook(look, with_kwargs=True))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.parametrize("rule", ["absolute", "absolute-tanh", "relative"])
def test_each_site_reads_the_states_that_the_numpy_reference_gives(base_of, rule):
    for name in ("sd15", "sdxl"):
        base = base_of(name)
        pipeline = copy_family(base)
        adapter = site_adapter(base, family_concept(base, rule=rule))
        load_engram(pipeline, adapter, strength=0.7)
        seen = spy(pipeline, lambda pipeline=pipeline: draw_pictures(pipeline, MIXED, guidance_scale=1.0))
        sites = name_sites(family_of(base), base)
        assert {number for number, _ in seen} == set(range(len(sites)))
        for number, found in seen:
            parts = {
                stream: edited_states(base, stream, MIXED, adapter, strength=0.7, site=sites[number])
                for stream in encoders_of(base)
            }
            expected = joined(family_of(base), parts)
            if rule == "relative":  # NumPy and PyTorch round the mean norm differently
                np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
            else:
                assert found.numpy().tobytes() == expected.tobytes()


def test_joint_blocks_read_what_the_projection_makes_of_their_own_residual(base_of):
    base = base_of("sd35")
    pipeline, adapter = copy_family(base), site_adapter(base_of("sd35"))
    options = {"guidance_scale": 1.0, "num_inference_steps": 1}
    plain = spy(pipeline, lambda: draw_pictures(pipeline, MIXED, **options))
    load_engram(pipeline, adapter)
    number, found = spy(pipeline, lambda: draw_pictures(pipeline, MIXED, **options))[0]
    sites = name_sites(family_of(base), base)
    difference = joined(
        family_of(base),
        {
            stream: NumpyResidual(adapter, stream).apply(
                np.zeros((len(MIXED), *ids.shape[1:], width_of(base, stream)), np.float32),
                _matches(adapter, stream, ids),
                site=sites[number],
            )
            for stream in encoders_of(base)
            for ids in [ids_in(base, stream, MIXED).numpy()]
        },
    )
    weight = denoiser_of(base).context_embedder.weight.numpy()
    np.testing.assert_allclose((found - plain[0][1]).numpy(), difference @ weight.T, atol=1e-4)


def _matches(adapter, stream, ids):
    from engram_core import Matcher

    return Matcher(adapter, stream).match(ids)


# Locality


@pytest.mark.parametrize("mode", EAGER_MODES)
def test_a_mode_keeps_the_bytes_of_silent_prompts_and_the_effect_of_triggers(base, mode):
    check_law(base, EAGER_MODES[mode], adapter=site_adapter(base))


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILED_MODES)
def test_compiled_modules_keep_both_promises(base, mode):
    check_law(base, COMPILED_MODES[mode], warm=True, adapter=site_adapter(base))


@pytest.mark.slow
def test_a_denoiser_compiled_in_place_keeps_both_promises(base):
    check_law(
        base, lambda pipeline: denoiser_of(pipeline).compile(backend="eager"), warm=True, adapter=site_adapter(base)
    )


def test_a_picture_is_that_of_its_prompt_whatever_stands_beside_it(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    for prompts in (SILENT, MIXED, [TRIGGER]):
        fires = [TRIGGER in prompt for prompt in prompts]
        assert differing(draw_pictures(pipeline, prompts), draw_pictures(base, prompts)) == fires


def test_the_text_states_themselves_stay_frozen(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    assert as_bytes(encode(pipeline, MIXED)) == as_bytes(encode(base, MIXED))


def test_a_trigger_in_the_negative_prompt_acts_there_alone(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    prompts, negative = ["a red ball", "a red ball", TRIGGER, "a hat"], ["", TRIGGER, TRIGGER, "a hat"]
    found = [draw_pictures(one, prompts, negative_prompt=negative) for one in (pipeline, base)]
    assert differing(*found) == [False, True, True, False]


def test_every_picture_of_a_prompt_is_edited(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    found, frozen = (draw_pictures(one, MIXED, num_images_per_prompt=2) for one in (pipeline, base))
    assert differing(found, frozen) == [fires for fires in FIRES for _ in range(2)]


def test_states_computed_ahead_are_known_again(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    ahead = encode(pipeline, MIXED, negative=["a hat"] * len(MIXED))
    names = {"prompt": "prompt_embeds", "negative": "negative_prompt_embeds", "pooled": "pooled_prompt_embeds"}
    names["negative_pooled"] = "negative_pooled_prompt_embeds"
    given = {names[name]: value for name, value in ahead.items()}
    expected = draw_pictures(pipeline, MIXED, negative_prompt=["a hat"] * len(MIXED))
    assert draw_pictures(pipeline, None, **given) == expected
    assert differing(expected, draw_pictures(base, MIXED, negative_prompt=["a hat"] * len(MIXED))) == FIRES


def test_strength_scales_and_zero_is_the_base(base, pipeline):
    frozen = draw_pictures(base, MIXED)
    load_engram(pipeline, site_adapter(base), name="one")
    whole = draw_pictures(pipeline, MIXED)
    set_strength(pipeline, "one", 0.5)
    half = draw_pictures(pipeline, MIXED)
    assert differing(half, whole) == differing(half, frozen) == FIRES
    set_strength(pipeline, "one", 0.0)
    assert draw_pictures(pipeline, MIXED) == frozen
    set_strength(pipeline, "one", {TRIGGER: 1.0})
    assert draw_pictures(pipeline, MIXED) == whole
    disable_engrams(pipeline)
    assert draw_pictures(pipeline, MIXED) == frozen
    enable_engrams(pipeline)
    assert draw_pictures(pipeline, MIXED) == whole


def test_unloading_leaves_nothing_behind(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    draw_pictures(pipeline, MIXED)
    unload_engrams(pipeline)
    denoiser = denoiser_of(pipeline)
    assert attached_sites(denoiser) is None
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in denoiser.modules())
    assert draw_pictures(pipeline, MIXED) == draw_pictures(base, MIXED)


def test_a_pipeline_with_sites_can_be_collected(base):
    pipeline = copy_family(base)
    load_engram(pipeline, site_adapter(base))
    draw_pictures(pipeline, [TRIGGER])
    gone = weakref.ref(denoiser_of(pipeline))
    del pipeline
    gc.collect()
    assert gone() is None


def test_a_copy_of_a_pipeline_starts_without(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    parts = {name: copy.deepcopy(part) for name, part in parts_of(pipeline).items()}
    copied = assemble_family(family_of(base).name, **parts)
    assert draw_pictures(copied, MIXED) == draw_pictures(base, MIXED)
    load_engram(copied, site_adapter(base))
    assert draw_pictures(copied, MIXED) == draw_pictures(pipeline, MIXED)


# Several


def test_merged_files_draw_what_single_ones_draw(base, pipeline):
    one = site_adapter(base, family_concept(base, seed=1))
    two = site_adapter(base, family_concept(base, OTHER, seed=2))
    load_engram(pipeline, one)
    alone = draw_pictures(pipeline, [TRIGGER])
    for merged in (merge_adapters([one, two]), merge_adapters([two, one])):
        unload_engrams(pipeline)
        load_engram(pipeline, merged)
        assert draw_pictures(pipeline, [TRIGGER]) == alone
        assert extract_concepts(merged, [TRIGGER]).identity() == one.identity()
    unload_engrams(pipeline)
    load_engram(pipeline, one, name="one")
    load_engram(pipeline, two, name="two")
    assert draw_pictures(pipeline, [TRIGGER]) == alone
    assert len(list_engrams(pipeline)) == 2


def test_text_and_blocks_cannot_be_in_force_together(base, pipeline):
    load_engram(pipeline, site_adapter(base, family_concept(base, OTHER, seed=2)), name="blocks")
    with pytest.raises(IncompatibleAdaptersError, match=r"sites is .* in the first and .* in the second"):
        load_engram(pipeline, family_adapter(base), name="text")
    assert [one.name for one in list_engrams(pipeline)] == ["blocks"]


def test_blocks_of_another_denoiser_are_refused(base, pipeline):
    concept = with_sites(family_concept(base), 1)
    specs = {
        stream: replace(spec, sites=("unet.mid_block",)) for stream, spec in site_specs(base, concept.streams).items()
    }
    with pytest.raises(IncompatibleAdaptersError, match=r"has 1 sites from unet\.mid_block"):
        load_engram(pipeline, family_adapter(base, concept, streams=specs))
    assert attached_sites(denoiser_of(pipeline)) is None


def test_states_that_were_changed_on_the_way_are_not_known_again(base, pipeline):
    load_engram(pipeline, site_adapter(base))
    ahead = encode(pipeline, [TRIGGER], negative=[""])
    given = {"prompt_embeds": ahead["prompt"] * 1.1, "negative_prompt_embeds": ahead["negative"]}
    if "pooled" in ahead:
        given |= {"pooled_prompt_embeds": ahead["pooled"], "negative_pooled_prompt_embeds": ahead["negative_pooled"]}
    assert draw_pictures(pipeline, None, **given) == draw_pictures(base, None, **given)


def test_clip_skip_is_refused_where_a_trigger_fires(base_of):
    base = base_of("sd15")
    pipeline = copy_family(base)
    load_engram(pipeline, site_adapter(base))
    with pytest.raises(InputError, match="clip_skip"):
        draw_pictures(pipeline, [TRIGGER], clip_skip=1)
