"""Memories are put into models and taken out without a trace, in every setting a model is used in."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from llm_builders import (
    FAMILIES,
    KNOWN,
    VOCABULARY,
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
    state_bytes,
)
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from engram_core import InputError
from engram_llm.attachment import Active, attach, attached, detach, find_decoder
from engram_llm.quiet import quiet_libraries

EXACT = 1e-5
IDS = make_ids(2, 30)


def distance(one, other):
    return (one - other).abs().max().item()


def hooks(model):
    """Everything that is hooked to any part of a model."""
    names = [name for name in vars(nn.Module()) if name.endswith(("hooks", "hooks_with_kwargs", "hooks_always_called"))]
    return [(name, key) for part in model.modules() for name in names for key in getattr(part, name) or ()]


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_left_behind(family):
    model = make_model(family)
    before, logits, attributes = state_bytes(model), full(model, IDS), dir(model.model)
    assert hooks(model) == []
    attach(model, [Active(make_memory(), 1.0), Active(make_memory(seed=1), 0.5)])
    assert len(hooks(model)) == 2 * (1 + len(model.model.layers))  # each is listed among those with keywords too
    assert state_bytes(model) == before
    assert not any("engram" in name for name, _ in model.named_modules())
    assert distance(full(model, IDS), logits) > 0.1
    detach(model)
    detach(model)
    assert hooks(model) == []
    assert dir(model.model) == attributes
    assert full(model, IDS).numpy().tobytes() == logits.numpy().tobytes()
    assert state_bytes(model) == before


def test_hooks_of_others_stay():
    model, seen = make_model(), []
    model.model.register_forward_pre_hook(lambda *_: seen.append("decoder"))
    model.model.layers[1].register_forward_pre_hook(lambda *_: seen.append("layer"))
    kept = hooks(model)
    with memories(model, same_memory()):
        full(model, IDS)
    assert hooks(model) == kept
    full(model, IDS)
    assert seen == ["decoder", "layer"] * 2


def test_what_is_in_force_is_replaced_as_a_whole():
    model, one, other = make_model(), same_memory(), same_memory(seed=1)
    attach(model, [Active(one, 1.0)])
    first, count = full(model, IDS), len(hooks(model))
    attach(model, [Active(one, 1.0), Active(other, 1.0)])
    assert [active.memory for active in attached(model)] == [one, other]
    assert len(hooks(model)) == count
    assert distance(full(model, IDS), first) > 0.1
    attach(model, [Active(one, 1.0)])
    assert distance(full(model, IDS), first) == 0
    attach(model, [])
    assert attached(model) == ()
    assert hooks(model) == []


def test_a_model_with_memories_can_be_freed():
    model = make_model()
    attach(model, [Active(make_memory(), 1.0)])
    full(model, IDS)
    gone = weakref.ref(model.model)
    del model
    gc.collect()
    assert gone() is None


def test_residuals_add_up():
    model, seen = make_model(), []
    model.model.layers[1].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    one, other = (make_memory(make_settings(layer_ids=(1,)), seed=seed) for seed in (0, 1))

    def entering(*many):
        with memories(model, *many):
            # Hooks run in the order in which they came, so this one sees the memory's sum.
            hook = model.model.layers[1].register_forward_pre_hook(
                lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True
            )
            full(model, IDS)
            hook.remove()
        return seen[-1]

    base = entering()
    first, second = entering(one) - base, entering(other) - base
    assert distance(entering(one, (other, 0.25)) - base, first + 0.25 * second) <= EXACT
    assert distance(entering((one, -2.0)) - base, -2 * first) <= EXACT
    assert min(first.abs().max(), second.abs().max()) > 0.5


# Inputs


def test_embeddings_instead_of_ids_are_refused():
    with memories(make_model(), same_memory()) as model:
        embeddings = model.get_input_embeddings()(IDS)
        with pytest.raises(
            InputError, match="inputs_embeds without input_ids: n-grams cannot be known; pass input_ids"
        ):
            model(inputs_embeds=embeddings)
        with pytest.raises(InputError, match="inputs_embeds"):
            model.generate(inputs_embeds=embeddings, max_new_tokens=2)


@pytest.mark.parametrize("token", [KNOWN, VOCABULARY - 1])
def test_ids_beyond_the_memory_are_refused_although_the_model_has_them(token):
    model, ids = same_model(), IDS.clone()
    ids[1, 4] = token
    full(model, ids)
    with (
        memories(model, same_memory()),
        pytest.raises(InputError, match=rf"reach from \d+ to {token}; the memory's voc"),
    ):
        full(model, ids)


def test_with_several_memories_the_smallest_vocabulary_counts():
    small = make_memory()
    small.lookup = small.lookup[:100]
    with memories(make_model(), same_memory(), small) as model, pytest.raises(InputError, match="has 0 to 99"):
        full(model, torch.full((1, 3), 100))


def test_integers_of_32_bits_will_do():
    with memories(same_model(), same_memory()) as model:
        assert distance(full(model, IDS.int()), full(model, IDS)) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_attention_can_be_asked_for(family):
    model = make_model(family, attn_implementation="eager")
    with memories(model, same_memory()):
        expected = full(model, IDS)
        with torch.no_grad():
            out = model(IDS, output_hidden_states=True, output_attentions=True)
    assert distance(out.logits, expected) <= EXACT
    assert (len(out.hidden_states), len(out.attentions)) == (5, 4)


# Models


def other_decoder(name):
    shape = {"vocab_size": VOCABULARY, "pad_token_id": 5, "bos_token_id": 3, "eos_token_id": 4}
    short = shape | {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64}
    long = shape | {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
    torch.manual_seed(0)
    match name:
        case "gpt2":  # layers get the cache in order, not by name
            return GPT2LMHeadModel(GPT2Config(**short)).eval()
        case "gpt_neox":  # layers call the cache by another name
            return GPTNeoXForCausalLM(GPTNeoXConfig(**long)).eval()
        case "gptj":  # layers get no keyword arguments of the model's
            return GPTJForCausalLM(GPTJConfig(**short, rotary_dim=8)).eval()
        case "bert":
            return BertLMHeadModel(BertConfig(**long, is_decoder=True)).eval()
    return T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_other_decoders(name):
    model = other_decoder(name)
    base = full(model, IDS)
    with memories(model, same_memory()):
        expected = full(model, IDS)
        assert distance(expected, base) > 0.1
        assert distance(in_chunks(model, IDS, [7, 1, 1, 21]), expected) <= EXACT
        ids, mask = pad([IDS[0], IDS[1, :8]], "left")
        found = full(model, ids, attention_mask=mask, position_ids=positions_of(mask))
        assert distance(found[1, -8:], full(model, IDS[1:, :8])[0]) <= EXACT
    assert distance(full(model, IDS), base) == 0


def test_a_decoder_that_hands_nothing_to_its_layers_is_refused():
    model = other_decoder("gptj")
    with memories(model, same_memory()), pytest.raises(InputError, match="GPTJBlock got no keyword arguments"):
        full(model, IDS)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_what_is_no_decoder_is_refused(name):
    model = other_decoder(name)
    with pytest.raises(InputError, match=rf"{type(model).__name__}: its decoder layers cannot be found"):
        attach(model, [Active(same_memory(), 1.0)])
    with pytest.raises(InputError, match="Linear: its decoder layers cannot be found"):
        find_decoder(nn.Linear(2, 2))


def test_a_decoder_without_further_arguments_is_refused():
    model = make_model()
    forward = model.model.forward
    model.model.forward = lambda input_ids=None, past_key_values=None: forward(input_ids)
    with pytest.raises(InputError, match="Qwen3Model takes no further keyword arguments, which memories need"):
        attach(model, [Active(same_memory(), 1.0)])
    assert hooks(model) == []


def test_the_decoder_alone_takes_memories_too():
    model = same_model()
    with torch.no_grad(), memories(model, same_memory()):
        expected = model.model(IDS).last_hidden_state
    with torch.no_grad(), memories(model.model, same_memory()):
        assert distance(model.model(IDS).last_hidden_state, expected) == 0


def test_a_copy_of_a_model_has_memories_of_its_own():
    model = make_model()
    memory = make_memory()
    attach(model, [Active(memory, 1.0)])
    expected, count = full(model, IDS), len(hooks(model))
    other = copy.deepcopy(model)
    assert len(hooks(other)) == count
    assert distance(full(other, IDS), expected) == 0
    assert attached(other)[0].memory is not memory
    attached(other)[0].memory.layers["1"].value_proj.weight.data.zero_()
    assert distance(full(model, IDS), expected) == 0
    detach(model)
    assert distance(full(other, IDS), expected) > 0.1  # still in force there
    detach(other)
    assert hooks(other) == []
    assert distance(full(other, IDS), full(model, IDS)) == 0


def test_numbers_of_16_bits():
    model, memory = make_model("llama"), make_memory()
    with memories(model, memory):
        expected = full(model, IDS)
    model, memory = model.to(torch.bfloat16), copy.deepcopy(memory).to(torch.bfloat16)
    base = full(model, IDS)
    with memories(model, memory):
        found = full(model, IDS)
        assert found.dtype == torch.bfloat16
        assert (found.float() - expected).abs().mean() < 0.05 < (base.float() - expected).abs().mean()
        # Rounding differs from pass to pass, as without a memory.
        assert (in_chunks(model, IDS, [7, 1, 22]) - found).float().abs().mean() < 0.02


def test_a_memory_in_float32_in_a_model_of_16_bits():
    model = make_model("llama").to(torch.bfloat16)
    base = full(model, IDS)
    with memories(model, same_memory()):
        assert full(model, IDS).dtype == torch.bfloat16
        assert (full(model, IDS) - base).float().abs().mean() > 0.05


def test_autocast():
    model, memory = make_model("llama"), same_memory()
    with memories(model, memory):
        expected = full(model, IDS)
        with torch.autocast("cpu", torch.bfloat16):
            assert (full(model, IDS) - expected).float().abs().mean() < 0.05
            assert (in_chunks(model, IDS, [7, 1, 22]) - expected).float().abs().mean() < 0.05


# Training


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(family, masked):
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[1, 20:] = 0
    fields = {"attention_mask": mask} if masked else {}
    gradients = []
    for checkpointing in (False, True):
        model, memory = make_model(family).train(), make_memory(make_settings(layer_ids=(1, 2))).requires_grad_(True)
        if checkpointing:
            with quiet_libraries():  # the method has another name by now
                model.gradient_checkpointing_enable({"use_reentrant": False})
        with memories(model, memory):
            model(IDS, labels=IDS, use_cache=False, **fields).loss.backward()
        gradients.append([weight.grad for part in (memory, model) for weight in part.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert (plain is None) == (again is None)
        assert plain is None or torch.allclose(plain, again, atol=1e-7)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0][:8])


def test_training_with_the_cache_left_on():
    model, memory = make_model().train(), make_memory().requires_grad_(True)
    gradients = []
    for use_cache in (True, False):
        memory.zero_grad()
        with memories(model, memory):
            model(IDS, labels=IDS, use_cache=use_cache).loss.backward()
        gradients.append([weight.grad.clone() for weight in memory.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_peft_around_the_model():
    model = make_model()
    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    with quiet_libraries():
        wrapped = get_peft_model(model, lora).eval()
    lora = full(wrapped, IDS)
    assert find_decoder(wrapped)[0] is model.model
    with memories(wrapped, same_memory()):
        both = full(wrapped, IDS)
        assert distance(both, lora) > 0.1
        assert distance(in_chunks(wrapped, IDS, [7, 1, 22]), both) <= EXACT
        found = wrapped.generate(input_ids=IDS[:, :9], max_new_tokens=8, do_sample=False)
        expected = wrapped.generate(input_ids=IDS[:, :9], max_new_tokens=8, do_sample=False, use_cache=False)
        assert torch.equal(found, expected)
        with wrapped.disable_adapter():
            alone = full(wrapped, IDS)
    assert distance(full(wrapped, IDS), lora) == 0
    with memories(make_model(), same_memory()) as plain:
        assert distance(alone, full(plain, IDS)) <= EXACT


def test_prompts_that_are_learned_are_refused():
    with quiet_libraries():
        wrapped = get_peft_model(make_model(), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with memories(wrapped, same_memory()), pytest.raises(InputError, match="inputs_embeds without input_ids"):
        full(wrapped, IDS)


# Threads


def test_two_threads_at_once():
    """Each thread's passes keep what the thread began with."""
    texts = [make_ids(1, length, seed=length) for length in (13, 29)]
    with memories(same_model(), same_memory(), same_memory("long n-grams, two branches")) as model:
        expected = [full(model, text) for text in texts]
        barrier, worst = threading.Barrier(2), [[], []]

        def work(number):
            barrier.wait()
            for _ in range(20):
                cache = DynamicCache(config=model.config)
                found = in_chunks(model, texts[number], [texts[number].shape[1] - 3, 1, 2], cache)
                worst[number].append(distance(found, expected[number]))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [len(one) for one in worst] == [20, 20]
    assert max(map(max, worst)) <= EXACT
