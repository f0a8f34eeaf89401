"""What a run learns, keeps and tells: memory, LoRA and both, dense and sparse, packed and not."""

import json
import math
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from llm_training_builders import (
    ANIMALS,
    Log,
    build_model,
    lengthen,
    many_runs,
    save_model,
    texts,
    tokenizer,
    train_settings,
    write_rows,
    write_texts,
)
from peft import PeftModel
from safetensors.torch import load_file

from engram_core import InputError, TrainingBackbone, open_memory
from engram_core.settings import resolve_settings
from engram_core.training.metrics import read_metrics
from engram_llm.data import Collator, pack_documents, tokenize_rows, truncate_documents
from engram_llm.loading import load_memory, unload_memories
from engram_llm.models import load_model
from engram_llm.qwen3 import QWEN3
from engram_llm.training import preparation
from engram_llm.training.learned import Learned
from engram_llm.training.loss import evaluate_loss, make_batches, sum_losses
from engram_llm.training.trainer import METRICS, train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with many_runs():
        yield save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def settings_of(tmp_path, model):
    """Return a function that returns settings of runs on one data set."""
    write_texts(tmp_path / "data.jsonl")

    def make(**values):
        return train_settings(tmp_path, model, **values)

    return make


@pytest.fixture
def caught(monkeypatch):
    """Return what was loaded as the base model, which a run drops."""
    seen = SimpleNamespace(model=None)

    def load(*args, **options):
        seen.model = load_model(*args, **options)
        seen.attributes = set(vars(seen.model))
        return seen.model

    monkeypatch.setattr(preparation, "load_model", load)
    return seen


def weights_of(path):
    return load_file(path)


def with_lora(folder):
    """Return the base model with LoRA, in the way of PEFT's users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT asks transformers by old names
        return PeftModel.from_pretrained(build_model(), folder)


def test_a_memory_learns_and_is_used_as_it_was_measured(settings_of, tmp_path):
    settings = settings_of(steps=40, evaluate_every=20, max_grad_norm=0)
    log = Log()
    report = train(settings, watcher=log)
    base, words = build_model(), tokenizer()
    rows = [json.loads(line) for line in settings.data.read_text().splitlines()]
    before, n_tokens = evaluate_loss(base, words, rows, max_length=48)
    load_memory(base, settings.output, tokenizer=words)
    after, n_again = evaluate_loss(base, words, rows, max_length=48)
    assert n_tokens == n_again
    assert after < before - 0.5
    assert report.loss == pytest.approx(after, abs=0.3)
    assert report.entries == {"layer 1": 220, "layer 2": 290}
    assert report.contents == "220 rows before layer 1, 290 rows before layer 2"
    assert log.steps == list(range(1, 41))
    assert log.notes == []


def test_the_record_says_what_was_done(settings_of):
    settings = settings_of(name="fauna", license="CC0-1.0", dtype="f16")
    report = train(settings)
    memory = open_memory(settings.output)
    assert memory.identity() == report.identity
    assert memory.nbytes() == report.n_bytes == settings.output.stat().st_size
    assert (memory.record.name, memory.record.license) == ("fauna", "CC0-1.0")
    assert memory.tensor(1, "value_proj.weight")[0] == "f16"
    assert memory.manifest.backbone == "qwen3"
    assert memory.manifest.base_model.startswith("model")
    training = memory.record.training
    assert training["method"] == "engram"
    assert training["kept_step"] == training["steps_done"] == training["steps"] == 8
    assert training["validation_loss"] == report.loss
    assert training["documents"] + round(0.1 * 100) == pytest.approx(100, abs=10)
    assert 8 * 2 * 20 < training["tokens"] < 8 * 2 * 48
    assert "output" not in training
    assert memory.record.settings.pad_id == tokenizer().pad_token_id


@pytest.mark.parametrize("method", ["engram", "lora", "both"])
def test_the_base_model_is_left_as_it_was(settings_of, caught, model, method):
    before = (model / "model.safetensors").read_bytes()
    train(settings_of(method=method))
    assert (model / "model.safetensors").read_bytes() == before
    fresh = build_model().state_dict()
    state = caught.model.state_dict()
    assert list(state) == list(fresh)
    assert all(torch.equal(value, fresh[name]) for name, value in state.items())
    assert set(vars(caught.model)) == caught.attributes
    assert not caught.model.training
    assert caught.model.config.to_dict() == load_model(str(model)).config.to_dict()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in caught.model.modules())
    assert {type(module) for module in caught.model.modules()} == {type(module) for module in build_model().modules()}


@pytest.mark.parametrize("method", ["engram", "lora", "both"])
def test_training_begins_at_the_base_model(settings_of, method):
    settings = settings_of(method=method)
    base = build_model()
    ids = torch.arange(20).view(1, -1)
    expected = base(ids).logits
    lookup = np.arange(len(tokenizer()), dtype=np.int32)
    learned = Learned(base, settings, lookup, 0, sparse=False)
    assert torch.equal(learned.model(ids).logits, expected)
    for _, weight in learned.parameters():
        assert weight.dtype == torch.float32
    learned.remove()
    assert torch.equal(base(ids).logits, expected)


def test_first_values_depend_on_the_seed_alone(settings_of):
    lookup = np.arange(len(tokenizer()), dtype=np.int32)

    def values(method, seed, draws):
        torch.manual_seed(draws)
        learned = Learned(build_model(), settings_of(method=method, seed=seed), lookup, 0, sparse=False)
        return {name.removeprefix("base_model.model."): value for name, value in learned.parameters()}

    engram, again, lora, both = (
        values("engram", 3, 1),
        values("engram", 3, 2),
        values("lora", 3, 1),
        values("both", 3, 4),
    )
    assert all(torch.equal(engram[name], again[name]) for name in engram)
    assert all(torch.equal((engram | lora)[name], both[name]) for name in both)
    assert len(both) == len(engram) + len(lora)
    other = values("engram", 4, 1)
    name = "engram_memory.layers.1.multi_head_embedding.embedding.weight"
    assert not torch.equal(engram[name], other[name])
    assert float(engram[name].detach().std()) == pytest.approx(0.02, rel=0.1)


def test_lora_is_an_adapter_of_peft(settings_of):
    settings = settings_of(method="lora", steps=20)
    report = train(settings)
    assert report.entries == {}
    assert report.contents == "LoRA on 28 linear layers"
    words = tokenizer()
    rows = [{"text": text} for text in texts()]
    before, _ = evaluate_loss(build_model(), words, rows, max_length=48)
    after, _ = evaluate_loss(with_lora(settings.output), words, rows, max_length=48)
    assert after < before - 0.3
    assert {path.name for path in settings.output.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


def test_both_work_together(settings_of):
    settings = settings_of(method="both", steps=20)
    report = train(settings)
    folder = settings.output.with_suffix(".lora")
    assert report.contents == "220 rows before layer 1, 290 rows before layer 2, LoRA on 28 linear layers"
    words = tokenizer()
    rows = [{"text": text} for text in texts()]
    adapted = with_lora(folder)
    load_memory(adapted, settings.output, tokenizer=words)
    together, _ = evaluate_loss(adapted, words, rows, max_length=48)
    unload_memories(adapted)
    alone, _ = evaluate_loss(adapted, words, rows, max_length=48)
    assert together < alone
    assert together == pytest.approx(report.loss, abs=0.3)


def test_all_methods_see_the_same_samples(settings_of, monkeypatch):
    seen = {}
    real = Collator.__call__

    def watch(self, samples):
        batch = real(self, samples)
        seen[method].append(batch["input_ids"].tolist())
        return batch

    monkeypatch.setattr(Collator, "__call__", watch)
    for method in ("engram", "lora", "both"):
        seen[method] = []
        train(settings_of(method=method, output=settings_of(method=method).output.with_stem(method)))
    assert seen["engram"] == seen["lora"] == seen["both"]
    assert len(seen["engram"]) > 8


# Sparse tables


def test_sparse_tables_take_the_same_first_steps_as_dense_ones(settings_of):
    # In the first step tables have no gradient, because nothing of theirs is added yet.
    options = {"steps": 2, "evaluate_every": 0, "schedule": "constant", "warm_up": 0, "accumulate": 3}
    found = []
    for sparse in (False, True):
        settings = settings_of(sparse=sparse, output=settings_of().output.with_stem(f"sparse {sparse}"), **options)
        report = train(settings)
        found.append((weights_of(settings.output), read_metrics(report.run_dir / METRICS)[-1]))
    (dense, one), (sparse, two) = found
    first = Learned(build_model(), settings_of(), np.arange(258, dtype=np.int32), 0, sparse=False)
    tables = [name for name in dense if name.endswith("embedding.weight")]
    assert len(tables) == 2
    rate = 5 * settings_of().learning_rate
    for name, value in dense.items():
        # The smallest gradients feel that both add the same epsilon at different places.
        assert float((sparse[name] - value).abs().max()) < 0.1 * rate
        assert float((sparse[name] - value).abs().float().mean()) < 1e-3 * rate
    assert one["gradient_norm"] == pytest.approx(two["gradient_norm"], rel=1e-5)
    begun = dict(first.parameters())
    for name in tables:
        moved = (dense[name] != begun[f"engram_memory.{name}"]).any(dim=1)
        assert 0.1 < float(moved.float().mean()) < 1


def test_large_tables_are_sparse_by_themselves(settings_of, monkeypatch):
    chosen = []
    real = preparation.Learned
    monkeypatch.setattr(
        preparation, "Learned", lambda *args, sparse: chosen.append(sparse) or real(*args, sparse=sparse)
    )
    train(settings_of(steps=1))
    monkeypatch.setattr(preparation, "_MANY", 1000)
    train(settings_of(steps=1), overwrite=True)
    train(settings_of(steps=1, sparse=False), overwrite=True)
    train(settings_of(steps=1, freeze_tables=True), overwrite=True)
    assert chosen == [False, True, False, False]


def test_several_gpus_cannot_exchange_sparse_gradients(settings_of):
    log = Log()
    assert not preparation._choose_sparse(settings_of(sparse=True), torch.device("cuda"), 2, log)
    assert "tables of 1,600 values get dense gradients" in log.notes[0]
    assert preparation._choose_sparse(settings_of(sparse=True), torch.device("cpu"), 2, log)
    assert preparation._choose_sparse(settings_of(sparse=True), torch.device("cuda"), 1, log)


def test_frozen_tables_keep_their_random_values(settings_of):
    settings = settings_of(freeze_tables=True)
    train(settings)
    first = Learned(build_model(), settings, np.arange(258, dtype=np.int32), 0, sparse=False).memory
    values = weights_of(settings.output)
    for layer in (1, 2):
        name = f"layers.{layer}.multi_head_embedding.embedding.weight"
        assert torch.equal(values[name], first.state_dict()[name])
        assert float(values[f"layers.{layer}.value_proj.weight"].abs().max()) > 0


# Packing, checkpointing, precision


def test_packed_documents_have_the_loss_of_separate_ones(settings_of):
    settings = settings_of(steps=6)
    train(settings)
    base, words = build_model(), tokenizer()
    load_memory(base, settings.output)
    documents = tokenize_rows(lengthen(30), words)
    packed, separate = pack_documents(documents, 60), truncate_documents(documents, 60)
    assert not separate.n_cut
    assert len(packed) < 0.7 * len(separate)
    sums = [
        sum_losses(base, make_batches(samples, Collator(0, packed=is_packed), size))
        for samples, is_packed, size in (
            (packed, True, 4),
            (separate, False, 4),
            (separate, False, 1),
            (separate, True, 5),
        )
    ]
    counts = {count for _, count in sums}
    assert counts == {packed.count_tokens()}
    losses = [total / count for total, count in sums]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    assert evaluate_loss(base, words, lengthen(30), max_length=60, packing=True)[0] == pytest.approx(
        losses[1], abs=1e-5
    )


def test_one_step_on_a_packed_batch_is_one_on_its_documents(settings_of, tmp_path):
    # All documents in one batch: packed or not, the gradients are the same.
    write_rows(tmp_path / "data.jsonl", lengthen(6))
    options = {"steps": 2, "evaluate_every": 0, "batch_size": 6, "max_length": 60, "warm_up": 0}
    found = []
    for packing in (True, False):
        settings = settings_of(packing=packing, output=tmp_path / f"{packing}.safetensors", **options)
        report = train(settings)
        found.append((read_metrics(report.run_dir / METRICS)[-1], open_memory(settings.output).record.training))
    assert found[0][0]["loss"] == pytest.approx(found[1][0]["loss"], abs=1e-5)
    assert found[0][0]["gradient_norm"] == pytest.approx(found[1][0]["gradient_norm"], rel=1e-4)
    assert found[0][1]["tokens"] == found[1][1]["tokens"]
    assert found[0][1]["samples"] < found[1][1]["samples"] == 6


def test_accumulated_batches_are_one_large_one(settings_of, tmp_path):
    found = []
    for batch_size, accumulate in ((6, 1), (2, 3)):
        settings = settings_of(
            batch_size=batch_size,
            accumulate=accumulate,
            steps=4,
            output=tmp_path / f"{batch_size}.safetensors",
        )
        found.append((train(settings).loss, weights_of(settings.output)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("method", ["engram", "both"])
def test_gradient_checkpointing_changes_nothing(settings_of, tmp_path, method):
    found = []
    for checkpointing in (False, True):
        settings = settings_of(
            method=method, gradient_checkpointing=checkpointing, output=tmp_path / f"{checkpointing}.safetensors"
        )
        report = train(settings)
        found.append((report.loss, weights_of(settings.output)))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-5)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["engram", "lora", "both"])
def test_in_bf16_the_frozen_model_alone_is_halved(settings_of, caught, method):
    log = Log()
    report = train(settings_of(method=method, precision="bf16", steps=12), watcher=log)
    assert {weight.dtype for weight in caught.model.parameters()} == {torch.bfloat16}
    assert math.isfinite(report.loss)
    values = load_file(
        settings_of().output if method != "lora" else settings_of(method="lora").output / "adapter_model.safetensors"
    )
    assert {value.dtype for value in values.values()} <= {torch.float32, torch.int32}
    first, last = log.figures[4]["validation_loss"], log.figures[12]["validation_loss"]
    assert last < first


def test_conversations_train_too(settings_of, tmp_path):
    rows = [
        {"instruction": "Answer.", "input": f"Does the {animal} sleep?", "output": f"The {animal} sleeps."}
        for animal in ANIMALS
    ]
    write_rows(tmp_path / "data.jsonl", rows)
    settings = settings_of(max_length=64, steps=10)
    report = train(settings)
    assert math.isfinite(report.loss)
    # Ten answers of a few tokens each; the questions do not count.
    documents = tokenize_rows(rows, tokenizer())
    assert documents.learns.mean() < 0.4


def test_evaluating_nothing_is_an_error():
    with pytest.raises(InputError, match=r"no token is left to measure; max_length is 4"):
        evaluate_loss(build_model(), tokenizer(), [{"prompt": texts()[0], "completion": "a"}], max_length=4)


def test_the_backbone_trains(settings_of):
    assert isinstance(QWEN3, TrainingBackbone)
    settings = settings_of(steps=1)
    assert QWEN3.train(settings).output == settings.output
    assert QWEN3.default_train_settings("Qwen/Qwen3-0.6B") == {}
    from engram_core.settings import Layer

    values = dict(QWEN3.default_train_settings("tiny")) | {
        "data": "a.jsonl",
        "output": "b.safetensors",
        "model": "tiny",
    }
    assert resolve_settings(QWEN3.train_settings, [Layer(source="test", values=values)]).precision == "fp32"
