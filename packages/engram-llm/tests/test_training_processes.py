"""Several processes train one memory: the same as one process with their batches together. And one that is killed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from llm_training_builders import many_runs, save_model, texts, tokenizer, train_settings, write_texts
from safetensors.torch import load_file

from engram_core import open_memory
from engram_core.settings import dump_settings
from engram_core.training.metrics import read_metrics
from engram_llm.data import pack_documents, tokenize_rows
from engram_llm.training.checkpoints import list_checkpoints, load_state
from engram_llm.training.trainer import METRICS, train

pytestmark = pytest.mark.slow

# A script of a user's own; Ctrl-C comes to one process alone.
SCRIPT = """
import json, os, signal, sys
import torch
from engram_core import Watcher
from engram_core.settings import Layer, resolve_settings
from engram_llm.settings import TrainSettings
from engram_llm.training.trainer import train

class Stopper(Watcher):
    def advance(self, done, figures=None):
        if done == stop and os.environ.get("RANK") == "1":
            os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    torch.set_num_threads(1)
    values, resume, stop = json.loads(sys.argv[1])
    settings = resolve_settings(TrainSettings, [Layer(source="test", values=values)])
    try:
        report = train(settings, resume=resume, watcher=Stopper())
        os.write(1, f"identity {report.identity} {report.steps}\\n".encode())
    except KeyboardInterrupt:
        os.write(1, b"interrupted\\n")
"""


@pytest.fixture
def model(tmp_path):
    with many_runs():
        yield save_model(tmp_path / "model")


@pytest.fixture
def start(tmp_path):
    """Return a function that begins to train in processes of their own."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")

    def begin(settings, *, resume=False, stop=0, processes=1):
        values = json.dumps([dump_settings(settings), resume, stop])
        # The precision is what a user's accelerate configuration may say; it must not count.
        options = {"HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo", "ACCELERATE_MIXED_PRECISION": "bf16"}
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *(torchrun if processes > 1 else []), str(script), values]
        return subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | options
        )

    return begin


@pytest.fixture
def launch(start):
    """Return a function that trains with two processes and returns what they print, in order."""

    def run(settings, **options):
        process = start(settings, processes=2, **options)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err[-3000:]
        return sorted(out.splitlines())

    return run


@pytest.mark.skipif(sys.platform != "linux", reason="needs gloo over the loopback interface lo")
@pytest.mark.parametrize(
    "kind",
    [
        {"method": "both", "gradient_checkpointing": True},
        {"sparse": True, "engram_warmup_steps": 2},
        {"method": "lora", "packing": False},
    ],
    ids=["both", "sparse", "lora"],
)
def test_two_processes_learn_what_one_learns_from_their_batches_together(tmp_path, model, launch, kind):
    options = {"steps": 10, "accumulate": 2, "evaluate_every": 5, "save_every": 4, "learning_rate": 1e-3, **kind}
    # As many samples as fill whole steps: else several processes see some of them twice in an epoch.
    rows = [{"text": text} for text in texts()]
    count = 48
    while kind.get("packing", True) and len(pack_documents(tokenize_rows(rows[:count], tokenizer()), 48)) % 8:
        count += 1
    write_texts(tmp_path / "data.jsonl", texts()[:count])
    options["eval_data"] = write_texts(tmp_path / "unseen.jsonl", texts()[-7:])
    suffix = "" if kind.get("method") == "lora" else ".safetensors"

    def make(name, size):
        return train_settings(tmp_path, model, **options, batch_size=size, output=tmp_path / f"{name}{suffix}")

    def weights(settings):
        file = settings.output if suffix else settings.output / "adapter_model.safetensors"
        return load_file(file), file.read_bytes()

    one, two = make("one", 4), make("two", 2)
    train(one)
    printed = launch(two)
    assert len(printed) == 2
    assert len(set(printed)) == 1
    expected, found = weights(one)[0], weights(two)[0]
    for name, value in expected.items():
        # Gradients near nothing may have either sign, and Adam moves by the sign.
        assert float((found[name] - value).abs().float().mean()) < 2e-4, name
    if suffix:
        assert printed[0].split()[1] == open_memory(two.output).identity()
        first, second = (open_memory(settings.output).record.training for settings in (one, two))
        assert first["tokens"] == second["tokens"]
        assert second["processes"] == 2
    lines = [read_metrics(settings.output.with_suffix(".run") / METRICS) for settings in (two, one)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    for field in ("loss", "validation_loss", "gradient_norm"):
        values = [[line[field] for line in part if field in line] for part in lines]
        assert values[0] == pytest.approx(values[1], rel=1e-3)

    if kind.get("method") != "both":
        return
    # Interrupted in one of them, both stop, and go on to the same.
    again = make("again", 2)
    assert launch(again, stop=5) == ["interrupted"] * 2
    assert not again.output.exists()
    progress = load_state(again.output.with_suffix(".run") / "checkpoint-6").progress
    assert progress.run["number of processes"] == "2"
    launch(again, resume=True)
    assert open_memory(again.output).record.name == "again"
    for name, value in weights(two)[0].items():
        assert torch.equal(weights(again)[0][name], value)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_goes_on_to_the_same_bytes(tmp_path, model, start):
    write_texts(tmp_path / "data.jsonl")
    options = {"steps": 60, "save_every": 3, "evaluate_every": 7, "method": "both"}
    whole = train_settings(tmp_path, model, **options, name="x", output=tmp_path / "whole.safetensors")
    train(whole)
    parts = train_settings(tmp_path, model, **options, name="x", output=tmp_path / "parts.safetensors")
    run_dir = parts.output.with_suffix(".run")
    for least in (3, 25):
        process = start(parts, resume=run_dir.exists())
        while max(list_checkpoints(run_dir), default=0) < least:
            time.sleep(0.01)
            assert process.poll() is None, process.stderr.read()[-3000:]
        process.send_signal(signal.SIGKILL)
        process.communicate()
        newest = max(list_checkpoints(run_dir))
        assert load_state(run_dir / f"checkpoint-{newest}").progress.step == newest
        assert not parts.output.exists()
    train(parts, resume=True)
    assert parts.output.read_bytes() == whole.output.read_bytes()
    files = [path.with_suffix(".lora") / "adapter_model.safetensors" for path in (parts.output, whole.output)]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = [
        [line["step"] for line in read_metrics(path.with_suffix(".run") / METRICS)]
        for path in (parts.output, whole.output)
    ]
    assert steps[0] == steps[1]
