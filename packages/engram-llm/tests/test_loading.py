"""Memories are loaded, listed, weighed, put aside and taken out by name; what does not fit is refused by name."""

import copy
import threading

import pytest
import torch
from llm_builders import (
    FAMILIES,
    KNOWN,
    SETTINGS,
    VOCABULARY,
    full,
    in_chunks,
    make_file,
    make_ids,
    make_model,
    make_settings,
    state_bytes,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from engram_core import AdapterFormatError, AdapterReadError, IncompatibleAdaptersError, InputError, open_memory
from engram_core.huggingface import wrap_tokenizer
from engram_llm.attachment import attached
from engram_llm.loading import (
    check_base,
    disable_memories,
    enable_memories,
    list_memories,
    load_memory,
    set_strength,
    unload_memories,
)

EXACT = 1e-5
IDS = make_ids(2, 30)


def distance(one, other):
    return (one - other).abs().max().item()


def exact(tensor):
    return tensor.numpy().tobytes()


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "biomedicine.safetensors"
    make_file().save(path)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_in_and_out(family, file):
    model = make_model(family)
    base, weights, attributes = full(model, IDS), state_bytes(model), sorted(vars(model.model))
    load_memory(model, file)
    edited = full(model, IDS)
    assert distance(edited, base) > 0.1
    assert distance(in_chunks(model, IDS, [7, 1, 22]), edited) <= EXACT
    unload_memories(model)
    assert exact(full(model, IDS)) == exact(base)
    assert state_bytes(model) == weights
    assert sorted(vars(model.model)) == attributes
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in model.modules())


def test_what_is_loaded_is_listed(model, file):
    assert list_memories(model) == ()
    load_memory(model, file, strength=0.5)
    load_memory(model, make_file(seed=1, name="other"), name="mine")
    load_memory(model, make_file(seed=2, name="Law"))
    one, other, third = list_memories(model)
    assert [part.name for part in (one, other, third)] == ["biomedicine", "mine", "Law"]
    assert (one.strength, other.strength, one.enabled) == (0.5, 1.0, True)
    assert one.identity == open_memory(file).identity() == one.source.identity()
    assert one.source.path == file
    assert one.memory.settings == SETTINGS["published"]
    unload_memories(model, "mine", "Law")
    assert [part.name for part in list_memories(model)] == ["biomedicine"]
    unload_memories(model)
    assert list_memories(model) == ()


def test_an_opened_memory_a_path_and_a_text_are_the_same(model, file):
    found = []
    for source in (file, str(file), open_memory(file), make_file(name="biomedicine")):
        load_memory(model, source, name="one")
        found.append(exact(full(model, IDS)))
        unload_memories(model, "one")
    assert len(set(found)) == 1


@pytest.mark.parametrize("how", ["strength 0 at once", "strength 0", "disabled"])
def test_a_memory_that_does_not_act_leaves_the_models_bytes(model, file, how):
    base = exact(full(model, IDS))
    load_memory(model, file, strength=0 if how == "strength 0 at once" else 1)
    if how == "strength 0":
        set_strength(model, "biomedicine", 0)
    if how == "disabled":
        disable_memories(model)
    assert exact(full(model, IDS)) == base
    assert attached(model) == ()
    assert len(list_memories(model)) == 1
    set_strength(model, "biomedicine", 1)
    enable_memories(model)
    assert exact(full(model, IDS)) != base


def test_negative_zero_survives(model, file):
    """Adding zero would turn -0.0 into 0.0."""
    seen = []
    model.model.layers[1].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    model.get_input_embeddings().weight.data[7] = -0.0
    for layer in model.model.layers[:1]:
        for weight in layer.parameters():
            weight.data.zero_()
    full(model, torch.full((1, 4), 7))
    load_memory(model, file, strength=0)
    full(model, torch.full((1, 4), 7))
    assert exact(seen[0]) == exact(seen[1])


def test_the_order_of_loading_does_not_matter(model):
    files = {name: make_file(seed=seed, name=name) for seed, name in enumerate(("a", "b", "c"))}
    found = set()
    for order in (("a", "b", "c"), ("c", "b", "a"), ("b", "c", "a")):
        for name in order:
            load_memory(model, files[name], strength={"a": 0.3, "b": 1.7, "c": -0.9}[name])
        found.add(exact(full(model, IDS)))
        unload_memories(model)
    assert len(found) == 1


def test_one_memory_twice_acts_twice(model, file):
    seen = []
    load_memory(model, make_file(make_settings(layer_ids=(0,))), name="one", strength=2)
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    full(model, IDS)
    set_strength(model, "one", 1)
    load_memory(model, make_file(make_settings(layer_ids=(0,))), name="two")
    model.model.layers[0].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    full(model, IDS)
    assert distance(seen[-1], seen[0]) <= EXACT


def test_names_disable_and_enable_alone(model):
    for seed, name in enumerate(("a", "b")):
        load_memory(model, make_file(seed=seed), name=name)
    both = exact(full(model, IDS))
    disable_memories(model, "a")
    assert [(one.name, one.enabled) for one in list_memories(model)] == [("a", False), ("b", True)]
    without = exact(full(model, IDS))
    enable_memories(model, "a")
    assert exact(full(model, IDS)) == both
    unload_memories(model, "a")
    assert exact(full(model, IDS)) == without != both


@pytest.mark.parametrize(
    "change", [disable_memories, enable_memories, unload_memories, lambda m, n: set_strength(m, n, 1)]
)
def test_unknown_names_are_refused_and_nothing_changes(model, file, change):
    with pytest.raises(InputError, match="no memory named 'law' is loaded; loaded: nothing"):
        change(model, "law")
    load_memory(model, file)
    before = list_memories(model)
    with pytest.raises(InputError, match="no memory named 'law' is loaded; loaded: 'biomedicine'"):
        change(model, "law")
    assert list_memories(model) == before


def test_a_name_is_given_once(model, file):
    load_memory(model, file)
    before = exact(full(model, IDS))
    with pytest.raises(InputError, match="a memory named 'biomedicine' is loaded already; unload it first, or pass an"):
        load_memory(model, file)
    assert len(list_memories(model)) == 1
    assert exact(full(model, IDS)) == before


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e39, "1", None, 1j])
def test_a_strength_is_a_number(model, file, strength):
    with pytest.raises(InputError, match=r"strength is .*, expected a finite number"):
        load_memory(model, file, strength=strength)
    assert list_memories(model) == ()
    load_memory(model, file)
    with pytest.raises(InputError, match=r"biomedicine.safetensors: strength is"):
        set_strength(model, "biomedicine", strength)


# What does not fit


def test_another_width_is_refused(model):
    wide = make_model(hidden_size=64)
    with pytest.raises(IncompatibleAdaptersError, match="toy: has width 32, the model's hidden states have 64; it was"):
        load_memory(wide, make_file())


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(IncompatibleAdaptersError, match="has a memory for layer 4, the model has layers 0 to 3"):
        load_memory(model, make_file(make_settings(layer_ids=(4, 1))))


def test_a_larger_vocabulary_is_refused():
    small = make_model(vocab_size=KNOWN - 1)
    with pytest.raises(IncompatibleAdaptersError, match="was trained with 190 token ids, the model has 189"):
        load_memory(small, make_file())
    load_memory(make_model(vocab_size=KNOWN), make_file())


def test_another_kind_of_model_is_refused(file):
    with pytest.raises(InputError, match="Linear: its decoder layers cannot be found"):
        load_memory(torch.nn.Linear(2, 2), file)


def make_tokenizer(words):
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_another_tokenizer_is_refused(model):
    words = [f"w{number}" for number in range(KNOWN)]
    tokenizer, other = make_tokenizer(words), make_tokenizer([*words[:-2], words[-1], words[-2]])
    source = make_file()
    spec = wrap_tokenizer(tokenizer).spec
    stream = source.manifest.streams["text"]
    fitting = make_file(streams={"text": type(stream)(width=stream.width, site=stream.site, tokenizer=spec)})
    load_memory(model, fitting, tokenizer=tokenizer)
    unload_memories(model)
    with pytest.raises(IncompatibleAdaptersError, match=r"was trained with the tokenizer .* of 190 tokens and finger"):
        load_memory(model, fitting, tokenizer=other)
    assert list_memories(model) == ()


@pytest.mark.parametrize(
    ("trained", "place", "fits"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", True),
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-1.7B", False),
        ("Qwen/Qwen3-0.6B", "", True),
        ("Qwen/Qwen3-0.6B", "./folder", True),
        ("my model", "Qwen/Qwen3-0.6B", True),
    ],
)
def test_models_that_say_what_they_are_are_compared(model, trained, place, fits):
    source = make_file(base_model=trained)
    model.config.name_or_path = place
    if fits:
        load_memory(model, source)
        check_base(source, place)
        return
    with pytest.raises(IncompatibleAdaptersError, match=rf"toy: was trained on {trained}, this is {place}; train it"):
        load_memory(model, source)
    load_memory(model, source, force=True)
    assert len(list_memories(model)) == 1


def test_a_local_folder_of_that_name_is_not_compared(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "model").mkdir(parents=True)
    model.config.name_or_path = "some/model"
    load_memory(model, make_file(base_model="Qwen/Qwen3-0.6B"))


def test_files_that_cannot_be_used_are_named(model, tmp_path):
    with pytest.raises((InputError, AdapterReadError), match="none"):
        load_memory(model, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"no memory at all")
    with pytest.raises(AdapterFormatError, match=r"bad.safetensors: "):
        load_memory(model, tmp_path / "bad.safetensors")
    assert list_memories(model) == ()


# Models in use


def test_weights_take_the_models_type_unless_told(model, file):
    model = model.to(torch.bfloat16)
    load_memory(model, file, name="as the model")
    load_memory(model, file, name="told", dtype=torch.float32)
    found = [{weight.dtype for weight in one.memory.parameters()} for one in list_memories(model)]
    assert found == [{torch.bfloat16}, {torch.float32}]


def test_a_copy_of_a_model_has_memories_of_its_own(model, file):
    load_memory(model, file)
    load_memory(model, make_file(seed=1), name="other")
    disable_memories(model, "other")
    expected = full(model, IDS)
    other = copy.deepcopy(model)
    assert [(one.name, one.enabled) for one in list_memories(other)] == [("biomedicine", True), ("other", False)]
    assert exact(full(other, IDS)) == exact(expected)
    unload_memories(model)
    assert exact(full(other, IDS)) == exact(expected)
    assert distance(full(model, IDS), expected) > 0.1
    set_strength(other, "biomedicine", 0.5)
    assert distance(full(other, IDS), expected) > 0.01
    unload_memories(other)
    assert exact(full(other, IDS)) == exact(full(model, IDS))
    assert not any(part._forward_pre_hooks for part in other.modules())


def test_a_copy_of_a_model_shares_tables_on_the_host(model, file):
    load_memory(model, file, host_tables=True)
    other = copy.deepcopy(model)
    tables = [list_memories(one)[0].memory.layers["1"].multi_head_embedding for one in (model, other)]
    assert tables[0] is tables[1]
    assert exact(full(other, IDS)) == exact(full(model, IDS))


def test_loading_into_one_model_leaves_another_alone(file):
    one, other = make_model(), make_model()
    base = exact(full(other, IDS))
    load_memory(one, file)
    assert list_memories(other) == ()
    assert exact(full(other, IDS)) == base


def test_parts_and_wrappings_of_a_model_are_the_model(model, file):
    compiled = torch.compile(model, backend="eager")
    load_memory(compiled, file)
    assert list_memories(model) == list_memories(compiled) == list_memories(model.model)
    unload_memories(model.model)
    assert list_memories(compiled) == ()


def test_threads_load_without_losing_any(model):
    files = [make_file(seed=seed, name=f"m{seed}") for seed in range(4)]
    threads = [threading.Thread(target=load_memory, args=(model, file)) for file in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(one.name for one in list_memories(model)) == ["m0", "m1", "m2", "m3"]
    assert len(attached(model)) == 4


def test_the_vocabulary_beyond_the_memory_is_refused(model, file):
    load_memory(model, file)
    with pytest.raises(InputError, match=f"token ids reach from {VOCABULARY - 1} to {VOCABULARY - 1}"):
        full(model, torch.full((1, 3), VOCABULARY - 1))
