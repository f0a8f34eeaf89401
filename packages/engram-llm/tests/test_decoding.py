"""A cache, padding and packing change nothing: the logits are those of one pass over each text alone.

The models' own rounding differs by up to 3e-6 between one pass and several; a memory that lost a token would differ
by a tenth and more.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llm_builders import (
    FAMILIES,
    SETTINGS,
    full,
    in_chunks,
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
from transformers import DynamicCache, StaticCache

from engram_llm import state

EXACT = 1e-5
MATTERS = 0.1

CACHES = {
    "made by the model": lambda model: None,
    "dynamic": lambda model: DynamicCache(config=model.config),
    "dynamic, layers made on the way": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=60),
    "static, just long enough": lambda model: StaticCache(config=model.config, max_cache_len=30),
}
IDS = make_ids(2, 30)
CHUNKS = [7, 1, 1, 6, 2, 13]
UNWINDOWED = ("qwen3", "llama")


def distance(one, other):
    return (one - other).abs().max().item()


EVERY = [(family, name) for family in FAMILIES for name in SETTINGS]
SOME = [(list(FAMILIES)[number % 4], name) for number, name in enumerate(SETTINGS)]
SOME += [("gemma3", "every layer, any order")]
"""Each kind of model and each memory at least once."""


def load(family, name):
    return memories(same_model(family), same_memory(name))


@pytest.fixture(params=EVERY, ids=" ".join)
def loaded(request):
    with load(*request.param) as model:
        yield model


@pytest.fixture(params=SOME, ids=" ".join)
def paired(request):
    with load(*request.param) as model:
        yield model


@pytest.fixture(params=FAMILIES, scope="module")
def with_two(request):
    """Two memories side by side, which share layers and differ in everything else, one of them at another strength."""
    one, other = same_memory("long n-grams, two branches", 1), same_memory("every layer, any order", 2)
    with memories(same_model(request.param), one, (other, 0.6)) as model:
        yield model


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_memory_matters(family, name):
    model = same_model(family)
    base = full(model, IDS)
    with memories(model, same_memory(name)):
        edited = full(model, IDS)
    assert (edited - base).abs().max(-1).values.mean() >= MATTERS
    assert distance(full(model, IDS), base) == 0


def test_token_by_token(loaded):
    assert distance(in_chunks(loaded, IDS[:, :16], [1] * 16), full(loaded, IDS[:, :16])) <= EXACT


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_prompt_and_then_chunks(loaded, cache):
    assert distance(in_chunks(loaded, IDS, CHUNKS, CACHES[cache](loaded)), full(loaded, IDS)) <= EXACT


@pytest.mark.parametrize("cache", CACHES)
def test_every_kind_of_cache(paired, cache):
    assert distance(in_chunks(paired, IDS, CHUNKS, CACHES[cache](paired)), full(paired, IDS)) <= EXACT


@pytest.mark.parametrize("cache", ["made by the model", "static"])
def test_two_memories_side_by_side(with_two, cache):
    assert distance(in_chunks(with_two, IDS, CHUNKS, CACHES[cache](with_two)), full(with_two, IDS)) <= EXACT


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_any_chunks_of_any_texts(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    model = same_model(data.draw(st.sampled_from(sorted(FAMILIES))))
    names = data.draw(st.lists(st.sampled_from(sorted(SETTINGS)), min_size=1, max_size=2))
    cache = CACHES[data.draw(st.sampled_from(list(CACHES)[:-1]))]
    ids = make_ids(data.draw(st.integers(1, 3)), sum(sizes), seed=data.draw(st.integers(0, 5)))
    with memories(model, *(same_memory(name, seed) for seed, name in enumerate(names))):
        assert distance(in_chunks(model, ids, sizes, cache(model)), full(model, ids)) <= EXACT


# Each test can fail: without the state, and with a state that is not moved, the result is another


@pytest.mark.parametrize("lost", ["positions", "inputs"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_without_the_state_the_result_is_another(monkeypatch, lost, cache):
    model, memory = same_model(), same_memory()
    kind = state.GrowingHistory if cache == "dynamic" else state.WindowHistory
    real = getattr(kind, lost)

    def forgetful(self):
        value = real(self)
        if lost == "inputs":
            return torch.zeros_like(value)
        return type(value)(ids=torch.full_like(value.ids, -1), starts=value.starts, plain=False)

    with memories(model, memory):
        expected = full(model, IDS)
        assert distance(in_chunks(model, IDS, [7, 1, 22], CACHES[cache](model)), expected) <= EXACT
        monkeypatch.setattr(kind, lost, forgetful)
        assert distance(in_chunks(model, IDS, [7, 1, 22], CACHES[cache](model)), expected) >= MATTERS


# Padding


def check_rows(logits, mask, alone):
    """Each row's logits at its tokens are those of the row alone."""
    for row, own, expected in zip(logits, mask.bool(), alone, strict=True):
        assert distance(row[own], expected) <= EXACT


ROWS = [IDS[0, :23], IDS[1, :9], make_ids(1, 16, seed=3)[0], make_ids(1, 1, seed=4)[0]]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "no positions"])
def test_rows_of_unequal_length(paired, side, positions):
    ids, mask = pad(ROWS, side)
    fields = {"position_ids": positions_of(mask)} if positions else {}
    alone = [full(paired, row[None])[0] for row in ROWS]
    check_rows(full(paired, ids, attention_mask=mask, **fields), mask, alone)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_padding_with_a_square_mask(implementation):
    model = make_model(attn_implementation=implementation)
    ids, mask = pad(ROWS, "left")
    square = (mask[:, None, :] * torch.ones(mask.shape[1], mask.shape[1]).tril()).bool()[:, None]
    if implementation == "eager":
        square = torch.where(square, 0.0, torch.finfo(torch.float32).min)
    with memories(model, make_memory()):
        alone = [full(model, row[None])[0] for row in ROWS]
        logits = full(model, ids, attention_mask=square, position_ids=positions_of(mask))
        check_rows(logits, mask, alone)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("sizes", [[23], [12, 1, 1, 9], [3, 3, 3, 1, 1, 12]])
def test_left_padded_rows_with_a_cache(paired, cache, sizes):
    ids, mask = pad(ROWS, "left")
    positions, cache, parts, begin = positions_of(mask), CACHES[cache](paired), [], 0
    with torch.no_grad():
        for size in sizes:
            new = slice(begin, begin + size)
            begin += size
            out = paired(
                ids[:, new], attention_mask=mask[:, :begin], position_ids=positions[:, new], past_key_values=cache
            )
            parts.append(out.logits)
    check_rows(torch.cat(parts, dim=1), mask, [full(paired, row[None])[0] for row in ROWS])


# Not with windows in attention: they count padding between tokens, with or without a memory.
@pytest.mark.parametrize(("family", "name"), [(UNWINDOWED[number % 2], name) for number, name in enumerate(SETTINGS)])
@pytest.mark.parametrize(("cache", "sizes"), [("dynamic", [1, 1, 1, 4]), ("static", [1, 1, 4]), ("static", [5, 1, 1])])
def test_decoding_goes_on_after_right_padded_prompts(family, name, cache, sizes):
    texts, lengths = [IDS[0], IDS[1]], [15, 6]
    with load(family, name) as model, torch.no_grad():
        expected = full(model, IDS)
        ids, mask = pad([text[:length] for text, length in zip(texts, lengths, strict=True)], "right")
        cache = CACHES[cache](model)
        out = model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
        check_rows(out.logits, mask, [expected[row, :length] for row, length in enumerate(lengths)])
        for size in sizes:
            mask = torch.cat([mask, mask.new_ones(2, size)], dim=1)
            places = [slice(length, length + size) for length in lengths]
            lengths = [length + size for length in lengths]
            out = model(
                torch.stack([text[place] for text, place in zip(texts, places, strict=True)]),
                attention_mask=mask,
                position_ids=torch.stack([torch.arange(place.start, place.stop) for place in places]),
                past_key_values=cache,
            )
            for row, place in enumerate(places):
                assert distance(out.logits[row], expected[row, place]) <= EXACT


def test_arguments_may_come_in_order_instead_of_by_name(paired):
    decoder = paired.model
    ids, mask = pad(ROWS, "left")
    positions = positions_of(mask)
    with torch.no_grad():
        named = decoder(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
        assert distance(decoder(ids, mask, positions, use_cache=False).last_hidden_state, named) == 0
        cache = DynamicCache(config=paired.config)
        parts = [decoder(IDS[:, a:b], None, None, cache).last_hidden_state for a, b in ((0, 9), (9, 10), (10, 30))]
        assert distance(torch.cat(parts, dim=1), decoder(IDS, use_cache=False).last_hidden_state) <= EXACT


# Packed documents

DOCUMENTS = [12, 1, 8, 2, 7]


def packed(lengths):
    return torch.cat([torch.arange(length) for length in lengths])[None]


def check_documents(model, logits, lengths=DOCUMENTS):
    begin = 0
    for length in lengths:
        place = slice(begin, begin + length)
        begin += length
        assert distance(logits[:, place], full(model, IDS[:, place])) <= EXACT


@pytest.mark.parametrize("expanded", [True, False], ids=["for each row", "for all rows"])
def test_packed_documents_are_apart(paired, expanded):
    check_documents(paired, full(paired, IDS, position_ids=packed(DOCUMENTS).expand(2 if expanded else 1, -1)))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_in_one_row_with_eager_attention(family):
    model = make_model(family, attn_implementation="eager")
    with memories(model, same_memory()):
        logits = full(model, IDS[:1], position_ids=packed(DOCUMENTS))
        begin = 0
        for length in DOCUMENTS:
            place = slice(begin, begin + length)
            begin += length
            assert distance(logits[:, place], full(model, IDS[:1, place])) <= EXACT


def test_packed_documents_of_another_border_in_each_row(paired):
    positions = torch.cat([packed([12, 18]), packed([5, 20, 5])])
    logits = full(paired, IDS, position_ids=positions)
    for row, lengths in enumerate([[12, 18], [5, 20, 5]]):
        begin = 0
        for length in lengths:
            place = slice(begin, begin + length)
            begin += length
            assert distance(logits[row, place], full(paired, IDS[row : row + 1, place])[0]) <= EXACT


def test_packed_documents_that_do_not_begin_at_zero(paired):
    positions = torch.cat([torch.arange(3, 15), torch.arange(40, 48), torch.arange(10, 20)])[None]
    check_documents(paired, full(paired, IDS, position_ids=positions), [12, 8, 10])


@pytest.mark.parametrize(("family", "name"), [(UNWINDOWED[number % 2], name) for number, name in enumerate(SETTINGS)])
@pytest.mark.parametrize("restarting", [True, False], ids=["positions restart", "positions go on"])
def test_documents_apart_by_a_square_mask(family, name, restarting):
    document = torch.repeat_interleave(torch.arange(len(DOCUMENTS)), torch.tensor(DOCUMENTS))
    mask = ((document[:, None] == document) & torch.ones(30, 30).tril().bool())[None, None].expand(2, 1, -1, -1)
    positions = packed(DOCUMENTS) if restarting else torch.arange(30)[None]
    with load(family, name) as model, torch.no_grad():
        check_documents(model, full(model, IDS, attention_mask=mask, position_ids=positions))
        for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=30)):
            parts, begin = [], 0
            for size in (5, 7, 10, 8):  # one chunk ends where a document does, others do not
                stop, width = begin + size, 30 if isinstance(cache, StaticCache) else begin + size
                out = model(
                    IDS[:, begin:stop],
                    attention_mask=mask[:, :, begin:stop, :width],
                    position_ids=positions[:, begin:stop],
                    past_key_values=cache,
                )
                parts.append(out.logits)
                begin = stop
            check_documents(model, torch.cat(parts, dim=1))


def entering(model, number, ids, **fields):
    """What enters a decoder layer, with what memories add."""
    seen = []
    layer = model.model.layers[number]
    with layer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True):
        full(model, ids, **fields)
    return seen[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_memory_crosses_no_border_where_attention_does(family):
    # With a flat mask transformers looks for no documents, so only what enters the first layer can be told apart.
    model, flat = same_model(family), torch.ones(2, 30)
    with memories(model, make_memory(make_settings(layer_ids=(0,), kernel_size=3))):
        alone = entering(model, 0, IDS[:, 12:])
        assert (
            distance(entering(model, 0, IDS, attention_mask=flat, position_ids=packed([12, 18]))[:, 12:], alone)
            <= EXACT
        )
        assert distance(entering(model, 0, IDS, attention_mask=flat)[:, 12:], alone) >= MATTERS


# The cache moves, and the memory's state with it


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_rows_are_reordered(paired, cache):
    order = torch.tensor([1, 1])
    cache = CACHES[cache](paired)
    in_chunks(paired, IDS[:, :13], [12, 1], cache)
    cache.reorder_cache(order)
    assert distance(rest(paired, IDS[order], 13, cache), full(paired, IDS[order])[:, 13:]) <= EXACT


def rest(model, ids, begin, cache):
    with torch.no_grad():
        parts = [model(ids[:, place : place + 1], past_key_values=cache).logits for place in range(begin, begin + 5)]
        parts.append(model(ids[:, begin + 5 :], past_key_values=cache).logits)
    return torch.cat(parts, dim=1)


def test_rows_are_selected_and_repeated(paired):
    cache = DynamicCache(config=paired.config)
    in_chunks(paired, IDS[:, :13], [13], cache)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(3)
    rows = IDS[[1, 1, 1, 0, 0, 0]]
    assert distance(rest(paired, rows, 13, cache), full(paired, rows)[:, 13:]) <= EXACT
    cache = DynamicCache(config=paired.config)
    in_chunks(paired, IDS[:, :13], [13], cache)
    cache.batch_select_indices(torch.tensor([1]))
    assert distance(rest(paired, IDS[1:], 13, cache), full(paired, IDS[1:])[:, 13:]) <= EXACT


@pytest.mark.parametrize("removed", [1, 4, 12])
def test_positions_are_forgotten(paired, removed):
    other = torch.cat([IDS[:, : 13 - removed], IDS.flip(1)[:, : 17 + removed]], dim=1)
    cache = DynamicCache(config=paired.config)
    cache.activate_past_recording()
    in_chunks(paired, IDS[:, :13], [8, 5], cache)
    cache.crop(-removed)
    found = rest(paired, other, 13 - removed, cache)
    assert distance(found, full(paired, other)[:, 13 - removed :]) <= EXACT


def test_all_positions_are_forgotten():
    model = same_model("llama")
    with memories(model, same_memory()):
        cache = DynamicCache(config=model.config)
        in_chunks(model, IDS, [30], cache)
        cache.crop(-30)
        assert distance(in_chunks(model, IDS.flip(1), [9, 21], cache), full(model, IDS.flip(1))) <= EXACT


@pytest.mark.parametrize("cache", ["dynamic", "dynamic, layers made on the way", "static"])
def test_a_cache_is_emptied_and_used_again(paired, cache):
    cache = CACHES[cache](paired)
    in_chunks(paired, IDS.flip(1), [7, 1, 22], cache)
    cache.reset()
    assert distance(in_chunks(paired, IDS, [7, 1, 22], cache), full(paired, IDS)) <= EXACT


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_copy_of_a_cache_goes_its_own_way(paired, cache):
    with torch.no_grad():
        cache = paired(IDS[:, :13], past_key_values=CACHES[cache](paired)).past_key_values
    other = copy.deepcopy(cache)
    turned = torch.cat([IDS[:, :13], IDS[:, 13:].flip(1)], dim=1)
    assert distance(rest(paired, turned, 13, other), full(paired, turned)[:, 13:]) <= EXACT
    assert distance(rest(paired, IDS, 13, cache), full(paired, IDS)[:, 13:]) <= EXACT


def test_a_row_that_is_padding_so_far(paired):
    ids, mask = pad([IDS[0], IDS[1, :3]], "left")
    cache, parts = DynamicCache(config=paired.config), []
    positions = positions_of(mask)
    with torch.no_grad():
        for begin, stop in ((0, 1), (1, 9), (9, 26), (26, 28), (28, 30)):
            parts.append(
                paired(
                    ids[:, begin:stop],
                    attention_mask=mask[:, :stop],
                    position_ids=positions[:, begin:stop],
                    past_key_values=cache,
                ).logits
            )
    check_rows(torch.cat(parts, dim=1), mask, [full(paired, IDS[:1])[0], full(paired, IDS[1:, :3])[0]])
