"""The course of a run: validations, gates, early stopping, figures, and what goes wrong."""

import math
import sys
from types import ModuleType

import pytest
import torch
from llm_training_builders import (
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
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import integration_utils

from engram_core import InputError, TrainingError, open_memory
from engram_core.training import checks
from engram_core.training.metrics import read_metrics
from engram_llm.loading import load_memory
from engram_llm.training import preparation, trainer
from engram_llm.training.course import gate_floor
from engram_llm.training.loss import evaluate_loss
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


def weights_of(path):
    return load_file(path)


def test_the_validation_loss_is_a_mean_over_tokens(settings_of, tmp_path):
    write_rows(tmp_path / "seen.jsonl", lengthen(7))
    settings = settings_of(eval_data=tmp_path / "seen.jsonl", steps=4, batch_size=2, max_length=60, packing=False)
    log = Log()
    report = train(settings, watcher=log)
    base = build_model()
    load_memory(base, settings.output)
    loss, _ = evaluate_loss(base, tokenizer(), tmp_path / "seen.jsonl", max_length=60, batch_size=3)
    assert report.loss == pytest.approx(loss, abs=1e-6)
    assert any("seen.jsonl: 3 of 7 validation texts are in the training data too" in note for note in log.notes)


def test_gates_open_all_the_way_then_a_little_then_as_they_will(settings_of, monkeypatch):
    settings = settings_of(engram_warmup_steps=3, engram_soft_constraint_steps=2)
    assert [gate_floor(step, settings) for step in range(7)] == [1.0, 1.0, 1.0, 0.1, 0.1, 0.0, 0.0]
    seen, measured = [], []

    def record(self, _):
        floors = {layer.gate_floor for layer in learned[0].memory.layers.values()}
        (seen if learned[0].model.training else measured).append(floors)

    learned = []
    real = preparation.Learned
    monkeypatch.setattr(
        preparation, "Learned", lambda *args, **options: learned.append(real(*args, **options)) or learned[0]
    )
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: record(module, _) if learned and module is learned[0].model else None
    )
    train(settings_of(engram_warmup_steps=3, engram_soft_constraint_steps=2, steps=7, evaluate_every=2))
    handle.remove()
    assert seen == [{1.0}] * 3 + [{0.1}] * 2 + [{0.0}] * 2
    assert measured
    assert all(floors == {0.0} for floors in measured)


def test_training_stops_when_validation_does_not_improve(settings_of):
    log = Log()
    # A rate so high that it gets worse at once.
    settings = settings_of(steps=100, evaluate_every=2, patience=3, learning_rate=3.0, warm_up=0, max_grad_norm=0)
    report = train(settings, watcher=log)
    losses = {
        line["step"]: line["validation_loss"]
        for line in read_metrics(report.run_dir / METRICS)
        if "validation_loss" in line
    }
    assert report.steps == max(losses) < 100
    assert report.kept_step == min(losses, key=losses.get) == report.steps - 6
    assert report.loss == losses[report.kept_step]
    assert any(
        f"step {report.steps}: no validation was better than that of step {report.kept_step}" in note
        for note in log.notes
    )
    training = open_memory(settings.output).record.training
    assert (training["kept_step"], training["steps_done"]) == (report.kept_step, report.steps)
    kept = weights_of(report.run_dir / f"checkpoint-{report.kept_step}" / "memory.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in weights_of(settings.output).items())


def test_the_last_weights_can_be_kept(settings_of):
    settings = settings_of(steps=6, evaluate_every=2, learning_rate=3.0, warm_up=0, max_grad_norm=0, keep="last")
    report = train(settings)
    assert report.kept_step == 6
    last = weights_of(report.run_dir / "checkpoint-6" / "memory.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in weights_of(settings.output).items())


@pytest.mark.parametrize("values", [{"evaluate_every": 0, "eval_data": "none.jsonl"}, {"eval_fraction": 0.0}])
def test_without_validation_the_training_loss_is_told(settings_of, values):
    log = Log()
    report = train(settings_of(**values), watcher=log)
    assert report.kept_step == 8
    assert report.loss == log.figures[8]["loss"]
    training = open_memory(settings_of(**values).output).record.training
    assert "validation_loss" not in training
    assert training["documents"] == 100


def test_metrics_are_those_that_are_told(settings_of):
    log = Log()
    report = train(settings_of(steps=12, evaluate_every=5), watcher=log)
    lines = {line.pop("step"): line for line in read_metrics(report.run_dir / METRICS)}
    assert lines == log.figures
    assert sorted(lines) == [4, 5, 8, 10, 12]
    assert {step for step, line in lines.items() if "validation_loss" in line} == {5, 10, 12}
    assert set(lines[4]) == {"loss", "rate", "gradient_norm", "steps_per_second", "memory_mb"}
    assert lines[12]["rate"] < lines[4]["rate"] < 1e-2


def test_tensorboard_gets_the_figures(settings_of, monkeypatch):
    written = []

    class Writer:
        def __init__(self, log_dir):
            self.log_dir = log_dir

        def add_text(self, *_):
            pass

        def add_scalar(self, name, value, step):
            written.append((name, step, self.log_dir))

        def flush(self):
            pass

        close = flush

    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setattr(checks, "find_spec", lambda _: True)
    report = train(settings_of(tracker="tensorboard"))
    assert {("train/loss", 4), ("eval/loss", 4), ("train/loss", 8), ("eval/loss", 8)} <= {one[:2] for one in written}
    assert all(place.startswith(str(report.run_dir)) for _, _, place in written)


def test_rates_rise_and_fall_for_every_group(settings_of, monkeypatch):
    seen = []
    real = trainer.MemoryTrainer.create_scheduler

    def watch(self, *args, **options):
        seen.append(real(self, *args, **options))
        return seen[0]

    monkeypatch.setattr(trainer.MemoryTrainer, "create_scheduler", watch)
    train(settings_of(learning_rate=1e-3, table_rate=0.5, weight_decay=0.1))
    scheduler = seen[0]
    assert scheduler.base_lrs == [1e-3, 1e-3, 0.5]
    assert [group["weight_decay"] for group in scheduler.optimizer.param_groups] == [0.1, 0.0, 0.0]


# Trouble


def test_a_loss_that_is_no_number_ends_the_run_with_the_last_good_state(settings_of, monkeypatch):
    settings = settings_of(steps=20, evaluate_every=0, save_every=2)

    class Spoiler(Log):
        def advance(self, done, figures=None):
            super().advance(done, figures)
            if self.works[-1][0] == "training" and done == 5:
                learned[0].parameters()[0][1].data.fill_(math.nan)

    learned = []
    real = preparation.Learned
    monkeypatch.setattr(
        preparation, "Learned", lambda *args, **options: learned.append(real(*args, **options)) or learned[0]
    )
    told = (
        r"step 6: the loss is nan; .*checkpoint-4 is the last good state; begin anew with --force and a learning_rate"
    )
    with pytest.raises(TrainingError, match=told):
        train(settings, watcher=Spoiler())
    assert not settings.output.exists()


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP"])
def test_other_ways_to_share_work_are_refused(settings_of, monkeypatch, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match=f"accelerate is set up for {name}; .* plain data parallelism"):
        train(settings_of())


def test_what_is_too_long_is_told(settings_of, tmp_path):
    rows = [{"text": " ".join(texts()[:4])}, *lengthen(20)]
    write_rows(tmp_path / "data.jsonl", rows)
    log = Log()
    train(settings_of(max_length=30, eval_fraction=0.0), watcher=log)
    assert any(
        "of 21 texts have more than 30 tokens and continue in samples of their own" in note for note in log.notes
    )
    log = Log()
    train(settings_of(max_length=30, eval_fraction=0.0, packing=False), overwrite=True, watcher=log)
    assert any("of 21 texts have more than 30 tokens and are cut there" in note for note in log.notes)


def test_equal_rows_leave_nothing_to_validate_on(settings_of, tmp_path):
    write_texts(tmp_path / "data.jsonl", ["The otter."] * 5)
    log = Log()
    train(settings_of(), watcher=log)
    assert any("all rows are equal, so none is left to validate on" in note for note in log.notes)


@pytest.mark.gpu
@pytest.mark.parametrize("values", [{}, {"sparse": True}, {"method": "lora"}, {"method": "both"}])
def test_it_learns_on_a_gpu_too(settings_of, values):
    log = Log()
    train(settings_of(device="cuda", precision="bf16", steps=12, gradient_checkpointing=True, **values), watcher=log)
    assert log.figures[12]["validation_loss"] < log.figures[4]["validation_loss"]
