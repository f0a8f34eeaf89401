"""Workers of a real Ray cluster: what a killed one leaves is gone on with, and nothing is different in the end."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from vision_builders import Log, captions, write_pictures

from engram_core.training.concepts import train_concepts
from engram_vision.sd15 import SD15
from engram_vision.settings import SD15TrainSettings
from engram_vision.training.checks import METRICS, STATE

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
TRIGGERS = ("zorbit quell", "mira voss", "fenny wumble", "aldric vortex")


@pytest.fixture
def settings_of(tmp_path):
    for number, trigger in enumerate(TRIGGERS):
        write_pictures(tmp_path / f"pictures{number}", captions(trigger), seed=number)

    def make(folder, **values):
        (tmp_path / folder).mkdir()
        return [
            SD15TrainSettings(
                data=tmp_path / f"pictures{number}",
                trigger=trigger,
                output=tmp_path / folder / f"{number}.safetensors",
                model="tiny",
                resolution=64,
                steps=60,
                batch_size=2,
                validate_every=0,
                precision="fp32",
                device="cpu",
                seed=number,
                **values,
            )
            for number, trigger in enumerate(TRIGGERS)
        ]

    return make


def test_a_killed_worker_loses_at_most_the_step_in_flight(settings_of):
    ray = pytest.importorskip("ray")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the workers have: with others, sums round otherwise
    try:
        expected = [report.output.read_bytes() for report in train_concepts(SD15, settings_of("here"), at_once=2)]
    finally:
        torch.set_num_threads(threads)
    settings = settings_of("workers")
    killer = threading.Thread(target=_kill_one, args=(settings[0].output.with_suffix(".run"),))
    killer.start()
    notes = Log()
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False, logging_level="ERROR")
    try:
        reports = train_concepts(SD15, settings, at_once=2, workers=2, watcher=notes)
    finally:
        ray.shutdown()
        killer.join()
    assert any("its worker died; another goes on" in note for note in notes.notes)
    assert [report.output for report in reports] == [each.output for each in settings]
    assert [report.output.read_bytes() for report in reports] == expected
    for report in reports:
        lines = [json.loads(line) for line in (report.run_dir / METRICS).read_text(encoding="utf-8").splitlines()]
        steps = [line["step"] for line in lines]
        assert steps == list(range(1, 61))  # saved, and counted, once each


def _kill_one(folder):
    """Kill a worker once a concept has its first state."""
    end = time.monotonic() + 120
    while not (folder / STATE).exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.5)
    workers = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline") if _is_training(path)]
    os.kill(workers[0], signal.SIGKILL)


def _is_training(path):
    """Tell whether a process is a worker with a task: Ray calls it after the task."""
    try:
        return b"_train_group" in path.read_bytes()
    except OSError:
        return False
