"""A run's metrics: one line a step, continued without repeats, whole whatever happens."""

import json
import math
from pathlib import Path

import pytest

from engram_core import AdapterWriteError
from engram_core.training.metrics import MetricsFile, read_metrics


def test_metrics_are_continued_without_repeats(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, after_step=0)
    assert math.isnan(metrics.loss)
    for step in (2, 4, 6):
        metrics.write(step, {"loss": step / 2})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 8, "lo')  # a kill
    assert [line["step"] for line in read_metrics(path)] == [2, 4, 6]
    metrics = MetricsFile(path, after_step=4)
    assert metrics.loss == 2
    metrics.write(5, {"loss": 0.5, "rate": 1.0})
    assert read_metrics(path)[-1] == {"step": 5, "loss": 0.5, "rate": 1.0}
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [2, 4, 5]
    MetricsFile(path, after_step=0)
    assert path.read_bytes() == b""


@pytest.mark.parametrize("line", ["[]", "{}", "1", '{"step": "x"}', "nonsense"])
def test_lines_of_others_end_the_metrics(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n', encoding="utf-8")
    assert read_metrics(path) == [{"step": 1}]
    assert read_metrics(tmp_path / "none") == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_in_one_line(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics.jsonl", after_step=0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(AdapterWriteError, match=r"metrics.jsonl: cannot be written: No space left on device"):
        metrics.write(1, {"loss": 1.0})
