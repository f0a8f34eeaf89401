"""`metrics.jsonl`: one line of figures for each logged step; a resumed run continues it without repeats."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engram_core import AdapterWriteError
from engram_core.container import open_target, write_all

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile:
    """Appends lines; each is written at once, so a killed run loses none that was logged.

    Attributes:
        loss: of the last line, if that has one, else NaN.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Keep the lines up to a step and drop later ones, which will come again.

        Args:
            path: the file.
            after_step: the last step that is done; 0 begins an empty file.

        Raises:
            AdapterWriteError: the file cannot be written.
        """
        kept = [line for line in read_metrics(path) if line["step"] <= after_step] if after_step else []
        with open_target(path, overwrite=True) as file:
            write_all(file, memoryview("".join(map(_line, kept)).encode()))
        self.loss = float(kept[-1].get("loss", math.nan)) if kept else math.nan
        self._path = path

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Append the figures of a step.

        Raises:
            AdapterWriteError: the file cannot be written.
        """
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line({"step": step, **figures}))
        except OSError as error:
            raise AdapterWriteError(f"{self._path}: cannot be written: {error.strerror}") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics file; a last line that was cut by a kill is left out, a missing file is empty."""
    lines: list[dict[str, Any]] = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                line = json.loads(text)
                lines.append({**line, "step": int(line["step"])})
            except (ValueError, TypeError, KeyError):
                break
    return lines


def _line(values: Mapping[str, Any]) -> str:
    return json.dumps(values) + "\n"
