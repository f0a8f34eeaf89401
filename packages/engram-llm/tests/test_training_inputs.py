"""What cannot be trained is refused in one line that says what, where and what to do, before long work begins."""

import shutil

import pytest
from llm_training_builders import save_model, train_settings, write_rows, write_texts
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from engram_core import AdapterWriteError, InputError, TargetExistsError
from engram_llm import models
from engram_llm.models import load_config, load_model, load_tokenizer, model_name, pick_device
from engram_llm.training import preparation
from engram_llm.training.trainer import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings_of(tmp_path, model, monkeypatch):
    """Return a function that returns settings; nothing may be loaded, let alone trained."""
    write_texts(tmp_path / "data.jsonl")

    def refuse(*args, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(preparation, "load_model", refuse)

    def make(place=model, **values):
        return train_settings(tmp_path, place, **values)

    return make


def test_layers_that_do_not_exist_are_refused_before_anything_is_loaded(settings_of, model, monkeypatch):
    monkeypatch.setattr(preparation, "load_tokenizer", None)
    told = rf"layer_ids is \[1, 4, 9\]; {model} has layers 0 to 3, so there is no layer 4"
    with pytest.raises(InputError, match=told):
        train(settings_of(layer_ids=[1, 4, 9]))


def test_texts_longer_than_the_model_reads_are_refused(settings_of, model):
    with pytest.raises(InputError, match=rf"max_length is 65; {model} reads 64 tokens at most"):
        train(settings_of(max_length=65))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"txt": "a"}], r"data.jsonl: the rows have the columns txt; expected messages; or prompt and completion; or"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], r"data.jsonl:2 lacks completion; it has prompt"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], r"data.jsonl:2 completion is empty"),
        ([{"instruction": "a", "input": "b", "output": " "}], r"data.jsonl:1 output is empty"),
    ],
)
def test_data_with_missing_columns_or_empty_answers_is_refused(settings_of, tmp_path, rows, told):
    write_rows(tmp_path / "data.jsonl", rows)
    with pytest.raises(InputError, match=told) as caught:
        train(settings_of())
    assert "\n" not in str(caught.value)


def test_a_corrupt_line_is_named(settings_of, tmp_path):
    with (tmp_path / "data.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"text": "cut\n')
    told = r"data.jsonl: 1 of 101 rows cannot be used: .*data.jsonl:101 is not JSON: .* at column 10; correct"
    with pytest.raises(InputError, match=told):
        train(settings_of())


def test_validation_data_is_checked_too(settings_of, tmp_path):
    write_rows(tmp_path / "eval.jsonl", [{"txt": "a"}])
    with pytest.raises(InputError, match=r"eval.jsonl: the rows have the columns txt"):
        train(settings_of(eval_data=tmp_path / "eval.jsonl"))


def test_samples_without_a_token_to_learn_are_refused(settings_of, tmp_path):
    write_rows(tmp_path / "data.jsonl", [{"prompt": "The otter of the bog sleeps by day. " * 3, "completion": "a"}])
    with pytest.raises(InputError, match=r"no token of the texts is left to learn; max_length is 8, give a larger one"):
        train(settings_of(max_length=8, packing=False))


def test_outputs_are_checked_before_anything_else(settings_of, tmp_path):
    missing = tmp_path / "none" / "out.safetensors"
    with pytest.raises(InputError, match=r"none/out.safetensors: there is no folder .*none; create it first"):
        train(settings_of(output=missing))
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises(InputError, match=r"out.safetensors: is a folder; give the name of a file"):
        train(settings_of())
    (tmp_path / "run").write_text("x")
    with pytest.raises(
        InputError, match=r"run: is a file, and the run needs a folder of that name; pass another --run"
    ):
        train(settings_of(run_dir=tmp_path / "run", output=tmp_path / "b.safetensors"))


def test_folders_with_other_things_are_never_replaced_by_lora(settings_of, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("x")
    told = r"out: exists and is no folder with a LoRA adapter alone; give another --output"
    for options in ({}, {"overwrite": True}):
        with pytest.raises(InputError, match=told):
            train(settings_of(method="lora"), **options)
    (tmp_path / "out" / "thesis.txt").rename(tmp_path / "out" / "adapter_config.json")
    with pytest.raises(TargetExistsError, match=r"out: exists; pass --force to replace it"):
        train(settings_of(method="lora"))
    (tmp_path / "out.lora").mkdir()
    (tmp_path / "out.lora" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match=r"out.lora: exists and is no folder with a LoRA adapter alone"):
        train(settings_of(method="both"))


def test_trackers_that_are_not_installed_are_refused(settings_of, monkeypatch):
    monkeypatch.setattr("engram_core.training.checks.find_spec", lambda name: None)
    with pytest.raises(InputError, match="tracker wandb needs the package wandb; install it, or leave --tracker out"):
        train(settings_of(tracker="wandb"))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"method": "lora", "output": "out.safetensors"}, r"output is out.safetensors, expected the name of a folder"),
        ({"output": "out"}, "output is out, expected a name that ends in .safetensors"),
        ({"patience": 2, "evaluate_every": 0}, "patience needs validations; set evaluate_every"),
        ({"precision": "fp16"}, "precision fp16 would need scaled losses"),
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0"),
        ({"lora_rank": 0}, "lora_rank is 0"),
        ({"engram_vocab_size": [5]}, r"engram_vocab_size is \[5\], expected 2 sizes"),
    ],
)
def test_values_that_make_no_sense_are_refused(settings_of, values, told):
    with pytest.raises(InputError, match=told):
        settings_of(**values)


def test_padding_that_is_no_token_is_refused(settings_of):
    with pytest.raises(InputError, match=r"pad_id is 300; the tokenizer of .* has ids 0 to 299"):
        train(settings_of(pad_id=300))


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(settings_of, tmp_path):
    place = save_model(tmp_path / "small", vocab_size=290)
    with pytest.raises(InputError, match=r"small: its tokenizer has 300 ids, the model 290"):
        train(settings_of(place))


def test_models_that_read_across_borders_are_not_packed(tmp_path, model):
    write_texts(tmp_path / "data.jsonl")
    shutil.copytree(model, tmp_path / "model")
    made = MambaForCausalLM(MambaConfig(vocab_size=310, hidden_size=32, num_hidden_layers=2, state_size=4))
    made.save_pretrained(tmp_path / "model")
    settings = train_settings(tmp_path, tmp_path / "model", layer_ids=[1], steps=1)
    with pytest.raises(InputError, match=r"model: reads across the borders of packed documents; train it with packing"):
        train(settings)


def test_a_run_folder_that_cannot_be_made_is_named(tmp_path, model):
    write_texts(tmp_path / "data.jsonl")
    (tmp_path / "file").write_text("x")
    with pytest.raises(AdapterWriteError, match=r"run: cannot be created: Not a directory; pass another --run-dir"):
        train(train_settings(tmp_path, model, run_dir=tmp_path / "file" / "run"))


# Models


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_models_that_are_not_there_are_named(load, tmp_path, monkeypatch):
    with pytest.raises(
        InputError, match=r"none: does not exist; give a hub id, a folder in transformers layout, or 'ti"
    ):
        load(str(tmp_path / "none"))
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=r"file: is a file; give a hub id, a folder"):
        load(str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty: cannot be loaded as a decoder language model: ") as caught:
        load(str(tmp_path / "empty"))
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(models, "quiet_libraries", lambda: _raise(OSError("offline")))
    with pytest.raises(
        InputError, match=r"a/b: cannot be loaded .*OSError: offline; there is no such folder here, and a"
    ):
        load("a/b")


def _raise(error):
    raise error


def test_other_kinds_of_models_are_refused(tmp_path):
    T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20)
    ).save_pretrained(tmp_path / "t5")
    with pytest.raises(InputError, match=r"t5: is an encoder and a decoder \(t5\); a memory needs a decoder alone"):
        load_config(str(tmp_path / "t5"))
    bert = BertConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        InputError, match=r"bert: is no decoder language model: BertLMHeadModel: its decoder layers cannot be found"
    ):
        load_model(str(tmp_path / "bert"))


def test_missing_weights_are_not_made_up(tmp_path, model):
    folder = shutil.copytree(model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    told = r"1 of its weights are missing, e.g. model.layers.2.mlp.up_proj.weight; download it again"
    with pytest.raises(InputError, match=told):
        load_model(str(folder))


def test_devices_that_are_not_there_are_refused(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="device 'cuda' is not available here; available: cpu"):
        pick_device("cuda")
    with pytest.raises(InputError, match="precision fp16 needs a GPU"):
        pick_device("cpu", "fp16")


def test_local_models_are_called_by_their_names(tmp_path):
    (tmp_path / "Qwen3-0.6B").mkdir()
    assert model_name(str(tmp_path / "Qwen3-0.6B")) == "Qwen3-0.6B"
    assert model_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    assert model_name("tiny") == "tiny"
