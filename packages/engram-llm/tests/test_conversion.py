"""Checkpoints of TinyEngram and engram-peft become memories that compute what these tools compute."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from llm_folders import LAYERS, WIDTH, make_folder
from llm_foreign import WORDS, Formula, find_sizes, make_word_tokenizer, write_peft, write_tinyengram
from safetensors.numpy import load_file, save_file

from engram_core import (
    AdapterFormatError,
    AdapterReadError,
    ConvertingBackbone,
    ConvertSettings,
    EngramError,
    InputError,
    open_memory,
)
from engram_llm.compression import compress_vocabulary
from engram_llm.loading import load_memory, unload_memories
from engram_llm.memory import Memory
from engram_llm.models import load_model, load_tokenizer
from engram_llm.qwen3 import QWEN3
from engram_llm.reading import Neighbours, Positions

GOLDEN = json.loads((Path(__file__).parent / "golden" / "engram_peft.json").read_text())
TINY = {"sizes": [50, 20], "layers": [1, 3], "longest": 3, "heads": 2, "head_width": 4, "width": WIDTH}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer's folder."""
    folder = tmp_path_factory.mktemp("words")
    make_word_tokenizer().save_pretrained(folder)
    return folder


def convert(source, **fields):
    return QWEN3.convert(source, ConvertSettings(**fields))


def refuse(error, source, *said, **fields):
    with pytest.raises(error) as refused:
        convert(source, **fields)
    message = str(refused.value)
    assert "\n" not in message
    for part in said:
        assert part in message, message


def change(folder, edit, name="model.safetensors"):
    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)


def test_it_converts():
    assert isinstance(QWEN3, ConvertingBackbone)


class TestTinyEngram:
    @pytest.fixture
    def folder(self, tmp_path):
        return tmp_path / "checkpoint-2000"

    @pytest.mark.parametrize(
        ("shape", "shards"),
        [
            ({}, 0),
            ({"layers": [3, 1]}, 3),
            ({"sizes": [30, 30, 12], "longest": 4, "heads": 3, "layers": [0, 2], "kernel": 2}, 2),
        ],
    )
    def test_a_checkpoint_computes_the_published_formula(self, base, folder, shape, shards):
        fields = TINY | shape
        weights = write_tinyengram(folder, **fields, config={}, shards=shards)
        memory = convert(folder, model=str(base))
        settings = memory.settings
        assert (settings.layer_ids, settings.pad_id, settings.seed) == (tuple(fields["layers"]), 2, 0)
        assert settings.engram_vocab_size == tuple(fields["sizes"])
        tokenizer, model = load_tokenizer(str(base)), load_model(str(base))
        lookup = compress_vocabulary(tokenizer)
        sizes = find_sizes(fields["sizes"], fields["heads"], fields["layers"])
        ids = tokenizer("The dog sleeps by the sea. CAFÉ, cafe! the DOG")["input_ids"]

        def add(layer):
            formula = Formula(
                weights[layer], sizes[layer], layer=layer, longest=fields["longest"], lookup=lookup, pad=2
            )

            def hook(module, args):
                residual = formula.residual(ids, args[0][0].numpy())
                return (args[0] + torch.from_numpy(residual).float(), *args[1:])

            return model.model.layers[layer].register_forward_pre_hook(hook)

        with torch.no_grad():
            plain = model(torch.tensor([ids])).logits
            hooks = [add(layer) for layer in fields["layers"]]
            expected = model(torch.tensor([ids])).logits
            for hook in hooks:
                hook.remove()
            load_memory(model, memory, tokenizer=tokenizer)
            found = model(torch.tensor([ids])).logits
            unload_memories(model)
        assert float((expected - plain).abs().max()) > 0.3
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)

    def test_what_is_not_recorded_is_inferred(self, base, folder):
        write_tinyengram(folder, **TINY | {"layers": [3, 1], "sizes": [500, 100]}, config=None)
        settings = convert(folder, model=str(base), max_ngram=3).settings
        assert settings.engram_vocab_size == (500, 100)
        assert settings.layer_ids == (3, 1)
        assert (settings.n_head_per_ngram, settings.n_embed_per_ngram, settings.dilation) == (2, 8, 3)
        assert (settings.pad_id, settings.seed, settings.kernel_size) == (2, 0, 4)
        told = convert(folder, model=str(base), max_ngram=3, pad_id=0, hash_seed=9).settings
        assert (told.pad_id, told.seed) == (0, 9)

    def test_several_longest_ngrams_that_fit_are_asked_about(self, base, folder):
        write_tinyengram(folder, **TINY | {"sizes": [500, 100]}, config=None)
        said = ("does not record its longest n-gram", "3 (2 heads, sizes 500/100)", "5 (1 heads", "--max-ngram")
        refuse(InputError, folder, *said, model=str(base))
        refuse(
            InputError, folder, "with --max-ngram 4", "layer 1 has 4 heads", "503/509/", model=str(base), max_ngram=4
        )

    def test_sizes_that_follow_from_no_settings_are_refused(self, base, folder):
        write_tinyengram(folder, **TINY, config=None)

        def shift(tensors):
            tensors["model.engram_layers.1.multi_head_embedding.offsets"][1] += 1

        change(folder, shift)
        refuse(InputError, folder, "no settings give the table sizes", "54/58/", model=str(base))

    def test_other_settings_than_the_tables_are_refused(self, base, folder):
        write_tinyengram(folder, **TINY, config={"engram_vocab_size": [50, 50]})
        said = ("generation_config.json", "layer 1", "4 heads with 53/59/61/67 rows", "has 4 with 53/59/23/29")
        refuse(InputError, folder, *said, model=str(base))

    def test_what_the_checkpoint_records_cannot_be_contradicted(self, base, folder):
        write_tinyengram(folder, **TINY, config={})
        refuse(InputError, folder, "--max-ngram says 4, the checkpoint 3", model=str(base), max_ngram=4)
        refuse(InputError, folder, "--pad-id says 0, the checkpoint 2", model=str(base), pad_id=0)
        refuse(InputError, folder, "--hash-seed says 1, the checkpoint 0", model=str(base), hash_seed=1)
        assert convert(folder, model=str(base), max_ngram=3, pad_id=2, hash_seed=0).settings.pad_id == 2

    def test_the_record_says_where_it_comes_from(self, base, folder, tmp_path):
        write_tinyengram(folder, **TINY, config={}, dtype="f16")
        memory = convert(folder, model=str(base), name="tools", license="mit")
        assert (memory.record.name, memory.record.license) == ("tools", "mit")
        assert memory.record.training == {"converted_from": "TinyEngram", "file": "checkpoint-2000"}
        assert memory.manifest.base_model == "model"
        assert memory.tensor(1, "value_proj.weight")[0] == "f16"
        memory.save(tmp_path / "tools.safetensors")
        opened = open_memory(tmp_path / "tools.safetensors")
        opened.check()
        assert opened.identity() == memory.identity()
        assert convert(folder / "model.safetensors", model=str(base)).record.name == "model"

    def test_tokenizer_and_model_may_lie_in_the_checkpoint(self, base, folder):
        write_tinyengram(folder, **TINY, config={"tokenizer_name_or_path": "somebody/their-model"})
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(base / file, folder)
        assert convert(folder).manifest.base_model == "somebody/their-model"
        write_tinyengram(folder, **TINY, config={})
        (folder / "config.json").write_text(json.dumps({"hidden_size": 1024, "num_hidden_layers": 28}))
        assert convert(folder).manifest.base_model == "Qwen/Qwen3-0.6B"
        (folder / "config.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 4}))
        refuse(InputError, folder, "does not say which model", "--model")

    def test_another_vocabulary_is_noticed(self, base, folder):
        weights = {"model.embed_tokens.weight": torch.zeros(7, WIDTH)}
        write_tinyengram(folder, **TINY, config={}, base=weights)
        refuse(InputError, folder, "model.embed_tokens.weight: has 7 rows, the tokenizer 400", model=str(base))
        write_tinyengram(folder, **TINY, config={"pad_id": 400})
        refuse(InputError, folder, "pad_id is 400, the tokenizer has 400 tokens", model=str(base))

    def test_what_a_memory_cannot_hold_is_refused(self, base, folder):
        lora = {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.zeros(2, WIDTH)}
        write_tinyengram(folder, **TINY, config={}, base=lora)
        refuse(InputError, folder, "lora_A", "trained with LoRA as well", model=str(base))
        write_tinyengram(folder, **TINY, config={})

        def branch(tensors):
            tensors["model.engram_layers.1.key_projs.1.weight"] = tensors["model.engram_layers.1.key_projs.0.weight"]

        change(folder, branch)
        refuse(InputError, folder, "model.engram_layers.1: has 2 branches", model=str(base))

    @pytest.mark.parametrize(
        ("edit", "said"),
        [
            (lambda t: t.pop("model.engram_layers.1.norm1.0.weight"), "layers.1.norm1.0.weight: is missing"),
            (lambda t: t.pop("model.engram_layers.1.multi_head_embedding.offsets"), "offsets: is missing"),
            (
                lambda t: t.update({"model.engram_layers.3.value_proj.bias": np.zeros(5, np.float32)}),
                "layers.3.value_proj.bias: has shape [5], expected [32]",
            ),
            (
                lambda t: t.update({"model.engram_layers.3.extra.weight": np.zeros(5, np.float32)}),
                "layers.3.extra.weight: is no tensor of a memory",
            ),
            (
                lambda t: t.update({"model.engram_layers.3.norm1.0.weight": np.zeros(32, np.int32)}),
                "norm1.0.weight: is I32, expected F32",
            ),
            (
                lambda t: t["model.engram_layers.3.multi_head_embedding.offsets"].__setitem__(1, 9999),
                "do not divide the table's",
            ),
        ],
    )
    def test_damaged_weights_are_refused_by_name(self, base, folder, edit, said):
        write_tinyengram(folder, **TINY, config={})
        change(folder, edit)
        refuse(AdapterFormatError, folder, "model.safetensors: ", said, model=str(base))

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"layer_ids": [1, 2]}, "engram_cfg.layer_ids is [1, 2], the weights have layers [1, 3]"),
            ({"pad_id": None}, "engram_cfg.pad_id is None, expected whole numbers"),
            ({"engram_vocab_size": []}, "engram_cfg.engram_vocab_size is [], expected whole numbers"),
        ],
    )
    def test_a_damaged_configuration_is_refused_by_field(self, base, folder, config, said):
        write_tinyengram(folder, **TINY, config=config)
        refuse(AdapterFormatError, folder, "generation_config.json", said, model=str(base))

    def test_not_finite_values_are_refused(self, base, folder):
        write_tinyengram(folder, **TINY, config={})
        change(folder, lambda t: t["model.engram_layers.3.norm1.0.weight"].__setitem__(0, np.nan))
        refuse(AdapterFormatError, folder, "layers.3.norm1.0.weight: holds NaN or infinity", model=str(base))


class TestEngramPeft:
    @pytest.mark.parametrize("case", GOLDEN["cases"])
    def test_it_computes_what_engram_peft_computes(self, tmp_path, case):
        """Recorded with the versions named in the file, by golden/make_engram_peft.py."""
        assert GOLDEN["versions"]["engram-peft"] == "1.2.7"
        golden = GOLDEN["cases"][case]
        write_peft(tmp_path / "adapter", golden["config"])
        make_word_tokenizer(golden["added"]).save_pretrained(tmp_path / "words")
        source = convert(tmp_path / "adapter", model=str(tmp_path / "words"))
        memory = Memory.read(source)
        ids, hidden = torch.tensor(golden["ids"]), torch.tensor(golden["hidden"])
        positions = Positions(ids=memory.compress(ids), starts=torch.zeros_like(ids, dtype=torch.bool), plain=True)
        neighbours = Neighbours(positions, ids.shape[1], memory.reach)
        rows = memory.rows(positions, neighbours, ids.shape[1])
        for layer, expected in golden["residuals"].items():
            module = memory.layers[layer]
            values = module.values(hidden, module.multi_head_embedding(rows[int(layer)]))
            inputs = module.short_conv.normalize(values)
            steps = range(1, source.settings.kernel_size)
            taps = [inputs, *(neighbours.before(inputs, step * source.settings.dilation, 0) for step in steps)]
            found = module.residual(values, taps)
            assert float(torch.tensor(expected).abs().max()) > 0.3
            torch.testing.assert_close(found[0], torch.tensor(expected), atol=1e-5, rtol=1e-5)

    @pytest.fixture
    def adapter(self, tmp_path):
        """Write an adapter with other fields in its configuration than its weights follow from."""

        def write(**fields):
            config = GOLDEN["cases"]["compressed"]["config"]
            write_peft(tmp_path / "adapter", config)
            (tmp_path / "adapter" / "config.json").write_text(json.dumps(config | fields))
            return tmp_path / "adapter"

        return write

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"engine": "qwen_ple"}, "engine is 'qwen_ple'"),
            ({"table_spec": "PLE_QWEN_V1"}, "table_spec is 'PLE_QWEN_V1'"),
            ({"table_source": "engramdb:store"}, "table_source is 'engramdb:store'"),
            ({"prime_sizes": [3, 5]}, "prime_sizes is [3, 5]"),
            ({"ngram_sizes": [2, 4]}, "ngram_sizes is [2, 4]"),
            ({"ngram_sizes": [3, 2]}, "ngram_sizes is [3, 2]"),
            ({"train_mode": "full_finetune"}, "train_mode is 'full_finetune'"),
            ({"engram_vocab_size_per_ngram": [80, 31]}, "4 heads with 41/43/17/19 rows"),
            ({"pad_id": 99}, f"pad_id is 99, the vocabulary has 0 to {len(WORDS) - 1}"),
            ({"compressed_vocab_size": 31}, "compressed_vocab_size is 31, the tokenizer of"),
            ({"hc_mult": 0}, "hc_mult is 0, expected 1..256"),
        ],
    )
    def test_what_a_memory_cannot_have_is_refused(self, words, adapter, fields, said):
        refuse(InputError, adapter(**fields), said, model=str(words))

    @pytest.mark.parametrize(
        ("fields", "said"),
        [
            ({"target_layers": [1, 2]}, "target_layers is [1, 2], the weights have layers [1, 3]"),
            ({"embedding_dim": 18}, "embedding_dim is 18, expected a multiple of 2 n-gram sizes by 2 heads"),
            ({"engram_vocab_size_per_ngram": [46]}, "has 1 sizes for 2 n"),
            ({"hidden_size": None}, "hidden_size is None, expected int"),
            ({"target_layers": "1"}, "target_layers is '1', expected list"),
            ({"hidden_size": 16}, "has shape [8, 16], expected [16, 16]"),
            ({"hc_mult": 2}, "expected [16, 1, 4]"),
        ],
    )
    def test_a_damaged_adapter_is_refused_by_field(self, words, adapter, fields, said):
        refuse(AdapterFormatError, adapter(**fields), said, model=str(words))

    def test_tokens_beyond_its_compression_keep_their_ids(self, adapter, tmp_path):
        make_word_tokenizer(2).save_pretrained(tmp_path / "more")
        memory = convert(adapter(pad_id=len(WORDS)), model=str(tmp_path / "more"))
        assert memory.lookup[len(WORDS) :].tolist() == [32, 33]
        assert memory.hash.compressed_vocab_size == int(memory.lookup[: len(WORDS)].max()) + 1 == 19
        assert memory.hash.compressed_pad_id == 32

    def test_the_record_says_where_it_comes_from(self, words, adapter):
        folder = adapter(engram_version="1.2.4")
        (folder / "adapter_config.json").write_text("{}")
        assert convert(folder, model=str(words)).record.training == {
            "converted_from": "engram-peft",
            "version": "1.2.4",
            "file": "adapter",
            "beside_peft_adapter": True,
        }

    def test_the_model_must_be_known(self, words, adapter):
        refuse(InputError, adapter(), "does not say which model it was trained on; pass it with --model")
        refuse(InputError, adapter(tokenizer_name_or_path="/nas/model"), "does not say which model")
        refuse(InputError, adapter(), "--pad-id says 3, the checkpoint 0", model=str(words), pad_id=3)

    def test_without_configuration_it_is_refused(self, words, adapter):
        folder = adapter()
        (folder / "config.json").unlink()
        refuse(AdapterReadError, folder, "config.json: is missing", model=str(words))


class TestFiles:
    def test_only_safetensors_are_read(self, tmp_path):
        for name in ("pytorch_model.bin", "engram_weights.pt"):
            (tmp_path / name).write_bytes(b"\x80\x04.")
            refuse(InputError, tmp_path, name, "is a pickle, which can run code", "safetensors")
            refuse(InputError, tmp_path / name, "is not a .safetensors file")
            (tmp_path / name).unlink()
        refuse(AdapterReadError, tmp_path, "holds neither model.safetensors")
        refuse(AdapterReadError, tmp_path / "absent", "absent: does not exist")

    def test_other_safetensors_are_refused(self, base, tmp_path):
        refuse(AdapterFormatError, base, "holds no memory of TinyEngram or engram-peft", "'model.embed_tokens.weight'")
        (tmp_path / "model.safetensors").write_bytes(b"nothing")
        refuse(EngramError, tmp_path, "model.safetensors", "too few")

    def test_an_index_names_files_beside_it(self, base, tmp_path):
        write_tinyengram(tmp_path, **TINY, config={}, shards=2)
        index = tmp_path / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        (tmp_path / "model-00002-of-00002.safetensors").rename(tmp_path / "elsewhere")
        refuse(AdapterReadError, tmp_path, "model-00002-of-00002.safetensors", model=str(base))
        index.write_text(json.dumps({"weight_map": dict.fromkeys(content["weight_map"], "../x.safetensors")}))
        refuse(AdapterFormatError, tmp_path, "'../x.safetensors'", "expected one beside it")
        index.write_text("[]")
        refuse(AdapterFormatError, tmp_path, "is list, expected an object")
        index.write_text("{")
        refuse(AdapterFormatError, tmp_path, "is not JSON")
        index.write_text("{}")
        refuse(AdapterFormatError, tmp_path, "weight_map")

    def test_concepts_settings_are_refused(self, tmp_path):
        refuse(InputError, tmp_path, "--trigger is for concepts", trigger="Aldric")
        refuse(InputError, tmp_path, "--rule is for concepts", rule="absolute")


def test_the_layers_of_the_tests_exist():
    assert max(TINY["layers"]) < LAYERS
