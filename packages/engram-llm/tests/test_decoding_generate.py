"""`generate` in all its ways gives what it gives without a cache, and what it gives to each text alone."""

import copy
import threading

import pytest
import torch
from llm_builders import (
    FAMILIES,
    KNOWN,
    SETTINGS,
    full,
    make_ids,
    make_model,
    memories,
    pad,
    same_memory,
    same_model,
)
from transformers import DynamicCache, StaticCache

from engram_llm.attachment import attach, attached, detach

EXACT = 1e-5
PROMPTS = make_ids(2, 9, seed=11)
NEW = 12

PAIRS = [(list(FAMILIES)[number % 4], name) for number, name in enumerate(SETTINGS)] + [
    ("gemma3", "every layer, any order")
]
ONCE = [("qwen3", "published"), ("gemma3", "long n-grams, two branches")]


@pytest.fixture(params=PAIRS, ids=" ".join)
def paired(request):
    family, name = request.param
    with memories(same_model(family), same_memory(name)) as model:
        yield model


@pytest.fixture(params=ONCE, ids=" ".join)
def loaded(request):
    family, name = request.param
    with memories(same_model(family), same_memory(name), (same_memory("long window, last layer", 5), 0.8)) as model:
        yield model


def greedy(model, ids, new=NEW, **options):
    return model.generate(ids, max_new_tokens=new, do_sample=False, **options)


def steps(model, ids, new=NEW, **options):
    """The tokens of a greedy generation, and the logits each was chosen by [B, L, KNOWN]."""
    out = greedy(model, ids, new, return_dict_in_generate=True, output_logits=True, **options)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)[..., :KNOWN]


def same(one, other):
    (tokens, logits), (expected, known) = one, other
    assert torch.equal(tokens, expected)
    assert (logits - known).abs().max() <= EXACT


WAYS = {
    "a dynamic cache": {},
    "a dynamic cache, prompt in chunks": {"prefill_chunk_size": 4},
    "a static cache": {"cache_implementation": "static"},
    "a static cache, prompt in chunks": {"cache_implementation": "static", "prefill_chunk_size": 4},
}


def test_the_memory_changes_what_is_generated(paired):
    tokens, logits = steps(paired, PROMPTS)
    logits_again = full(paired, torch.cat([PROMPTS, tokens], dim=1))[:, PROMPTS.shape[1] - 1 : -1, :KNOWN]
    assert (logits - logits_again).abs().max() <= EXACT
    actives = attached(paired)
    detach(paired)
    bare = steps(paired, PROMPTS)
    attach(paired, actives)
    assert (bare[1][:, 0] - logits[:, 0]).abs().max() >= 0.1
    assert not torch.equal(bare[0], tokens)


@pytest.mark.parametrize("way", WAYS)
def test_greedy(paired, way):
    same(steps(paired, PROMPTS, 8, **WAYS[way]), steps(paired, PROMPTS, 8, use_cache=False))


def check_left_padded(model, **options):
    rows = [make_ids(1, length, seed=20 + length)[0] for length in (14, 5, 2)]
    ids, mask = pad(rows, "left")
    tokens, logits = steps(model, ids, 8, attention_mask=mask, **options)
    for number, row in enumerate(rows):
        same((tokens[number : number + 1], logits[number : number + 1]), steps(model, row[None], 8))


@pytest.mark.parametrize("way", ["a dynamic cache", "a static cache"])
def test_a_left_padded_batch_gives_each_text_what_it_gets_alone(paired, way):
    check_left_padded(paired, **WAYS[way])


@pytest.mark.parametrize("way", [*list(WAYS)[1::2], "no cache"])
def test_a_left_padded_batch_with_its_prompt_in_chunks(loaded, way):
    check_left_padded(loaded, **WAYS.get(way, {"use_cache": False}))


def test_padding_in_chunks_longer_than_the_window_of_attention():
    with memories(same_model("mistral"), same_memory()) as model:
        check_left_padded(model, **WAYS["a static cache, prompt in chunks"])


@pytest.mark.parametrize("way", ["a dynamic cache", "a static cache"])
def test_beams_are_reordered(paired, way):
    options = {"num_beams": 4, "num_return_sequences": 3}
    expected = greedy(paired, PROMPTS, use_cache=False, **options)
    assert torch.equal(greedy(paired, PROMPTS, **WAYS[way], **options), expected)
    assert expected.shape[0] == 6
    assert len({tuple(row) for row in expected.tolist()}) == 6


def test_beams_with_padding(loaded):
    rows = [make_ids(1, length, seed=30)[0] for length in (11, 4)]
    ids, mask = pad(rows, "left")
    found = greedy(loaded, ids, attention_mask=mask, num_beams=3)
    for number, row in enumerate(rows):
        assert torch.equal(found[number, -NEW:], greedy(loaded, row[None], num_beams=3)[0, -NEW:])


@pytest.mark.parametrize("tokens", [2, 5])
def test_tokens_looked_up_in_the_prompt(loaded, tokens):
    prompt = PROMPTS[:1].repeat(1, 3)
    expected = greedy(loaded, prompt, 20, use_cache=False)
    assert torch.equal(greedy(loaded, prompt, 20, prompt_lookup_num_tokens=tokens), expected)


@pytest.mark.parametrize("remembers", [True, False], ids=["with the memory", "without a memory"])
def test_an_assistant_proposes_tokens(loaded, remembers):
    # One that proposes what is accepted, and one whose proposals are mostly forgotten again.
    assistant = make_model("qwen3" if remembers else "llama")
    expected = greedy(loaded, PROMPTS[:1], 20, use_cache=False)
    with memories(assistant, *([same_memory()] if remembers else [])):
        assistant.generation_config.suppress_tokens = None
        found = loaded.generate(PROMPTS[:1], max_new_tokens=20, do_sample=False, assistant_model=assistant)
    assert torch.equal(found, expected)


def test_the_first_layers_propose_tokens(loaded):
    expected = greedy(loaded, PROMPTS[:1], 20, use_cache=False)
    options = {"assistant_early_exit": 2}
    loaded.generation_config.suppress_tokens = None
    try:
        assert torch.equal(greedy(loaded, PROMPTS[:1], 20, **options), expected)
    finally:
        loaded.generation_config.suppress_tokens = list(range(KNOWN, 200))


@pytest.mark.parametrize("way", ["a dynamic cache", "a static cache"])
def test_sampling_with_several_results(loaded, way):
    def sample(**options):
        torch.manual_seed(0)
        return loaded.generate(PROMPTS, max_new_tokens=NEW, do_sample=True, num_return_sequences=3, **options)

    expected = sample(use_cache=False)
    assert torch.equal(sample(**WAYS[way]), expected)
    assert len({tuple(row) for row in expected.tolist()}) == 6


@pytest.mark.parametrize("only_new", [False, True], ids=["the whole text", "the new tokens alone"])
@pytest.mark.parametrize("make", [lambda model: None, lambda model: StaticCache(config=model.config, max_cache_len=60)])
def test_generation_goes_on_from_a_cache(loaded, make, only_new):
    expected = greedy(loaded, PROMPTS, NEW)
    cache = make(loaded)
    first = greedy(loaded, PROMPTS, 5, return_dict_in_generate=True, past_key_values=cache)
    held = first.past_key_values.get_seq_length()
    options = {"past_key_values": first.past_key_values}
    ids = first.sequences
    if only_new:
        options["attention_mask"] = torch.ones_like(ids)
        ids = ids[:, int(held) :]
    found = greedy(loaded, ids, NEW - 5, **options)
    assert torch.equal(found[:, -(NEW - 5) :], expected[:, -(NEW - 5) :])


def test_a_conversation_goes_on(loaded):
    """A returned cache, and several new tokens after what was generated, padded rows included."""
    rows = [make_ids(1, length, seed=40 + length)[0] for length in (9, 4)]
    ids, mask = pad(rows, "left")
    first = greedy(loaded, ids, 6, attention_mask=mask, return_dict_in_generate=True)
    turn = make_ids(2, 5, seed=50)
    ids = torch.cat([first.sequences, turn], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, 11)], dim=1)
    tokens, logits = steps(loaded, ids, attention_mask=mask, past_key_values=first.past_key_values)
    for number, row in enumerate(rows):
        alone = torch.cat([row, first.sequences[number, -6:], turn[number]])[None]
        same((tokens[number : number + 1], logits[number : number + 1]), steps(loaded, alone, use_cache=False))


def test_a_shared_prompt_is_read_once(loaded):
    """One cache of a common beginning, copied for each ending."""
    common = PROMPTS[:1]
    with torch.no_grad():
        cache = loaded(common, past_key_values=DynamicCache(config=loaded.config)).past_key_values
    for seed in (60, 61):
        ids = torch.cat([common, make_ids(1, 4, seed=seed)], dim=1)
        found = steps(loaded, ids, past_key_values=copy.deepcopy(cache))
        same(found, steps(loaded, ids, use_cache=False))


def test_rows_that_end_early_disturb_none(loaded):
    tokens, _ = steps(loaded, PROMPTS)
    end = int(tokens[0, 3])
    found = greedy(loaded, PROMPTS, eos_token_id=end, pad_token_id=5)[:, PROMPTS.shape[1] :]
    for row in range(2):
        alone = greedy(loaded, PROMPTS[row : row + 1], eos_token_id=end, pad_token_id=5)[0, PROMPTS.shape[1] :]
        assert torch.equal(found[row, : len(alone)], alone)


def test_two_threads_at_once(loaded):
    prompts = [make_ids(1, length, seed=70 + length) for length in (7, 12)]
    expected = [greedy(loaded, prompt, 15) for prompt in prompts]
    found = [[], []]
    barrier = threading.Barrier(2)

    def work(number):
        barrier.wait()
        for _ in range(2):
            found[number].append(greedy(loaded, prompts[number], 15))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for results, alone in zip(found, expected, strict=True):
        assert len(results) == 2
        assert all(torch.equal(result, alone) for result in results)
