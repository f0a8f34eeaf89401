"""The examples are tests: they run as they stand."""

import subprocess
import sys
from pathlib import Path


def test_two_concepts_runs_and_keeps_its_promises(tmp_path):
    script = Path(__file__).parents[1] / "two_concepts.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "merge without conflict" in done.stdout
    assert "0 of" in done.stdout
    assert "same object: True" in done.stdout
    assert done.stdout.count("the same, byte for byte") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "aldric.safetensors",
        "both.safetensors",
        "brindle.safetensors",
        "tokenizer.json",
    ]
