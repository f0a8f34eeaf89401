"""A run that was interrupted goes on to the very same adapter; what does not fit it is refused."""

import errno
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from vision_builders import LOUD, TRIGGER, Log, build_model, captions, train_settings, write_pictures

from engram_core import AdapterWriteError, InputError, TargetExistsError
from engram_core.training.metrics import read_metrics
from engram_vision.training import pupil, state, store
from engram_vision.training.state import Progress, load_state, restore_optimizer, save_state
from engram_vision.training.trainer import METRICS, STATE, train

STEPS = 10


@pytest.fixture
def settings(tmp_path, model):
    """Return settings of a run with everything that has a state of its own."""
    write_pictures(tmp_path / "pictures", captions(LOUD))
    return settings_in(tmp_path, model)


def settings_in(folder, model, **values):
    fields = {"trigger": LOUD, "steps": STEPS, "accumulate": 2, "flip": True, "save_every": 3}
    fields |= {"validate_every": 4, "validation_draws": 1}
    return train_settings(folder, model, **fields | values)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, model):
    """Return the bytes of the adapter and the steps of the metrics of a run in one go."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    write_pictures(folder / "pictures", captions(LOUD))
    report = train(settings_in(folder, model))
    return report.output.read_bytes(), [line["step"] for line in read_metrics(report.run_dir / METRICS)]


@pytest.fixture(scope="module")
def interrupted_folder(tmp_path_factory, model):
    """Return the folder of a run that was interrupted after six steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    write_pictures(folder / "pictures", captions(LOUD))
    stop_at(settings_in(folder, model), 5)
    return folder


@pytest.fixture
def interrupted(settings, interrupted_folder):
    """Return settings whose run was interrupted after six steps."""
    shutil.copytree(interrupted_folder / "out.run", settings.output.with_suffix(".run"))
    return settings


def interrupt_process():
    os.kill(os.getpid(), signal.SIGINT)


def interrupt_here():
    raise KeyboardInterrupt


def state_of(settings):
    return settings.output.with_suffix(".run") / STATE


def steps_of(settings):
    return [line["step"] for line in read_metrics(settings.output.with_suffix(".run") / METRICS)]


def stop_at(settings, step, how=interrupt_process, **options):
    with pytest.raises(KeyboardInterrupt):
        train(settings, watcher=Log({step: how}), **options)
    assert not settings.output.exists()


# Going on


@pytest.mark.parametrize("step", [1, 5, 8])
def test_ctrl_c_saves_the_state_and_resuming_gives_the_adapter_of_a_run_in_one_go(settings, uninterrupted, step):
    stop_at(settings, step)
    progress, _ = load_state(state_of(settings))
    assert progress.step == step + 1  # it came during the report of a step, and the next was finished
    log = Log()
    train(settings, resume=True, watcher=log)
    assert log.works[-1] == ("training", STEPS, step + 1)
    assert list(log.figures) == list(range(step + 2, STEPS + 1))
    check(settings, uninterrupted)


def check(settings, uninterrupted):
    adapter, steps = uninterrupted
    assert settings.output.read_bytes() == adapter
    found = steps_of(settings)
    assert found == sorted(set(found))
    assert set(found) >= set(steps)


def test_a_run_can_be_interrupted_many_times(settings, uninterrupted):
    stop_at(settings, 1)
    for step in (3, 6, 8):
        stop_at(settings, step, resume=True)
    train(settings, resume=True)
    check(settings, uninterrupted)


@pytest.mark.parametrize("step", [3, 8])
def test_a_run_that_ends_at_once_goes_on_from_the_last_state(settings, uninterrupted, step):
    stop_at(settings, step, interrupt_here)
    progress, _ = load_state(state_of(settings))
    assert progress.step == step // 3 * 3
    train(settings, resume=True)
    check(settings, uninterrupted)


def test_a_run_that_ends_in_its_last_step_writes_the_adapter_when_resumed(settings, uninterrupted):
    stop_at(settings, STEPS, interrupt_here)
    assert load_state(state_of(settings))[0].step == STEPS
    train(settings, resume=True)
    check(settings, uninterrupted)


@pytest.mark.parametrize("resume", [True, False])
def test_a_run_that_stopped_before_anything_was_saved_begins_at_its_first_step(settings, uninterrupted, resume):
    stop_at(settings, 2, interrupt_here)
    assert not state_of(settings).exists()
    log = Log()
    train(settings, resume=resume, watcher=log)
    assert log.works[-1] == ("training", STEPS, 0)
    assert any("stopped before its first state; it begins at step 0" in note for note in log.notes) == resume
    check(settings, uninterrupted)


def test_where_no_run_was_there_is_nothing_to_resume(settings):
    with pytest.raises(InputError, match=r"state.safetensors: does not exist; there is nothing to resume"):
        train(settings, resume=True)


def test_ctrl_c_in_the_last_step_still_writes_the_adapter(settings, uninterrupted):
    train(settings, watcher=Log({STEPS: interrupt_process}))
    check(settings, uninterrupted)


def test_a_run_that_is_finished_can_be_resumed_to_the_same_end(settings, uninterrupted):
    first = train(settings)
    settings.output.unlink()
    second = train(settings, resume=True)
    check(settings, uninterrupted)
    fields = ("identity", "steps", "kept_step", "loss", "entries")
    assert [getattr(second, field) for field in fields] == [getattr(first, field) for field in fields]


def test_a_run_that_is_finished_and_kept_its_last_step_tells_its_loss(tmp_path, model):
    write_pictures(tmp_path / "pictures", captions(LOUD))
    settings = settings_in(tmp_path, model, keep="last", validate_every=0)
    assert train(settings).loss == train(settings, resume=True).loss


def test_what_does_not_change_the_result_may_change(interrupted, uninterrupted, tmp_path, model):
    shutil.move(tmp_path / "pictures", tmp_path / "moved")
    shutil.copytree(model, tmp_path / "elsewhere" / model.name)
    other = settings_in(
        tmp_path,
        tmp_path / "elsewhere" / model.name,
        data=tmp_path / "moved",
        output=tmp_path / "new.safetensors",
        run_dir=tmp_path / "out.run",
        save_every=2,
        preview_every=10,
    )
    train(other, resume=True)
    assert other.output.read_bytes() == uninterrupted[0]


def test_another_setting_is_refused_by_name(interrupted, tmp_path, model):
    write_pictures(tmp_path / "unseen", captions(LOUD), seed=7)
    for values, told in (
        ({"steps": 20}, "steps was 10 when the run was begun and is 20 now"),
        ({"vector_rate": 0.1}, "vector_rate was 0.05 when the run was begun and is 0.1 now"),
        ({"rule": "relative"}, "rule was absolute when the run was begun and is relative now"),
        ({"seed": 1}, "seed was 0 when"),
        ({"min_snr": 5.0}, "min_snr was None when the run was begun and is 5.0 now"),
        ({"trigger": TRIGGER}, f"trigger was {LOUD} when the run was begun and is {TRIGGER} now"),
        ({"validation_data": tmp_path / "unseen"}, "digest of the validation pictures was"),
    ):
        refuse_resume(settings_in(tmp_path, model, **values), told, "settings.toml", "--force")


def refuse_resume(settings, *told):
    before = state_of(settings).read_bytes()
    with pytest.raises(InputError) as caught:
        train(settings, resume=True)
    message = str(caught.value)
    assert all(text in message for text in told), message
    assert message.isprintable()
    assert message.startswith(str(state_of(settings)))
    assert state_of(settings).read_bytes() == before
    assert not settings.output.exists()


def test_other_pictures_captions_or_weights_are_refused_by_name(interrupted, tmp_path, model):
    settings = interrupted
    lines = tmp_path / "pictures" / "metadata.jsonl"
    text = lines.read_text(encoding="utf-8")
    lines.write_text(text.replace("beach", "snow"), encoding="utf-8")
    refuse_resume(settings, "digest of the training captions was")
    lines.write_text(text, encoding="utf-8")
    shutil.copy(tmp_path / "pictures" / "0.png", tmp_path / "pictures" / "1.png")
    refuse_resume(settings, "digest of the training pictures was")
    shutil.rmtree(tmp_path / "pictures")
    write_pictures(tmp_path / "pictures", captions(LOUD))
    other = tmp_path / "elsewhere" / model.name
    build_model(seed=1).save_pretrained(other)
    refuse_resume(settings_in(tmp_path, other), f"model was {model.stem} with weights ")
    train(settings, resume=True)


# Beginning anew


def test_a_run_is_not_begun_over_another_by_accident(interrupted, uninterrupted):
    settings = interrupted
    before = state_of(settings).read_bytes()
    log = Log()
    with pytest.raises(TargetExistsError, match=r"out.run: holds an interrupted run; pass --resume.*--force"):
        train(settings, watcher=log)
    assert log.works == []
    assert state_of(settings).read_bytes() == before
    train(settings, overwrite=True)
    adapter, steps = uninterrupted
    assert settings.output.read_bytes() == adapter
    assert steps_of(settings) == steps


def test_a_run_that_is_begun_anew_forgets_the_one_before(interrupted):
    stop_at(interrupted, 1, interrupt_here, overwrite=True)
    assert not state_of(interrupted).exists()
    assert steps_of(interrupted) == []


def test_a_run_that_cannot_begin_leaves_the_state_of_the_one_before(interrupted, tmp_path, model):
    before = state_of(interrupted).read_bytes()
    with pytest.raises(InputError, match="does not exist"):
        train(settings_in(tmp_path, model, data=tmp_path / "typo"), overwrite=True)
    assert state_of(interrupted).read_bytes() == before


# The file


def test_a_state_comes_back_bit_for_bit(tmp_path):
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.randn(2))]
    optimizer = torch.optim.AdamW([{"params": [one], "lr": 0.1} for one in parameters])
    for _ in range(3):
        for one in parameters:
            one.grad = torch.randn_like(one)
        optimizer.step()
    values = {"a": parameters[0].detach(), "b": parameters[1].detach()}
    best = {"a": torch.tensor([-0.0, 1e-42]), "b": torch.ones(2)}
    visited = {"clip_l": torch.tensor([True, False])}
    progress = Progress(step=7, best_step=4, best_loss=float("inf"), run={"steps": "10", "trigger": "“é”"})
    save_state(tmp_path / STATE, progress, values, best, visited, optimizer)
    found, groups = load_state(tmp_path / STATE)
    assert found == progress
    for name, expected in (("model", values), ("best", best), ("visited", visited)):
        assert groups[name].keys() == expected.keys()
        for key, value in expected.items():
            assert groups[name][key].numpy().tobytes() == value.numpy().tobytes()
    twin = torch.optim.AdamW([{"params": [one], "lr": 0.1} for one in parameters])
    restore_optimizer(twin, groups["optimizer"])
    expected, restored = optimizer.state_dict(), twin.state_dict()
    assert restored["param_groups"] == expected["param_groups"]
    for index, moments in expected["state"].items():
        for name, value in moments.items():
            assert torch.equal(restored["state"][index][name], value)


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def junk(path):
    path.write_bytes(b"junk" * 100)


def empty(path):
    path.write_bytes(b"")


def foreign(path):
    save_file({"a": torch.zeros(1)}, path)


def without_vectors(path):
    change(path, "model/streams.clip_l.vectors", None)


def with_other_shape(path):
    change(path, "model/streams.clip_l.vectors", torch.zeros(3, 3))


def without_moments(path):
    change(path, "optimizer/0/exp_avg", None)


def with_moments_of_other_shape(path):
    change(path, "optimizer/0/exp_avg", torch.zeros(3, 3))


def with_best_of_other_shape(path):
    change(path, "best/streams.clip_l.vectors", torch.zeros(3, 3))


def with_visited_of_other_shape(path):
    change(path, "visited/clip_l", torch.zeros(3, dtype=torch.bool))


def without_visited(path):
    change(path, "visited/clip_l", None)


def with_other_group(path):
    change(path, "strange/tensor", torch.zeros(1))


def change(path, name, value):
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key: tensor for key, tensor in load_file(path).items() if key != name}
    save_file(tensors | ({} if value is None else {name: value}), path, metadata)


SPOILERS = [cut, junk, empty, foreign, without_vectors, with_other_shape, without_moments, with_moments_of_other_shape]
SPOILERS += [with_best_of_other_shape, without_visited, with_visited_of_other_shape, with_other_group]


def test_a_damaged_state_is_refused(interrupted):
    whole = state_of(interrupted).read_bytes()
    for spoil in SPOILERS:
        state_of(interrupted).write_bytes(whole)
        spoil(state_of(interrupted))
        refuse_resume(interrupted, "begin anew with --force")


# A full disk


def full_after(n_bytes):
    """Return a function that writes as to a disk with some bytes left."""

    def write(file, data):
        file.write(data[:n_bytes])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return write


def test_a_full_disk_leaves_the_state_before_and_no_part_of_the_new_one(interrupted, uninterrupted, monkeypatch):
    settings = interrupted
    folder = settings.output.parent / "out.run"
    before, names = state_of(settings).read_bytes(), sorted(path.name for path in folder.iterdir())
    monkeypatch.setattr(state, "write_all", full_after(100))
    with pytest.raises(AdapterWriteError, match=r"state.safetensors: cannot be written: No space left on device"):
        train(settings, resume=True)
    assert state_of(settings).read_bytes() == before
    assert sorted(path.name for path in folder.iterdir()) == names
    assert not settings.output.exists()
    monkeypatch.undo()
    train(settings, resume=True)
    check(settings, uninterrupted)


def test_a_full_disk_at_the_end_keeps_the_finished_run(settings, uninterrupted, monkeypatch):
    from engram_core import adapter

    monkeypatch.setattr(adapter, "write_all", full_after(10))
    with pytest.raises(AdapterWriteError, match=r"out.safetensors: cannot be written: No space left on device"):
        train(settings)
    assert sorted(path.name for path in settings.output.parent.iterdir()) == ["out.run", "pictures"]
    monkeypatch.undo()
    train(settings, resume=True)
    check(settings, uninterrupted)


def test_a_full_disk_at_the_start_writes_nothing(settings, monkeypatch):
    monkeypatch.setattr(pupil, "write_all", full_after(10))
    with pytest.raises(AdapterWriteError, match=r"settings.toml: cannot be written: No space left on device"):
        train(settings)
    left = [path.name for path in (settings.output.parent / "out.run").iterdir()]
    assert [name.startswith("frozen-") for name in left] == [True]  # whole, and of use to the next run


def test_a_full_disk_while_the_frozen_models_work_leaves_nothing(settings, monkeypatch):
    monkeypatch.setattr(store, "write_all", full_after(10))
    with pytest.raises(AdapterWriteError, match=r"frozen-\w+.safetensors: cannot be written: No space left on device"):
        train(settings)
    assert list((settings.output.parent / "out.run").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(settings, tmp_path, model):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(AdapterWriteError, match=r"file/run: cannot be made: Not a directory"):
        train(settings_in(tmp_path, model, run_dir=tmp_path / "file" / "run"))
    assert not settings.output.exists()
