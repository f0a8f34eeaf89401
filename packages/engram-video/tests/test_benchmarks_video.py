"""The benchmarks run from end to end on an untrained model, and go on where they were stopped."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification
from video_builders import build_wan, tokenizer

from engram_vision.shipped import judge_folder

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURING = Path(__file__).parents[2] / "engram-core" / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MEASURING.is_dir(), reason="benchmarks are only in the repository"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, one_thread):
    """Return a folder with an untrained pipeline, the judge of pictures, and an untrained judge of motions."""
    root = tmp_path_factory.mktemp("tiny")
    pipeline = build_wan()
    pipeline.tokenizer = copy.deepcopy(tokenizer())
    pipeline.tokenizer.model_max_length = 160  # names are read letter by letter
    pipeline.save_pretrained(root / "wan22")
    shutil.copytree(judge_folder(), root / "judge")
    torch.manual_seed(0)
    shape = {"num_channels": 9, "embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "num_labels": 6}
    ResNetForImageClassification(ResNetConfig(**shape, layer_type="basic")).save_pretrained(root / "judge" / "motion")
    return root


def run(tiny, *arguments, folder=None):
    paths = os.pathsep.join([str(BENCHMARKS), str(MEASURING)])
    environment = os.environ | {"ENGRAM_VIDEO_TINY": str(tiny), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert not done.returncode, done.stderr
    return done


def cells(output, name):
    """Return the rows of a method in all tables, one list of cells each."""
    rows = [line.split("  ") for line in output.splitlines() if line.startswith(f"{name}  ")]
    return [[cell.strip() for cell in row[1:] if cell.strip()] for row in rows]


def test_quality_compares_methods_and_finds_that_lora_changes_what_it_should_not(tiny):
    output = run(tiny, BENCHMARKS / "run.py", "quality", "--quick").stdout
    assert "mean (lowest to highest) of 1 seeds of 2 clips" in output
    learned, _, stays = cells(output, "engram, a residual for each block")
    assert int(learned[0].split()[0].replace(",", "")) > 0
    assert stays[:2] == ["4 of 4", "0.000 (0.000 to 0.000)"]
    *_, stays = cells(output, "LoRA of what reads the text, rate 0.01")
    assert stays[0] == "0 of 4"
    assert cells(output, "the base model")[-1][0] == "4 of 4"


def test_clip_training_times_each_way_in_its_own_process(tiny):
    output = run(tiny, BENCHMARKS / "run.py", "clip_training", "--quick").stdout
    ((ours, most, whole, learned),) = cells(output, "engram")
    assert "ms" in ours or " s" in ours
    assert whole.endswith("MiB")
    assert most.endswith("MiB")
    for way in ("engram, nothing cached", "LoRA, the same caches", "LoRA, nothing cached"):
        ((_, ratio, *_),) = cells(output, way)
        assert ratio.endswith("times")
    assert cells(output, "engram, nothing cached")[0][-1] == learned  # the caches change nothing of what is learned


TWICE = """
from pathlib import Path
from dataclasses import replace
from checkpoint import Checkpoint
from quality import Benchmark, Plan
plan = Plan.quick()
for number in range(2):
    outcome = Benchmark(Checkpoint.find(), Path("work"), plan, "cpu").run()
    Path(f"{number}.json").write_text(__import__("json").dumps(dict(outcome.figures)))
    print("----", file=__import__("sys").stderr, flush=True)
changed = replace(plan, methods=plan.methods[1:2], steps=3)
Benchmark(Checkpoint.find(), Path("work"), changed, "cpu").run()
"""


def test_finished_runs_are_kept_and_those_with_other_settings_made_anew(tiny, tmp_path):
    first, second, third = run(tiny, "-c", TWICE, folder=tmp_path).stderr.split("----")
    made = "engram, one residual, Zorbit Quell, seed 0"
    assert made in first
    assert "LoRA of what reads the text, rate 0.01, Fenny Wumble, seed 0" in first
    assert "seed 0" not in second
    assert made in third
    assert "the base model, Zorbit" not in third
    assert json.loads((tmp_path / "0.json").read_text()) == json.loads((tmp_path / "1.json").read_text())
    assert (tmp_path / "work" / "wan22-zorbit-quell.png").exists()


def test_published_settings_are_those_of_the_published_run(tiny):
    code = "import json; from methods import publish; print(json.dumps([publish(280, stretch=s) for s in (1, 0)]))"
    stretched, plain = json.loads(run(tiny, "-c", code).stdout)
    assert plain["vector_rate"] == 5e-4
    assert plain["scale_rate"] == 1e-4
    assert stretched["vector_rate"] == pytest.approx(5e-2)
    assert stretched["scale_rate"] == pytest.approx(1e-2)
    assert plain["rule"] == "relative"
    assert plain["overlap"] == "mean"
    assert plain["activation"] == "spans"
    assert plain["init_std"] == 0.02
    assert plain["init_scale"] == 0.05
    assert plain["warm_up"] == 5
