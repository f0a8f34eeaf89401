"""The comparison and the accumulation run from end to end in a few steps, and go on where they were stopped."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
MEASURING = Path(__file__).parents[2] / "engram-core" / "benchmarks"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MEASURING.is_dir(), reason="benchmarks are only in the repository"),
]


def run(*arguments, folder=None):
    paths = os.pathsep.join([str(BENCHMARKS), str(MEASURING), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, check=False)
    assert not done.returncode, done.stderr
    return done


def cells(output, name):
    """Return the rows of a method in all tables, one list of cells each."""
    rows = [line.split("  ") for line in output.splitlines() if line.startswith(f"{name}  ")]
    return [[cell.strip() for cell in row[1:] if cell.strip()] for row in rows]


@pytest.fixture(scope="module")
def output():
    return run(BENCHMARKS / "run.py", "comparison", "--quick").stdout


def test_only_what_is_addressed_leaves_other_prompts_alone(output):
    for name in ("the base model", "engram, one residual, 20 steps", "textual inversion, 8 vectors"):
        identical, difference, distance, _, again, *_ = cells(output, name)[1]
        assert (identical, difference, distance, again) == ("1.00", "0.000", "0.000", "1.00")
    for name in ("LoRA of the U-Net, rank 4", "LoRA of the text encoder, rank 4", "DreamBooth, prior preserved"):
        assert cells(output, name)[1][0] == "0.00"


def test_costs_of_every_method_are_told(output):
    costs = {
        name: cells(output, name)[3]
        for name in ("engram, one residual, 20 steps", "textual inversion, 8 vectors", "DreamBooth, prior preserved")
    }
    _, size, *times, memory, load = costs["DreamBooth, prior preserved"]
    assert size.endswith("MB")
    assert all(cell.endswith("s") or ")" in cell for cell in times)
    assert "MiB" in memory
    assert "ms" in load
    assert costs["textual inversion, 8 vectors"][0] == "1,536"


def test_two_characters_are_drawn_where_two_can_be_loaded(output):
    assert len(cells(output, "LoRA of the U-Net, rank 4")[2]) > len(cells(output, "DreamBooth, prior preserved")[2])


def test_the_short_form_compares_for_a_transformer():
    output = run(BENCHMARKS / "run.py", "comparison_sd35", "--quick").stdout
    assert cells(output, "engram, one residual, 300 steps")[1][:2] == ["1.00", "0.000"]
    assert cells(output, "LoRA of the transformer, rank 4")[1][0] == "0.00"


LOADED = """
from pathlib import Path
from baselines import learn_lora, load_lora, lora_folder
from lessons import Task, open_model, read_cast
from safetensors.torch import load_file
from engram_vision.sd15 import SD15
from engram_vision.sd35 import SD35

_, character, _ = read_cast()
for backbone, part in ((SD15, "unet"), (SD15, "text_encoder"), (SD35, "transformer")):
    output = Path(part)
    task = Task(data=character.folder, trigger=character.name, output=output, cache=output / "frozen", steps=1, seed=0,
                device="cpu", backbone=backbone)
    learned = learn_lora(task, {"part": part, "rank": 4, "rate": 1e-2})
    pipeline = open_model("cpu", backbone)
    load_lora(pipeline, character.name, output)
    layers = [value for name, value in getattr(pipeline, part).named_parameters() if ".lora_" in name]
    file = load_file(lora_folder(output) / "pytorch_lora_weights.safetensors")
    moved, kept = (sum(float(value.double().abs().sum()) for value in values) for values in (layers, file.values()))
    print(part, sum(value.numel() for value in layers) == learned.values, abs(moved / kept - 1) < 1e-9, sep="  ")
"""


def test_all_that_a_lora_learned_is_loaded(tmp_path):
    output = run("-c", LOADED, folder=tmp_path).stdout
    assert [cells(output, part) for part in ("unet", "text_encoder", "transformer")] == [[["True", "True"]]] * 3


TWICE = """
import json
from dataclasses import replace
from pathlib import Path
from comparison import Comparison, Plan
if __name__ == "__main__":
    plan = replace(Plan.quick(), methods=["one residual, 20"], characters=1)
    for number, steps in enumerate((2, 2, 3)):
        outcome = Comparison(replace(plan, steps=steps), Path("work"), "cpu").run()
        Path(f"{number}.json").write_text(json.dumps(dict(outcome.figures)))
        print("----", file=__import__("sys").stderr, flush=True)
"""


def test_finished_rows_are_kept_and_those_with_other_settings_made_anew(tmp_path):
    script = tmp_path / "twice.py"  # a file, because processes that learn import it again
    script.write_text(TWICE)
    first, second, third, _ = run(script, folder=tmp_path).stderr.split("----")
    made = "engram, one residual, 20 steps, Zorbit Quell, seed 0"
    assert made in first
    assert "seed 0" not in second
    assert made in third
    assert "the base model, Zorbit" not in third
    assert json.loads((tmp_path / "0.json").read_text()) == json.loads((tmp_path / "1.json").read_text())
    assert (tmp_path / "work" / "sd15-zorbit-quell.png").exists()


def test_an_engram_draws_the_same_in_a_crowd():
    output = run(BENCHMARKS / "run.py", "accumulation", "--quick").stdout
    _, _, as_alone, identical, *_ = cells(output, "engrams, 5 in one file")[0]
    assert (as_alone, identical) == ("1.00", "1.00")
    for way in ("side by side", "linear", "TIES", "DARE"):
        assert len(cells(output, f"LoRA, 2 {way}")[0]) >= 5


def test_rates_are_tried_and_the_best_is_picked():
    output = run(BENCHMARKS / "run.py", "rates", "--quick").stdout
    rows = cells(output, "LoRA of the transformer, rank 4")
    assert [row[0] for row in rows] == ["0.0001", "0.0003"]
    assert sum("chosen" in row for row in rows) == 1


def test_methods_learn_at_the_rates_that_were_picked():
    used = run("-c", "import json; from ways_to_learn import RATES; print(json.dumps(RATES))").stdout
    measured = json.loads((BENCHMARKS / "results.json").read_text(encoding="utf-8"))
    assert json.loads(used) == measured["rates"]["figures"]["chosen"]


def test_strengths_are_tried_by_block_and_by_noise():
    output = run(BENCHMARKS / "run.py", "strengths", "--quick").stdout
    assert len(cells(output, "as learned")[0]) == 3
    assert len(cells(output, "0.75 while there is more noise")[0]) == 3


def test_committed_characters_are_those_that_the_script_draws(tmp_path):
    code = (
        "from pathlib import Path; import draw_characters; "
        f"draw_characters.FOLDER = Path({str(tmp_path)!r}); draw_characters.main()"
    )
    run("-c", code)
    made, kept = (
        {
            file.relative_to(folder): file.read_bytes()
            for file in folder.rglob("*")
            if file.suffix in (".json", ".jsonl")
        }
        for folder in (tmp_path, BENCHMARKS / "characters")
    )
    assert made == kept
    assert len(list(tmp_path.rglob("*.png"))) == len(list((BENCHMARKS / "characters").rglob("*.png"))) == 10
