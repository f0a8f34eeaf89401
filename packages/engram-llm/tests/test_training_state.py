"""A run that was interrupted goes on to the very same result; what does not fit it is refused."""

import contextlib
import json
import os
import shutil
import signal

import pytest
import torch
from llm_training_builders import Log, many_runs, save_model, texts, train_settings, write_texts
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engram_core import AdapterWriteError, InputError, TargetExistsError
from engram_core.training.metrics import read_metrics
from engram_llm.training import checkpoints
from engram_llm.training.checkpoints import (
    capture_random,
    drop_checkpoints,
    list_checkpoints,
    load_state,
    new_checkpoint,
    restore_random,
)
from engram_llm.training.learned import LORA_WEIGHTS
from engram_llm.training.trainer import METRICS, SETTINGS, train

STEPS = 11
EVERYTHING = {"accumulate": 2, "steps": STEPS, "save_every": 3, "evaluate_every": 4, "lora_dropout": 0.1}
KINDS = {
    "dense": {},
    "sparse": {"sparse": True, "engram_warmup_steps": 4, "engram_soft_constraint_steps": 3},
    "lora": {"method": "lora"},
    "both": {"method": "both", "packing": False},
    "random tables": {"freeze_tables": True, "keep": "last", "schedule": "constant"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    with many_runs():
        yield save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(tmp_path, model):
    """Return a function that returns settings of a run in a folder of its own."""

    def make_settings(kind="dense", name="run", **values):
        folder = tmp_path / name
        if not folder.exists():
            folder.mkdir()
            write_texts(folder / "data.jsonl", texts()[:30])
        return train_settings(folder, model, **EVERYTHING | KINDS[kind] | values)

    return make_settings


@pytest.fixture(scope="module")
def interrupted_folder(tmp_path_factory, model):
    """Return the folder of a run that crashed after its eighth step, two steps after its newest checkpoint."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_texts(folder / "data.jsonl", texts()[:30])
    stop_at(train_settings(folder, model, **EVERYTHING, keep="last"), 8, crash)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory, model):
    """Return the bytes of the same run's memory when nothing stops it."""
    folder = tmp_path_factory.mktemp("finished")
    write_texts(folder / "data.jsonl", texts()[:30])
    train(train_settings(folder, model, **EVERYTHING, keep="last"))
    return (folder / "out.safetensors").read_bytes()


@pytest.fixture
def interrupted(tmp_path, model, interrupted_folder):
    """Return a function that returns settings of that run, with some that may have changed."""
    shutil.copytree(interrupted_folder, tmp_path / "interrupted")
    fields = EVERYTHING | {"keep": "last"}
    return lambda **values: train_settings(tmp_path / "interrupted", model, **fields | values)


def run_dir(settings):
    return settings.output.with_suffix(".run")


def results(settings):
    """Return the bytes of everything that a run is for."""
    folders = [settings.output] if settings.method == "lora" else [settings.output.with_suffix(".lora")]
    files = [folder / LORA_WEIGHTS for folder in folders if settings.method != "engram"]
    files += [settings.output] if settings.method != "lora" else []
    assert files
    return [file.read_bytes() for file in files]


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


def crash():
    raise ZeroDivisionError("a crash")


def stop_at(settings, step, how=interrupt, **options):
    with pytest.raises(KeyboardInterrupt if how is interrupt else ZeroDivisionError):
        train(settings, watcher=Log({step: how}), **options)
    assert not settings.output.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_goes_on_to_the_same_bytes(make, kind):
    whole = make(kind, name="whole")
    expected = train(whole)
    parts = make(kind, name="parts")
    stop_at(parts, 4)
    assert list(list_checkpoints(run_dir(parts)))[-1] == 5  # the step was finished first
    stop_at(parts, 8, crash, resume=True)  # at a checkpoint two steps back
    log = Log()
    found = train(parts, resume=True, watcher=log)
    assert results(parts) == results(whole)
    assert ("training", STEPS, 8 if whole.keep == "best" else 6) in log.works
    assert (found.identity, found.loss, found.kept_step) == (expected.identity, expected.loss, expected.kept_step)
    losses = [
        {line["step"]: line["validation_loss"] for line in read_metrics(run_dir(settings) / METRICS) if len(line) > 6}
        for settings in (whole, parts)
    ]
    assert losses[0] == losses[1]
    assert set(losses[0]) == {4, 8, 11}


def test_any_step_may_be_the_last_before_a_crash(make):
    expected = make(name="whole", steps=4, save_every=2)
    train(expected)
    for step in range(1, 5):
        settings = make(name=f"crash {step}", steps=4, save_every=2)
        stop_at(settings, step, crash)
        train(settings, resume=True)
        assert results(settings) == results(expected)


def test_resuming_what_is_finished_writes_it_again(make):
    settings = make()
    report = train(settings)
    before = results(settings)
    settings.output.unlink()
    log = Log()
    assert train(settings, resume=True, watcher=log).identity == report.identity
    assert results(settings) == before
    assert log.steps == []


def test_resuming_an_early_stop_does_not_go_on(make):
    settings = make(patience=1, learning_rate=1e-9, keep="best", steps=40, evaluate_every=2)
    report = train(settings)
    assert report.steps < 40
    before = results(settings)
    assert train(settings, resume=True).steps == report.steps
    assert results(settings) == before


def test_a_run_that_stopped_before_its_first_checkpoint_begins_again(make):
    settings, log = make(), Log()
    stop_at(settings, 1, crash)
    assert not list_checkpoints(run_dir(settings))
    train(settings, resume=True, watcher=log)
    assert any("before its first checkpoint; it begins at step 0" in note for note in log.notes)


def test_what_was_never_begun_cannot_be_resumed(make):
    with pytest.raises(InputError, match=r"out.run: holds no run; there is nothing to resume, leave --resume out"):
        train(make(), resume=True)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"learning_rate": 0.02}, "learning_rate was 0.01 when the run was begun and is 0.02 now"),
        ({"steps": 12}, "steps was 11 when the run was begun and is 12 now"),
        ({"batch_size": 3}, "batch_size was 2 .* is 3 now"),
        ({"layer_ids": [0, 2]}, r"layer_ids was \[1, 2\] .* is \[0, 2\] now"),
        ({"method": "both"}, "method was engram .* is both now"),
        ({"eval_fraction": 0.5}, "eval_fraction was 0.1 .* is 0.5 now"),
        ({"seed": 1}, "seed was 0 .* is 1 now"),
    ],
)
def test_changed_settings_are_refused_by_name(interrupted, values, told):
    with pytest.raises(InputError, match=rf"checkpoint-6: {told}; use .*settings.toml, or begin anew with --force"):
        train(interrupted(**values), resume=True)


def test_changed_data_model_and_tokenizer_are_refused_by_name(interrupted, model, tmp_path):
    settings = interrupted()
    data = settings.data.read_bytes()
    write_texts(settings.data, texts()[:29])
    with pytest.raises(InputError, match=r"digest of the training data was [0-9a-f]{16} when"):
        train(settings, resume=True)
    settings.data.write_bytes(data)
    with pytest.raises(InputError, match=r"model was .* with weights [0-9a-f]{16} when"):
        train(interrupted(model=str(save_model(tmp_path / "other", seed=1))), resume=True)
    # The same model with two tokens exchanged that no text has.
    other = shutil.copytree(model, tmp_path / "third" / model.name) / "tokenizer.json"
    words = json.loads(other.read_text(encoding="utf-8"))
    vocabulary = words["model"]["vocab"]
    vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
    other.write_text(json.dumps(words), encoding="utf-8")
    with pytest.raises(InputError, match=r"checkpoint-6: tokenizer was [0-9a-f]{16} when"):
        train(interrupted(model=str(other.parent)), resume=True)


def test_what_does_not_matter_may_change(interrupted, finished):
    settings = interrupted(save_every=5, license="MIT")
    train(settings, resume=True)
    (settings.data.parent / "whole.safetensors").write_bytes(finished)
    expected, found = load_file(settings.data.parent / "whole.safetensors"), load_file(settings.output)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_run_in_use_is_not_overwritten_unasked(interrupted, finished):
    settings = interrupted()
    with pytest.raises(
        TargetExistsError, match=r"out.run: holds a run; pass --resume to go on with it, --force to begin anew, or"
    ):
        train(settings)
    report = train(settings, overwrite=True)
    assert settings.output.read_bytes() == finished
    with pytest.raises(TargetExistsError, match=r"out.safetensors: exists; pass --force to replace it"):
        train(settings)
    # Nothing of the earlier run is left.
    assert [line["step"] for line in read_metrics(report.run_dir / METRICS)] == [3, 4, 6, 8, 9, 10, 11]


@pytest.mark.parametrize("kind", ["sparse", "both"])
def test_checkpoints_hold_what_learns_alone_and_nothing_pickled(make, kind, model):
    settings = make(kind)
    train(settings)
    files = [path for path in run_dir(settings).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".jsonl", ".toml"}
    assert not [path for path in files if path.name.startswith(".")]
    base = set(load_file(model / "model.safetensors"))
    size = sum(value.numel() for value in load_file(model / "model.safetensors").values())
    for file in (path for path in files if path.suffix == ".safetensors"):
        tensors = load_file(file)
        assert not base & set(tensors)
        assert sum(value.numel() for value in tensors.values()) < size
    for file in (path for path in files if path.suffix == ".json"):
        json.loads(file.read_text(encoding="utf-8"))


def test_the_newest_two_and_the_best_are_kept(make):
    settings = make(steps=12, save_every=1, evaluate_every=12, eval_fraction=0.1)
    train(settings)
    assert list(list_checkpoints(run_dir(settings))) == [11, 12]
    settings = make(
        name="rising", steps=8, save_every=2, evaluate_every=1, learning_rate=30.0, warm_up=0, max_grad_norm=0
    )
    report = train(settings)
    assert list(list_checkpoints(run_dir(settings))) == sorted({report.kept_step, 6, 8})
    assert report.kept_step < 6


@pytest.mark.parametrize("damage", ["no state", "half a state", "another state", "no memory", "half a memory"])
def test_a_damaged_checkpoint_is_named_with_the_remedy(interrupted, finished, damage):
    settings = interrupted()
    newest = run_dir(settings) / "checkpoint-6"
    state, memory = newest / "state.safetensors", newest / "memory.safetensors"
    if damage.startswith("no"):
        (state if "state" in damage else memory).unlink()
    elif damage.startswith("half"):
        file = state if "state" in damage else memory
        file.write_bytes(file.read_bytes()[:-50])
    else:
        save_file({"a": torch.zeros(1)}, state)
    with pytest.raises(InputError, match=r"checkpoint-6.*delete .*to go on from the"):
        train(settings, resume=True)
    shutil.rmtree(newest)
    train(settings, resume=True)
    assert settings.output.read_bytes() == finished


def test_a_missing_best_checkpoint_is_told(make):
    settings = make()
    stop_at(settings, 7, crash)
    shutil.rmtree(run_dir(settings) / "checkpoint-4")
    with pytest.raises(
        InputError, match=r"checkpoint-4: is missing, and holds the best weights; go on with --keep last"
    ):
        train(settings, resume=True)
    assert train(make(keep="last"), resume=True).kept_step == STEPS


def test_a_checkpoint_appears_whole_or_not_at_all(tmp_path):
    with contextlib.suppress(ZeroDivisionError), new_checkpoint(tmp_path, 3) as folder:
        (folder / "half").write_text("x")
        crash()
    assert list(tmp_path.iterdir()) == []
    with new_checkpoint(tmp_path, 3) as folder:
        (folder / "whole").write_text("x")
        assert not list_checkpoints(tmp_path)
    assert (list_checkpoints(tmp_path)[3] / "whole").is_file()
    with new_checkpoint(tmp_path, 3) as folder:
        (folder / "newer").write_text("x")
    assert [path.name for path in list_checkpoints(tmp_path)[3].iterdir()] == ["newer"]


def test_a_disk_that_gets_full_keeps_older_checkpoints(make, monkeypatch):
    settings = make(keep="last")
    real = checkpoints.save_file

    def fill(*args):
        if list_checkpoints(run_dir(settings)):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        real(*args)

    monkeypatch.setattr(checkpoints, "save_file", fill)
    with pytest.raises(AdapterWriteError, match=r"cannot be written: I/O error: No space left on device"):
        train(settings)
    assert list(list_checkpoints(run_dir(settings))) == [3]
    monkeypatch.setattr(checkpoints, "save_file", real)
    train(settings, resume=True)


def test_what_killed_processes_left_is_removed(tmp_path):
    (tmp_path / ".checkpoint-4.tmp").mkdir()
    for step in (1, 2, 3):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-old").mkdir()
    drop_checkpoints(tmp_path, keep=[1])
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-2",
        "checkpoint-3",
        "checkpoint-old",
    ]
    drop_checkpoints(tmp_path, newest=0)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-old"]
    assert list_checkpoints(tmp_path / "none") == {}


def test_the_state_says_where_the_run_stands(interrupted):
    settings = interrupted()
    state = load_state(run_dir(settings) / "checkpoint-6")
    assert state.progress.step == 6
    assert state.progress.best_step == 4
    assert state.progress.waited == 0
    assert state.progress.tokens > 0
    assert not state.progress.ended
    assert state.progress.run["number of processes"] == "1"
    assert (run_dir(settings) / SETTINGS).read_text(encoding="utf-8").startswith('[train]\nbackbone = "qwen3"\n')


def test_random_numbers_go_on_where_they_were():
    import random

    import numpy as np

    def draw():
        return random.random(), float(np.random.rand()), random.gauss(0, 1), torch.rand(3).tolist()  # noqa: NPY002

    draw()
    state = json.loads(json.dumps(capture_random()))
    expected = [draw(), draw()]
    restore_random(state)
    assert [draw(), draw()] == expected


def test_the_callers_random_numbers_are_left_alone(make):
    torch.manual_seed(5)
    expected = capture_random()
    train(make(steps=2))
    assert capture_random() == expected
