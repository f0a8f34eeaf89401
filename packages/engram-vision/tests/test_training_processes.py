"""Several processes train one adapter: the same as one process with their batches together."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from vision_builders import LOUD, captions, train_settings, write_pictures

from engram_core import open_adapter
from engram_core.settings import dump_settings
from engram_core.training.metrics import read_metrics
from engram_vision.training.trainer import METRICS, train

pytestmark = pytest.mark.slow

# A script of a user's own; Ctrl-C comes to one process alone.
SCRIPT = """
import json, os, signal, sys
import torch
from engram_core import Watcher
from engram_core.settings import Layer, resolve_settings
from engram_vision import SD15TrainSettings, train

class Stopper(Watcher):
    def advance(self, done, figures=None):
        if done == stop and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    torch.set_num_threads(1)
    values, resume, stop = json.loads(sys.argv[1])
    settings = resolve_settings(SD15TrainSettings, [Layer(source="test", values=values)])
    try:
        report = train(settings, resume=resume, watcher=Stopper())
        os.write(1, f"identity {report.identity}\\n".encode())
    except KeyboardInterrupt:
        os.write(1, b"interrupted\\n")
"""


@pytest.fixture
def launch(tmp_path):
    """Return a function that trains with two processes and returns what they print, in order."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def start(settings, *, resume=False, stop=0):
        values = json.dumps([dump_settings(settings), resume, stop])
        # The precision is what a user's accelerate configuration may say; it must not count.
        options = {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_MIXED_PRECISION": "bf16"}
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
        done = subprocess.run(
            [*command, values], capture_output=True, text=True, timeout=600, env=os.environ | options, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return sorted(done.stdout.splitlines())

    return start


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo over the loopback interface lo")
def test_two_processes_learn_what_one_learns_from_their_batches_together(tmp_path, model, launch):
    write_pictures(tmp_path / "pictures", captions(LOUD))
    options = {"trigger": LOUD, "steps": 10, "accumulate": 2, "validate_every": 5, "save_every": 4}
    one = train_settings(tmp_path, model, **options, batch_size=4, output=tmp_path / "one.safetensors")
    train(one)
    two = train_settings(tmp_path, model, **options, batch_size=2, output=tmp_path / "two.safetensors")
    printed = launch(two)
    assert len(printed) == 2
    assert len(set(printed)) == 1
    found, expected = (next(open_adapter(settings.output).concepts()).streams["clip_l"] for settings in (two, one))
    assert printed[0] == f"identity {open_adapter(two.output).identity()}"
    assert found.triggers == expected.triggers
    assert found.entries == expected.entries
    np.testing.assert_allclose(found.vectors, expected.vectors, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.scales, expected.scales, rtol=1e-4, atol=1e-6)
    folders = [settings.output.with_suffix(".run") for settings in (two, one)]
    lines = [read_metrics(folder / METRICS) for folder in folders]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for field in ("loss", "validation_loss"):
        values = [[line[field] for line in part if field in line] for part in lines]
        np.testing.assert_allclose(*values, rtol=1e-5)

    # Interrupted in one of them, both stop, and go on to the same.
    before = two.output.read_bytes()
    again = train_settings(tmp_path, model, **options, batch_size=2, output=tmp_path / "again.safetensors")
    assert launch(again, stop=5) == ["interrupted"] * 2
    assert not again.output.exists()
    launch(again, resume=True)
    assert again.output.read_bytes() == before
