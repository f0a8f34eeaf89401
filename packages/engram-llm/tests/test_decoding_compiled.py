"""Compiled models give what they give uncompiled, in as many graphs as without a memory."""

import contextlib

import pytest
import torch
from llm_builders import (
    KNOWN,
    full,
    in_chunks,
    make_file,
    make_ids,
    make_memory,
    make_model,
    make_settings,
    memories,
    pad,
    positions_of,
    same_memory,
    same_model,
)
from torch._dynamo.testing import CompileCounter
from transformers import CompileConfig, DynamicCache, StaticCache

from engram_core import InputError
from engram_llm.attachment import Active, attach, attached, detach, prepare_cache
from engram_llm.loading import disable_memories, enable_memories, load_memory, unload_memories

EXACT = 1e-5
IDS = make_ids(2, 30)
CHUNKS = [9, 1, 1, 1, 4, 14]


@pytest.fixture(autouse=True)
def forget():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counter():
    return CompileCounter()


@contextlib.contextmanager
def small():
    """Two layers, which are compiled in half the time."""
    memory = make_memory(make_settings(layer_ids=(1,), hc_mult=2))
    with memories(make_model(num_hidden_layers=2), memory) as model:
        yield model


@pytest.fixture(params=["small", pytest.param("gemma3", marks=pytest.mark.slow)])
def loaded(request):
    if request.param == "small":
        with small() as model:
            yield model
        return
    with memories(same_model(request.param), same_memory(), (same_memory("long n-grams, two branches"), 0.7)) as model:
        yield model


def distance(one, other):
    return (one - other).abs().max().item()


def decode(model, compiled, cache, begin=9):
    """The logits of a prompt and then of one compiled pass for each token, positions given as `generate` does."""
    with torch.no_grad():
        parts = [model(IDS[:, :begin], past_key_values=cache).logits]
        for place in range(begin, 30):
            position = torch.full((1, 1), place)
            parts.append(compiled(IDS[:, place : place + 1], past_key_values=cache, position_ids=position).logits)
    return torch.cat(parts, dim=1)


def test_one_pass_is_one_graph(loaded, counter):
    expected = full(loaded, IDS)
    compiled = torch.compile(loaded, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert distance(compiled(IDS).logits, expected) <= EXACT  # with the cache that it makes
    assert counter.frame_count == 1


def test_decoding_with_a_static_cache_is_one_graph(counter):
    with small() as model:
        compiled = torch.compile(model, backend=counter, fullgraph=True)
        found = decode(model, compiled, StaticCache(config=model.config, max_cache_len=30))
        assert counter.frame_count == 1
        assert distance(found, full(model, IDS)) <= EXACT


@pytest.mark.slow
def test_a_memory_costs_no_graph(loaded):
    actives, counts = attached(loaded), []
    expected = full(loaded, IDS)
    for make in (
        lambda: DynamicCache(config=loaded.config),
        lambda: StaticCache(config=loaded.config, max_cache_len=30),
    ):
        for bare in (True, False):
            detach(loaded)
            if not bare:
                attach(loaded, actives)
            torch._dynamo.reset()
            counter = CompileCounter()
            compiled, cache = torch.compile(loaded, backend=counter), make()
            found = (
                in_chunks(compiled, IDS, CHUNKS, cache)
                if isinstance(cache, DynamicCache)
                else decode(loaded, compiled, cache)
            )
            counts.append(counter.frame_count)
            assert bare == (distance(found, expected) > 0.1)
    assert counts[0] == counts[1]
    assert counts[2] == counts[3]


@pytest.mark.slow
def test_a_whole_graph_may_fill_a_static_cache_that_is_prepared(loaded, counter):
    cache = StaticCache(config=loaded.config, max_cache_len=30)
    prepare_cache(loaded, cache, 2)
    compiled = torch.compile(loaded, backend=counter, fullgraph=True)
    assert distance(decode(compiled, compiled, cache), full(loaded, IDS)) <= EXACT


@pytest.mark.slow
def test_a_compiled_model_may_fill_a_static_cache(loaded, counter):
    compiled = torch.compile(loaded, backend=counter)
    cache = StaticCache(config=loaded.config, max_cache_len=30)
    assert distance(decode(compiled, compiled, cache), full(loaded, IDS)) <= EXACT


@pytest.mark.slow
def test_padding_and_packed_documents_are_one_graph(loaded, counter):
    compiled = torch.compile(loaded, backend=counter, fullgraph=True)
    ids, mask = pad([IDS[0], IDS[1, :11]], "left")
    positions = torch.cat([torch.arange(12), torch.arange(18)])[None]
    with torch.no_grad():
        found = compiled(ids, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
        assert distance(found[1, -11:], full(loaded, IDS[1:, :11])[0]) <= EXACT
        found = compiled(IDS, position_ids=positions, use_cache=False).logits
    assert distance(found[:, 12:], full(loaded, IDS[:, 12:])) <= EXACT
    assert counter.frame_count == 2


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"prefill_chunk_size": 6}], ids=["whole prompt", "prompt in chunks"])
def test_generate_compiles_by_itself(loaded, options):
    compiling = CompileConfig(backend="eager", mode=None)
    compiling._compile_all_devices = True
    ids, mask = pad([IDS[0, :20], IDS[1, :7]], "left")

    def generate(**more):
        out = loaded.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, return_dict_in_generate=True,
            output_logits=True, **more,
        )  # fmt: skip
        return out.sequences, torch.stack(out.logits)[..., :KNOWN]

    tokens, logits = generate(cache_implementation="static", compile_config=compiling, **options)
    expected, known = generate()
    assert torch.equal(tokens, expected)
    assert distance(logits, known) <= EXACT


@pytest.mark.slow
def test_machine_code():
    with small() as model:
        compiled = torch.compile(model, fullgraph=True)
        with torch.no_grad():
            assert distance(compiled(IDS, use_cache=False).logits, full(model, IDS)) <= EXACT
        found = decode(model, compiled, StaticCache(config=model.config, max_cache_len=30))
        assert distance(found, full(model, IDS)) <= EXACT


@pytest.mark.slow
def test_tables_on_the_host():
    model = make_model()
    load_memory(model, make_file(), host_tables=True)
    compiled = torch.compile(model, backend="eager")
    expected = full(model, IDS)
    with torch.no_grad():
        assert distance(compiled(IDS, use_cache=False).logits, expected) <= EXACT
    assert distance(decode(model, compiled, StaticCache(config=model.config, max_cache_len=30)), expected) <= EXACT


@pytest.mark.slow
def test_what_changes_is_compiled_anew(counter):
    model, memory = make_model(), same_memory()
    compiled = torch.compile(model, backend=counter)

    def check():
        with torch.no_grad():
            found = compiled(IDS, use_cache=False).logits
        assert distance(found, full(model, IDS)) <= EXACT
        return found

    bare = check()
    attach(model, [Active(memory, 1.0)])
    whole = check()
    attach(model, [Active(memory, 0.5)])
    half = check()
    detach(model)
    assert distance(check(), bare) == 0
    assert min(distance(whole, bare), distance(half, bare), distance(whole, half)) > 0.1


@pytest.mark.slow
def test_a_cache_that_the_memory_has_not_read_is_refused():
    model = make_model()
    load_memory(model, make_file(), name="toy")
    compiled = torch.compile(model, backend="eager")

    def filled():
        cache = StaticCache(config=model.config, max_cache_len=30)
        with torch.no_grad():
            model(IDS[:, :9], past_key_values=cache)
        return cache

    def step(cache, place=9):
        with torch.no_grad():
            compiled(IDS[:, place : place + 1], past_key_values=cache, position_ids=torch.full((1, 1), place))

    step(filled())

    disable_memories(model)
    cache = filled()
    enable_memories(model)
    with pytest.raises(InputError, match="holds 9 positions, of which the memory has read 0"):
        step(cache)

    cache = filled()
    step(cache)
    disable_memories(model)
    step(cache, 10)
    enable_memories(model)
    with pytest.raises(InputError, match="holds 11 positions, of which the memory has read 10"):
        step(cache, 11)
    unload_memories(model)


@pytest.mark.slow
@pytest.mark.parametrize("token", [KNOWN, -1])
def test_unknown_token_ids_give_no_answer(token):
    with memories(make_model(), same_memory()) as model, torch.no_grad(), pytest.raises(IndexError):
        torch.compile(model, backend="eager")(torch.full((1, 5), token), use_cache=False)
