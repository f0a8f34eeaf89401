"""`metrics.jsonl`: one line of figures for each logged step; a resumed run continues it without repeats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_core.container import open_target, write_all

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile:
    """Appends lines; each is written at once, so a killed run loses none that was logged."""

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Keep the lines up to a step and drop later ones, which will come again.

        Args:
            path: the file.
            after_step: the last step that is done; 0 begins an empty file.
        """
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if after_step else []
        with open_target(path, overwrite=True) as file:
            write_all(file, memoryview("".join(map(_line, kept)).encode()))
        self._path = path

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append the figures of a step."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(_line({"step": step, **figures}))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that was cut by a kill is left out, a missing file is empty."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
