"""A process that is killed at any moment leaves whole files and can go on."""

import contextlib
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest
from vision_builders import Log, captions, train_settings, write_pictures

from engram_core import open_adapter
from engram_core.training.metrics import read_metrics
from engram_vision.training.state import load_state
from engram_vision.training.trainer import METRICS, SETTINGS, STATE, train

STEPS = 30


def train_and_tell(settings, resume, told):
    """Train in a process of its own, which tells each step."""

    class Teller(Log):
        def advance(self, done, figures=None):
            if self.works[-1][0] == "training":
                told.send(done)

    train(settings, resume=resume, overwrite=not resume, watcher=Teller())


def check_files(settings):
    """Return the saved step; every file that has its final name is whole."""
    folder = settings.output.with_suffix(".run")
    for path in folder.iterdir():
        if not path.name.startswith("."):
            assert path.name in (STATE, METRICS, SETTINGS) or path.name.startswith("frozen-")
    assert "[train]" in (folder / SETTINGS).read_text(encoding="utf-8")
    if settings.output.exists():
        open_adapter(settings.output).check()
    if not (folder / STATE).exists():
        return 0
    progress, groups = load_state(folder / STATE)
    assert set(groups["model"]) == set(groups["best"]) or not groups["best"]
    # The metrics hold at least what the state has seen.
    assert [line["step"] for line in read_metrics(folder / METRICS)][-1:] >= [progress.step]
    return progress.step


@pytest.mark.skipif(not hasattr(os, "fork") or sys.platform == "darwin", reason="needs processes that fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of one that trains on one thread alone
def test_a_process_that_is_killed_again_and_again_ends_with_the_adapter_of_a_run_in_one_go(tmp_path, model):
    write_pictures(tmp_path / "pictures", captions())
    options = {"steps": STEPS, "save_every": 1, "validate_every": 5}
    whole = train(train_settings(tmp_path, model, **options, output=tmp_path / "whole.safetensors"))
    settings = train_settings(tmp_path, model, **options)
    rng, context = random.Random(0), multiprocessing.get_context("fork")
    saved = 0
    for last in (3, 8, 15, 22, None):
        told, tell = context.Pipe(duplex=False)
        process = context.Process(target=train_and_tell, args=(settings, saved > 0, tell))
        process.start()
        tell.close()
        with contextlib.suppress(EOFError):
            while last is None or told.recv() < last:
                if last is None:
                    break
            else:
                time.sleep(rng.random() * 0.08)
                process.kill()
        process.join()
        told.close()
        assert process.exitcode == (0 if last is None else -signal.SIGKILL)
        before, saved = saved, check_files(settings)
        assert saved >= max(before, (last or STEPS) - 1)
    assert settings.output.read_bytes() == whole.output.read_bytes()
    steps = [line["step"] for line in read_metrics(tmp_path / "out.run" / METRICS)]
    assert steps == list(range(1, STEPS + 1))
