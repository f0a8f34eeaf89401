"""Measure engram-video: `python packages/engram-video/benchmarks/run.py [NAME ...] [--quick] [--write]`.

Every comparison is made side by side in one run, its cases in turn. `--write` keeps the outcome in `results.json`
and puts the tables into `docs/benchmarks.md`. `ENGRAM_VIDEO_TINY` names a folder to measure instead of the tiny
checkpoint that ships: a pipeline `wan22`, a judge of frames `judge`, and a judge of motions `judge/motion`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The measuring code is engram-core's, and scripts rather than a package.
sys.path.append(str(Path(__file__).resolve().parents[2] / "engram-core" / "benchmarks"))

from report import main

# Names are also those of the marks in the documentation, where `training` is that of pictures.
NAMES = ("quality", "clip_training")
RESULTS = Path(__file__).with_name("results.json")
LIBRARIES = ("numpy", "torch", "diffusers", "transformers", "peft", "av")

if __name__ == "__main__":
    sys.exit(main("engram-video", NAMES, RESULTS, libraries=LIBRARIES, devices=("cpu", "cuda")))
