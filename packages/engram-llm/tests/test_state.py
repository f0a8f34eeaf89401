"""Caches that cannot carry what a memory remembers, or hold what it has not read, are refused; never a wrong answer."""

import copy
import io
import pickle

import pytest
import torch
from llm_builders import (
    full,
    in_chunks,
    make_file,
    make_ids,
    make_memory,
    make_model,
    make_settings,
    memories,
    same_memory,
    same_model,
)
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, StaticCache
from transformers.cache_utils import DynamicIndexedLayer, LinearAttentionLayer, QuantizedLayer
from transformers.generation.continuous_batching.cache import PagedAttentionCache

from engram_core import InputError
from engram_llm.attachment import Active, attach, detach, prepare_cache
from engram_llm.loading import (
    disable_memories,
    enable_memories,
    load_memory,
    set_strength,
    unload_memories,
)

EXACT = 1e-5
IDS = make_ids(2, 30)


def distance(one, other):
    return (one - other).abs().max().item()


@pytest.fixture
def model():
    with memories(same_model(), same_memory()) as loaded:
        yield loaded


@pytest.fixture
def free():
    """A model of the test's own, with one memory loaded."""
    model = make_model()
    load_memory(model, make_file(), name="toy")
    return model


MAKERS = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=40),
}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


def step(model, cache, begin, stop):
    with torch.no_grad():
        return model(IDS[:, begin:stop], past_key_values=cache).logits


class Quantised(QuantizedLayer):
    """Needs no further library, and quantises nothing."""

    def _quantize(self, tensor, axis=None):
        return tensor

    def _dequantize(self, q_tensor):
        return q_tensor


@pytest.mark.parametrize(
    "layer", [Quantised, DynamicIndexedLayer, LinearAttentionLayer], ids=lambda kind: kind.__name__
)
def test_other_kinds_of_layers_are_refused(model, layer):
    cache = DynamicCache(config=model.config)
    cache.layers[3] = layer()
    with pytest.raises(
        InputError, match=rf"kept in a DynamicCache with a {layer.__name__}; use a DynamicCache or a St"
    ):
        step(model, cache, 0, 5)


def test_a_cache_of_encoder_and_decoder_is_refused(model):
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    with pytest.raises(InputError, match="the memory cannot be kept in a EncoderDecoderCache; use a DynamicCache or"):
        step(model, cache, 0, 5)


def test_what_is_no_cache_is_refused(model):
    class Legacy:
        def get_seq_length(self):
            return 0

    with pytest.raises(InputError, match="cannot be kept in a Legacy"):
        model.model(IDS, past_key_values=Legacy())


def test_a_cache_with_too_few_layers_is_refused(model):
    cache = DynamicCache(config=model.config)
    del cache.layers[1:]
    with pytest.raises(InputError, match="the cache has 1 layers, a memory stands before layer 1"):
        step(model, cache, 0, 5)


PAGED = "the memory cannot be kept in a PagedAttentionCache, as continuous batching uses; use generate"


def test_a_paged_cache_is_refused(model):
    cache = object.__new__(PagedAttentionCache)
    with pytest.raises(InputError, match=PAGED):
        model.model(IDS, position_ids=torch.arange(30)[None], cache=cache, use_cache=False)


@pytest.mark.slow
def test_continuous_batching_is_refused(model):
    options = GenerationConfig(max_new_tokens=3, eos_token_id=4, pad_token_id=5)
    outputs = model.generate_batch([IDS[0, :6].tolist()], generation_config=options)
    assert [one.error for one in outputs.values()] == [PAGED]


def test_a_static_cache_is_neither_cropped_nor_repeated(model):
    cache = MAKERS["static"](model)
    step(model, cache, 0, 5)
    history = next(iter(cache.layers[1].histories.values()))
    with pytest.raises(InputError, match="a static cache cannot forget 2 positions; use a dynamic cache"):
        history.crop(2)
    with pytest.raises(InputError, match="a static cache cannot repeat its rows 3 times; use a dynamic cache"):
        history.repeat(3)


def test_a_cache_filled_before_the_memory_came_is_refused(make):
    model = make_model()
    cache = make(model)
    step(model, cache, 0, 9)
    load_memory(model, make_file())
    with pytest.raises(InputError, match="the cache holds 9 positions, of which the memory has read 0; begin with an"):
        step(model, cache, 9, 10)


def test_a_memory_that_comes_beside_another_needs_an_empty_cache(free, make):
    cache = make(free)
    step(free, cache, 0, 9)
    load_memory(free, make_file(seed=1), name="other")
    with pytest.raises(InputError, match="the cache holds 9 positions, of which the memory has read 0"):
        step(free, cache, 9, 10)
    unload_memories(free, "other")
    assert distance(step(free, cache, 9, 30), full(free, IDS)[:, 9:]) <= EXACT


def test_a_memory_unloaded_and_loaded_again_is_another(free, make):
    cache = make(free)
    step(free, cache, 0, 9)
    unload_memories(free)
    load_memory(free, make_file(), name="toy")
    with pytest.raises(InputError, match="holds 9 positions, of which the memory has read 0"):
        step(free, cache, 9, 10)


@pytest.mark.parametrize("pause", ["disabled", "strength 0"])
def test_a_memory_that_missed_positions_is_refused(free, make, pause):
    cache = make(free)
    step(free, cache, 0, 9)
    if pause == "disabled":
        disable_memories(free)
    else:
        set_strength(free, "toy", 0)
    step(free, cache, 9, 12)
    if pause == "disabled":
        enable_memories(free)
    else:
        set_strength(free, "toy", 1)
    with pytest.raises(InputError, match="the cache holds 12 positions, of which the memory has read 9"):
        step(free, cache, 12, 13)


def test_a_pause_without_a_pass_does_no_harm(free, make):
    cache = make(free)
    step(free, cache, 0, 9)
    disable_memories(free)
    enable_memories(free)
    assert distance(step(free, cache, 9, 30), full(free, IDS)[:, 9:]) <= EXACT


def test_a_cache_goes_on_without_the_memory_as_the_model_does(free, make):
    cache = make(free)
    first = step(free, cache, 0, 9)
    unload_memories(free)
    cache.reset()
    assert distance(step(free, cache, 0, 30), full(free, IDS)) <= EXACT
    assert distance(full(free, IDS)[:, :9], first) > 0.1


def test_the_strength_may_change_between_passes(make):
    model, seen = make_model(), []
    load_memory(model, make_file(make_settings(layer_ids=(0,), kernel_size=4, dilation=1)), name="toy")
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    set_strength(model, "toy", 0.5)
    full(model, IDS)
    cache = make(model)
    set_strength(model, "toy", 2)
    step(model, cache, 0, 9)
    set_strength(model, "toy", 0.5)
    step(model, cache, 9, 30)
    # What enters the first layer depends on the memory alone, whose state knows no strength.
    assert distance(seen[2], seen[0][:, 9:]) <= EXACT
    assert distance(seen[1], seen[0][:, :9]) > 0.1


def test_a_pass_that_failed_halfway_spoils_the_cache_and_says_so(model, make, monkeypatch):
    cache = make(model)
    step(model, cache, 0, 9)
    layer = model.model.layers[3]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            step(model, cache, 9, 10)
    with pytest.raises(InputError, match=r"the cache holds (9|10) positions, of which the memory has read (10|9)"):
        step(model, cache, 10, 11)


def test_each_layer_is_looked_at(model):
    cache = DynamicCache(config=model.config)
    step(model, cache, 0, 9)
    for history in cache.layers[3].histories.values():
        history.crop(1)
    with pytest.raises(InputError, match="the cache holds 9 positions, of which the memory has read 8"):
        step(model, cache, 9, 10)


def test_caches_are_copied_and_pickled_with_what_they_carry(model, make):
    cache = make(model)
    step(model, cache, 0, 9)
    buffer = io.BytesIO()
    pickle.dump(cache, buffer)
    for other in (copy.deepcopy(cache), pickle.loads(buffer.getvalue())):  # noqa: S301 - the test's own bytes
        assert distance(step(model, other, 9, 30), full(model, IDS)[:, 9:]) <= EXACT


def test_a_stored_cache_is_of_no_use_to_another_memory(make):
    """Even one made from the same file: what stood in the cache's process under a number is another's here."""
    model = make_model()
    load_memory(model, make_file())
    cache = make(model)
    step(model, cache, 0, 9)
    other = make_model()
    load_memory(other, make_file())
    with pytest.raises(InputError, match="holds 9 positions, of which the memory has read 0"):
        step(other, pickle.loads(pickle.dumps(cache)), 9, 10)  # noqa: S301 - the test's own bytes


def test_a_prepared_cache_is_empty(model, make):
    cache = make(model)
    prepare_cache(model, cache, 2)
    assert int(cache.get_seq_length()) == 0
    assert distance(in_chunks(model, IDS, [9, 1, 20], cache), full(model, IDS)) <= EXACT
    with pytest.raises(InputError, match="holds 30 positions, of which the memory has read 0"):
        prepare_filled(model, make)


def prepare_filled(model, make):
    detach(model)
    cache = make(model)
    step(model, cache, 0, 30)
    attach(model, [Active(same_memory(), 1.0)])
    prepare_cache(model, cache, 2)


def test_without_a_memory_there_is_nothing_to_prepare():
    cache = DynamicCache()
    prepare_cache(same_model(), cache, 2)
    assert len(cache.layers) == 0


def test_a_cache_may_belong_to_several_models_with_one_memory():
    """A memory's state has the memory's key: a copy of a model goes on from the cache of the first."""
    model = make_model()
    attach(model, [Active(make_memory(), 1.0)])
    other = copy.deepcopy(model)
    cache = DynamicCache(config=model.config)
    step(model, cache, 0, 9)
    assert distance(step(other, cache, 9, 30), full(model, IDS)[:, 9:]) <= EXACT
