"""Make everything that ships as `--model tiny`: `uv run python -m recipes.small_world [sd15] [sd35] [wan22]`.

Each stage keeps its state in the work folder, so that the command goes on where it was stopped. `sd35` takes
autoencoder, tokenizer and first text encoder from the finished `sd15`; `wan22` needs neither.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from engram_vision.demo.judge import Judge
from engram_vision.families import FAMILIES
from engram_vision.models import load_pipeline
from recipes.small_world.checkpoint15 import make_judge, make_sd15
from recipes.small_world.checkpoint22 import make_clip_judge, make_wan22
from recipes.small_world.checkpoint35 import make_sd35
from recipes.small_world.clip_evaluation import evaluate_clips
from recipes.small_world.evaluate import evaluate_drawn, evaluate_judge
from recipes.small_world.references import write_references
from recipes.small_world.video_transformer import STILLS
from recipes.small_world.world import draw_world

ROOT = Path(__file__).parents[2]
TARGET = ROOT / "packages/engram-vision/src/engram_vision/tiny"
VIDEO_TARGET = ROOT / "packages/engram-video/src/engram_video/tiny"
PICTURES, CLIPS = ("sd15", "sd35"), ("wan22",)


def report(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)  # noqa: T201 - a script for people at a terminal


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages that are not done yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "checkpoints", nargs="*", choices=PICTURES + CLIPS, default=PICTURES + CLIPS, help="what to make"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build/small_world", help="folder for states and previews")
    parser.add_argument("--out", type=Path, default=TARGET, help="folder that ships with engram-vision")
    parser.add_argument("--video-out", type=Path, default=VIDEO_TARGET, help="folder that ships with engram-video")
    parser.add_argument("--pictures", type=int, default=48_000)
    parser.add_argument("--autoencoder-steps", type=int, default=6_000)
    parser.add_argument("--denoiser-steps", type=int, default=6_400)
    parser.add_argument("--transformer-steps", type=int, default=3_000)
    parser.add_argument("--judge-steps", type=int, default=1_000)
    parser.add_argument("--clips", type=int, default=6_000, help="of 9 frames")
    parser.add_argument("--video-autoencoder-steps", type=int, default=10_000)
    parser.add_argument("--video-transformer-steps", type=int, default=30_000)
    parser.add_argument("--video-stills", type=float, default=STILLS, help="share of these steps: single frames, first")
    parser.add_argument("--compile", action="store_true", help="stills of clips learn faster; needs a C++ compiler")
    parser.add_argument("--learn-on", action="store_true", help="begin with the clip checkpoint that --video-out holds")
    parser.add_argument("--clip-judge-steps", type=int, default=4_500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    if set(PICTURES) & set(options.checkpoints):
        make_pictures(options)
    if set(CLIPS) & set(options.checkpoints):
        make_clips(options)


def make_pictures(options: argparse.Namespace) -> None:
    """Make the checkpoints that draw pictures, and their judge."""
    work, out, seed = options.work, options.out, options.seed
    report(f"drawing {options.pictures} pictures")
    world = draw_world(seed, options.pictures)
    if "sd15" in options.checkpoints:
        steps = {"autoencoder_steps": options.autoencoder_steps, "denoiser_steps": options.denoiser_steps}
        make_sd15(world, work, out, **steps, seed=seed, report=report)
        write_references(out / "characters", seed=seed)
        make_judge(work, out, steps=options.judge_steps, seed=seed, report=report)
    if "sd35" in options.checkpoints:
        make_sd35(world, work, out, steps=options.transformer_steps, seed=seed, report=report)
    del world

    judge = Judge.load(out / "judge")
    figures = {"judge": evaluate_judge(judge, seed=seed)}
    for name in PICTURES:
        if (out / name).is_dir():
            pipeline = load_pipeline(FAMILIES[name], str(out / name))
            figures[name] = evaluate_drawn(pipeline, judge, seed=seed)
    write_figures(figures, out)


def make_clips(options: argparse.Namespace) -> None:
    """Make the checkpoint that films clips, and its judge."""
    work, out, seed = options.work, options.video_out, options.seed
    make_wan22(
        work,
        out,
        clips=options.clips,
        autoencoder_steps=options.video_autoencoder_steps,
        transformer_steps=options.video_transformer_steps,
        seed=seed,
        report=report,
        stills=options.video_stills,
        compiled=options.compile,
        learn_on=options.learn_on,
    )
    make_clip_judge(work, out, steps=options.clip_judge_steps, seed=seed, report=report)
    write_figures(evaluate_clips(out, work, seed=seed), out)


def write_figures(figures: Mapping[str, Any], out: Path) -> None:
    """Write and report what was measured."""
    text = json.dumps(figures, indent=1)
    (out / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    report(text)


if __name__ == "__main__":
    main()
