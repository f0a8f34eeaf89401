"""Ways to use a pipeline: in each, prompts without a trigger give the base's bytes and triggers what they always give.

Every family, with the features of diffusers, accelerate, PEFT and PyTorch that change how its modules run.
"""

import copy
import gc
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from vision_builders import SIZE, TRIGGER
from vision_families import (
    NAMES,
    OTHER,
    as_bytes,
    assemble_family,
    copy_family,
    draw_pictures,
    encode,
    family_adapter,
    family_concept,
    modules_of,
    parts_of,
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
    expected_states,
    states,
)

from engram_core import InputError
from engram_vision.families import family_of
from engram_vision.hooks import attached
from engram_vision.loading import (
    disable_engrams,
    enable_engrams,
    list_engrams,
    load_engram,
    set_strength,
    unload_engrams,
)

pytestmark = [
    # The scheduler of diffusers is older than NumPy's way to copy.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`upcast_vae` is deprecated:FutureWarning"),
]


@pytest.fixture(params=NAMES)
def base(request, base_of):
    return base_of(request.param)


@pytest.fixture
def pipeline(base):
    return copy_family(base)


@pytest.mark.parametrize("mode", EAGER_MODES)
def test_a_mode_keeps_the_bytes_of_silent_prompts_and_the_effect_of_triggers(base, mode):
    check_law(base, EAGER_MODES[mode])


@pytest.mark.slow
@pytest.mark.parametrize("mode", COMPILED_MODES)
def test_compiled_modules_keep_the_bytes_of_silent_prompts_and_the_effect_of_triggers(base, mode):
    check_law(base, COMPILED_MODES[mode], warm=True)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu_keeps_both_promises(base, mode):
    check_law(base, lambda pipeline: getattr(pipeline, mode)())


# Prompts


@pytest.mark.parametrize("prompts", [SILENT, MIXED, [TRIGGER]], ids=["silent", "mixed", "one"])
def test_a_picture_is_that_of_its_prompt_whatever_stands_beside_it(base, pipeline, prompts):
    load_engram(pipeline, family_adapter(base))
    fires = [TRIGGER in prompt for prompt in prompts]
    assert differing(draw_pictures(pipeline, prompts), draw_pictures(base, prompts)) == fires
    found, frozen = states(pipeline, prompts), states(base, prompts)
    assert [one.tobytes() != other.tobytes() for one, other in zip(found, frozen, strict=True)] == fires


def test_a_trigger_in_the_negative_prompt_acts_there_alone(base, pipeline):
    adapter = family_adapter(base)
    load_engram(pipeline, adapter)
    prompts, negative = ["a red ball", "a red ball", TRIGGER, "a hat"], ["", TRIGGER, TRIGGER, "a hat"]
    found, frozen = (encode(one, prompts, negative=negative) for one in (pipeline, base))
    assert found["prompt"].numpy().tobytes() == expected_states(base, adapter, prompts).tobytes()
    assert found["negative"].numpy().tobytes() == expected_states(base, adapter, negative).tobytes()
    for name in found.keys() - {"prompt", "negative"}:
        assert torch.equal(found[name], frozen[name])
    pictures = [draw_pictures(one, prompts, negative_prompt=negative) for one in (pipeline, base)]
    assert differing(*pictures) == [False, True, True, False]


def test_without_guidance_the_negative_prompt_does_not_count(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    options = {"guidance_scale": 1.0, "negative_prompt": [TRIGGER] * 2}
    assert draw_pictures(pipeline, SILENT, **options) == draw_pictures(base, SILENT, **options)


def test_every_picture_of_a_prompt_is_edited(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    found, frozen = (draw_pictures(one, MIXED, num_images_per_prompt=2) for one in (pipeline, base))
    assert differing(found, frozen) == [fires for fires in FIRES for _ in range(2)]
    once = states(pipeline, MIXED)
    assert states(pipeline, MIXED, copies=2).tobytes() == once.repeat(2, axis=0).tobytes()


def test_states_computed_ahead_are_edited_once(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    ahead = encode(pipeline, MIXED, negative=["a hat"] * len(MIXED))
    names = {"prompt": "prompt_embeds", "negative": "negative_prompt_embeds", "pooled": "pooled_prompt_embeds"}
    names["negative_pooled"] = "negative_pooled_prompt_embeds"
    given = {names[name]: value for name, value in ahead.items()}
    expected = draw_pictures(pipeline, MIXED, negative_prompt=["a hat"] * len(MIXED))
    for one in (pipeline, base):
        assert draw_pictures(one, None, **given) == expected


def test_latents_are_the_bases_as_pictures_are(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    found, frozen = (draw_pictures(one, MIXED, output_type="latent") for one in (pipeline, base))
    assert differing(found, frozen) == FIRES


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    words=st.lists(
        st.sampled_from(["a", "photo", "zorbit", "quell", "zorbit quell", "ZORBIT", "snow", "!", "zorbit-quell", "…"]),
        max_size=7,
    )
)
def test_whatever_the_prompt_only_triggers_change_states(base, loaded_of, words):
    prompt = " ".join(words)
    pipeline, adapter = loaded_of(family_of(base).name)
    found = states(pipeline, [prompt])
    assert found.tobytes() == expected_states(base, adapter, [prompt]).tobytes()
    if "zorbit quell" not in prompt.lower():
        assert found.tobytes() == states(base, [prompt]).tobytes()


@pytest.fixture(scope="module")
def loaded_of(base_of):
    """Return a function from a family's name to a pipeline with an adapter, and the adapter."""
    made = {}

    def load(name):
        if name not in made:
            pipeline, adapter = copy_family(base_of(name)), family_adapter(base_of(name))
            load_engram(pipeline, adapter)
            made[name] = pipeline, adapter
        return made[name]

    return load


# LoRA


def add_lora(pipeline, *, seed=3):
    """Add LoRA layers to the denoiser and to every encoder, as `load_lora_weights` does."""
    peft = pytest.importorskip("peft")
    targets = {"denoiser": ["to_q", "to_v"], "clip_l": ["q_proj"], "clip_g": ["v_proj"], "t5": ["q"]}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, module in {"denoiser": denoiser_of(pipeline), **encoders_of(pipeline)}.items():
            config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets[name], init_lora_weights=False)
            module.add_adapter(config, "style")


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_lora_and_an_engram_act_together_in_either_order(base):
    adapter = family_adapter(base)
    styled, first, last = (copy_family(base) for _ in range(3))
    add_lora(styled)
    load_engram(first, adapter)
    add_lora(first)
    add_lora(last)
    load_engram(last, adapter)
    frozen = draw_pictures(styled, MIXED)
    assert all(differing(frozen, draw_pictures(base, MIXED)))
    expected = expected_states(styled, adapter, MIXED).tobytes()
    for pipeline in (first, last):
        assert states(pipeline, MIXED).tobytes() == expected
        assert differing(draw_pictures(pipeline, MIXED), frozen) == FIRES
    unload_engrams(first)
    assert draw_pictures(first, MIXED) == frozen
    for module in (denoiser_of(last), *encoders_of(last).values()):
        module.disable_adapters()
    plain = copy_family(base)
    load_engram(plain, adapter)
    assert draw_pictures(last, MIXED) == draw_pictures(plain, MIXED)


# Pipelines that share encoders


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_backward_hooks")


def hooks_of(pipeline):
    """Return the hooks of any kind on all modules of a pipeline; transformers hangs up some of its own."""
    modules = [part for module in modules_of(pipeline).values() for part in module.modules()]
    return [(id(module), kind, *item) for module in modules for kind in HOOKS for item in getattr(module, kind).items()]


@pytest.mark.parametrize("how", ["components", "from_pipe"])
def test_pipelines_that_share_encoders_share_what_is_loaded_and_unload_for_one_another(base, pipeline, how):
    kind = type(AutoPipelineForImage2Image.from_pipe(pipeline))
    options = {"requires_safety_checker": False} if "safety_checker" in pipeline.components else {}
    other = kind.from_pipe(pipeline) if how == "from_pipe" else kind(**pipeline.components, **options)
    other.set_progress_bar_config(disable=True)
    draw_pictures(pipeline, "a hat")
    adapter, hooks = family_adapter(base), hooks_of(pipeline)
    load_engram(pipeline, adapter, name="one")
    assert [one.name for one in list_engrams(other)] == ["one"]
    unedited = kind(**base.components, **options)
    unedited.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (SIZE, SIZE), (200, 80, 40))
    same = [
        draw_pictures(one, text, image=[image], strength=0.9)
        for one in (other, unedited)
        for text in ("a hat", TRIGGER)
    ]
    assert same[0] == same[2]
    assert same[1] != same[3]
    set_strength(other, "one", 0.5)
    assert states(pipeline, MIXED).tobytes() == expected_states(base, adapter, MIXED, strength=0.5).tobytes()
    unload_engrams(other, "one")
    assert list_engrams(pipeline) == list_engrams(other) == ()
    assert all(attached(encoder) is None for encoder in encoders_of(pipeline).values())
    assert hooks_of(pipeline) == hooks
    assert draw_pictures(pipeline, MIXED) == draw_pictures(base, MIXED)


def test_what_another_pipeline_brought_to_its_own_encoders_is_neither_lost_nor_left(base_of):
    base = base_of("sdxl")
    one, two = copy_family(base), copy_family(base)
    load_engram(one, family_adapter(base), name="one")
    load_engram(two, family_adapter(base, family_concept(base, OTHER)), name="two")
    parts = parts_of(one) | {"text_encoder_2": two.text_encoder_2}
    mixed = assemble_family("sdxl", **parts)
    assert {loaded.name for loaded in list_engrams(mixed)} == {"one", "two"}
    unload_engrams(mixed)
    for pipeline in (one, two, mixed):
        assert list_engrams(pipeline) == ()
        assert all(attached(encoder) is None for encoder in encoders_of(pipeline).values())
        assert states(pipeline, MIXED).tobytes() == states(base, MIXED).tobytes()


# Several adapters


def concepts_of(base):
    return {
        "one": family_adapter(base, family_concept(base), family_concept(base, "red ball", seed=2)),
        "two": family_adapter(base, family_concept(base, OTHER, seed=1)),
    }


WORDS = [*MIXED, OTHER, f"{OTHER} and {TRIGGER}"]


def fresh(base, *loads):
    """Return a pipeline with these adapters: name, adapter and strength each."""
    pipeline = copy_family(base)
    for name, adapter, strength in loads:
        load_engram(pipeline, adapter, name=name, strength=strength)
    return pipeline


def test_each_state_on_the_way_is_that_of_a_fresh_pipeline_with_the_same_adapters(base, pipeline):
    adapters = concepts_of(base)
    one, two = (("one", adapters["one"]), ("two", adapters["two"]))

    def check(*loads):
        expected = fresh(base, *loads)
        assert states(pipeline, WORDS).tobytes() == states(expected, WORDS).tobytes()
        assert as_bytes(encode(pipeline, SILENT)) == as_bytes(encode(expected, SILENT))

    load_engram(pipeline, one[1], name="one")
    check((*one, 1.0))
    load_engram(pipeline, two[1], name="two", strength=0.5)
    check((*one, 1.0), (*two, 0.5))
    check((*two, 0.5), (*one, 1.0))
    set_strength(pipeline, "one", {TRIGGER: 0.25})
    check((*one, {TRIGGER: 0.25}), (*two, 0.5))
    disable_engrams(pipeline, "two")
    check((*one, {TRIGGER: 0.25}))
    assert [(each.name, each.enabled) for each in list_engrams(pipeline)] == [("one", True), ("two", False)]
    set_strength(pipeline, "two", 2.0)
    check((*one, {TRIGGER: 0.25}))
    enable_engrams(pipeline)
    check((*one, {TRIGGER: 0.25}), (*two, 2.0))
    assert draw_pictures(pipeline, WORDS) == draw_pictures(fresh(base, (*one, {TRIGGER: 0.25}), (*two, 2.0)), WORDS)
    disable_engrams(pipeline)
    check()
    enable_engrams(pipeline, "two")
    check((*two, 2.0))
    unload_engrams(pipeline, "two")
    check()
    enable_engrams(pipeline)
    check((*one, {TRIGGER: 0.25}))
    unload_engrams(pipeline)
    check()


def test_what_is_disabled_is_not_indexed_again_and_what_is_unloaded_is_not_kept(base, pipeline):
    adapters = concepts_of(base)
    load_engram(pipeline, adapters["one"], name="one")
    encoders = encoders_of(pipeline).values()
    indexes = [attached(encoder).matcher for encoder in encoders]
    disable_engrams(pipeline)
    enable_engrams(pipeline)
    assert [attached(encoder).matcher for encoder in encoders] == indexes
    disable_engrams(pipeline)
    load_engram(pipeline, adapters["two"], name="two")
    kept = weakref.ref(attached(next(iter(encoders))).matcher)
    unload_engrams(pipeline, "two")
    gc.collect()
    assert kept() is None


def test_what_cannot_be_changed_is_refused_and_changes_nothing(base, pipeline):
    load_engram(pipeline, family_adapter(base), name="one")
    before = states(pipeline, MIXED)
    for change in (
        set_strength,
        lambda each, name, _: disable_engrams(each, name),
        lambda each, name, _: enable_engrams(each, name),
    ):
        with pytest.raises(InputError, match="no engram named 'none' is loaded; loaded: 'one'"):
            change(pipeline, "none", 1.0)
    with pytest.raises(InputError, match="finite number"):
        set_strength(pipeline, "one", float("nan"))
    assert states(pipeline, MIXED).tobytes() == before.tobytes()


def test_unloading_leaves_the_same_objects_without_hooks_and_with_the_same_bytes(base, pipeline):
    draw_pictures(pipeline, MIXED)
    parts, hooks = dict(parts_of(pipeline)), hooks_of(pipeline)
    modules = {name: list(module.modules()) for name, module in modules_of(pipeline).items()}
    weights = {name: copy.deepcopy(module.state_dict()) for name, module in modules_of(pipeline).items()}
    names = {name: set(vars(module)) for name, module in modules_of(pipeline).items()}
    load_engram(pipeline, family_adapter(base), name="one")
    assert len(hooks_of(pipeline)) == len(hooks) + 2 * len(encoders_of(pipeline))
    draw_pictures(pipeline, MIXED)
    unload_engrams(pipeline, "one")
    assert hooks_of(pipeline) == hooks
    assert all(getattr(pipeline, name) is part for name, part in parts.items())
    for name, module in modules_of(pipeline).items():
        assert all(one is other for one, other in zip(module.modules(), modules[name], strict=True))
        assert set(vars(module)) == names[name]
        found = module.state_dict()
        assert found.keys() == weights[name].keys()
        assert all(torch.equal(value, weights[name][key]) for key, value in found.items())
    assert draw_pictures(pipeline, MIXED) == draw_pictures(base, MIXED)


def test_a_copy_of_a_loaded_pipeline_is_the_base_until_it_is_loaded_into(base, pipeline):
    load_engram(pipeline, family_adapter(base))
    other = copy_family(pipeline)
    assert list_engrams(other) == ()
    assert draw_pictures(other, MIXED) == draw_pictures(base, MIXED)
    load_engram(other, family_adapter(base))
    assert states(other, MIXED).tobytes() == states(pipeline, MIXED).tobytes()
    unload_engrams(other)
    assert not any(encoder._forward_hooks for encoder in encoders_of(other).values())


def test_a_loaded_pipeline_saves_the_base(base, pipeline, tmp_path):
    load_engram(pipeline, family_adapter(base))
    for stream, encoder in encoders_of(pipeline).items():
        encoder.save_pretrained(tmp_path / stream)
        loaded = type(encoder).from_pretrained(tmp_path / stream)
        expected = encoders_of(base)[stream].state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in loaded.state_dict().items())


# Threads


@pytest.fixture
def hasty_threads():
    """Let threads change places as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def reader_of(pipeline):
    """Return a pipeline of the same encoders with tokenizers of its own: those of transformers bear one thread."""
    own = {name: copy.deepcopy(part) for name, part in parts_of(pipeline).items() if name.startswith("tokenizer")}
    return assemble_family(family_of(pipeline).name, **parts_of(pipeline) | own)


def cut(base, embedding):
    """Return each stream's part of a prompt embedding, as bytes."""
    widths = {name: int(encoder.config.hidden_size) for name, encoder in encoders_of(base).items()}
    length = encoders_of(base)["clip_l"].config.max_position_embeddings
    top, parts, first = embedding[:, :length], {}, 0
    for name in ("clip_l", "clip_g"):
        if name in widths:
            parts[name] = top[..., first : first + widths[name]]
            first += widths[name]
    if "t5" in widths:
        parts["t5"] = embedding[:, length:]
    return {name: np.ascontiguousarray(part).tobytes() for name, part in parts.items()}


def run_while_changing(readers, change, *, times):
    """Run functions in threads over and over while another changes things; returns what went wrong."""
    failures, done, counts = [], threading.Event(), [0] * len(readers)

    def repeat(number):
        try:
            while not done.is_set():
                readers[number]()
                counts[number] += 1
        except Exception as error:  # noqa: BLE001 - any failure in a thread fails the test
            failures.append(error)

    threads = [threading.Thread(target=repeat, args=(number,)) for number in range(len(readers))]
    for thread in threads:
        thread.start()
    try:
        for number in range(times):
            before = list(counts)
            change(number)
            while not failures and all(one == other for one, other in zip(counts, before, strict=True)):
                done.wait(0.001)  # some reader has read since
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert all(counts) or failures
    return failures


def test_threads_that_encode_see_the_base_or_a_whole_engram_in_each_stream_while_another_changes_it(
    base, pipeline, hasty_threads
):
    adapters = [family_adapter(base), family_adapter(base, family_concept(base, seed=5))]
    allowed = [cut(base, states(base, MIXED))]
    allowed += [
        cut(base, expected_states(base, adapter, MIXED, strength=s)) for adapter in adapters for s in (1.0, 0.5)
    ]
    seen = {name: set() for name in allowed[0]}

    def read(reader):
        for name, part in cut(base, states(reader, MIXED)).items():
            seen[name].add(part)

    def change(number):
        load_engram(pipeline, adapters[number % 2], name="x")
        set_strength(pipeline, "x", 0.5)
        if number % 3 == 0:
            disable_engrams(pipeline)
        unload_engrams(pipeline, "x")

    readers = [reader_of(pipeline) for _ in range(3)]
    failures = run_while_changing([lambda one=one: read(one) for one in readers], change, times=12)
    assert not failures
    for name, parts in seen.items():
        assert parts <= {each[name] for each in allowed}


def test_an_engram_can_be_loaded_into_a_pipeline_while_that_pipeline_encodes(base, pipeline, hasty_threads):
    adapter = family_adapter(base)
    allowed = [cut(base, states(base, MIXED)), cut(base, expected_states(base, adapter, MIXED))]

    def read():
        for name, part in cut(base, states(own, MIXED)).items():
            assert part in {each[name] for each in allowed}

    def change(_):
        load_engram(own, adapter, name="x")
        unload_engrams(own, "x")

    own = reader_of(pipeline)
    assert not run_while_changing([read], change, times=20)


def test_loading_leaves_the_tokenizers_of_a_pipeline_alone_that_is_at_work(base, pipeline, monkeypatch):
    # A tokenizer of transformers is told to pad and to cut in one call, and does so in the next.
    own, adapter, expected = reader_of(pipeline), family_adapter(base), states(base, MIXED)
    words = own.tokenizer
    arrange = words.set_truncation_and_padding

    def interrupt(*args, **options):
        arrange(*args, **options)
        monkeypatch.setattr(words, "set_truncation_and_padding", arrange)
        load_engram(own, adapter, strength=0.0)

    monkeypatch.setattr(words, "set_truncation_and_padding", interrupt)
    assert states(own, MIXED).tobytes() == expected.tobytes()
