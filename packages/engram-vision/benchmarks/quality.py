"""Identity of the demo's characters in new scenes, by rule, start and number of steps: what the settings are worth.

    uv run python packages/engram-vision/benchmarks/quality.py

Prints a table; each figure is the mean over characters and seeds, with the lowest and the highest.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engram_core.settings import Layer, resolve_settings
from engram_vision import SD15TrainSettings, load_engram, train, unload_engrams
from engram_vision.demo.characters import DemoCharacter, read_characters
from engram_vision.demo.judge import Judge
from engram_vision.drawing import Drawing, draw
from engram_vision.models import load_pipeline
from engram_vision.sd15 import SD15
from engram_vision.shipped import TINY, judge_folder

# By character, so that a description can be given; the words are not the character's own.
WORDS = {"Zorbit Quell": "a purple monster", "Fenny Wumble": "a green monster"}
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "absolute, 300 steps (the default)": {},
    "absolute-tanh, 300 steps": {"rule": "absolute-tanh"},
    "relative, 300 steps": {"rule": "relative", "vector_rate": 0.02, "scale_rate": 0.03},
    "absolute, 100 steps": {"steps": 100},
    "absolute, 20 steps": {"steps": 20, "validate_every": 10},
    "absolute, 20 steps, begun as words": {"steps": 20, "validate_every": 10, "init": WORDS},
    "absolute, 300 steps, without mirror images": {"flip": False, "batch_size": 5},
    "absolute, 300 steps, published rates": {"vector_rate": 1e-3, "scale_rate": 1e-4},
}
PICTURES = 3  # of each new scene


def main() -> None:
    """Measure the variants and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="parts of the names of those to measure")
    options = parser.parse_args()
    chosen = [name for name in VARIANTS if not options.variants or any(part in name for part in options.variants)]
    characters, phrases = read_characters()
    judge, pipeline = Judge.load(judge_folder()), load_pipeline(SD15.family, TINY)
    print("| settings | identity in new scenes | scene obeyed |\n| --- | --- | --- |")
    for name in chosen:
        results = [
            measure(pipeline, judge, character, phrases, VARIANTS[name], seed)
            for character in characters
            for seed in options.seeds
        ]
        print(f"| {name} | {spread([a for a, _ in results])} | {spread([b for _, b in results])} |", flush=True)
    print(f"\n{torch.get_num_threads()} threads, seeds {options.seeds}, Python {sys.version.split()[0]}")


def measure(
    pipeline: Any,
    judge: Judge,
    character: DemoCharacter,
    phrases: Mapping[str, str],
    changes: Mapping[str, Any],
    seed: int,
) -> tuple[float, float]:
    """Return the shares of pictures of new scenes that show the character, and the scene."""
    scenes = [scene for scene in phrases if scene not in character.shown for _ in range(PICTURES)]
    drawings = [
        Drawing(prompt=f"{character.name} {phrases[scene]}", seed=100 * seed + number)
        for number, scene in enumerate(scenes)
    ]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "character.safetensors"
        values: dict[str, Any] = {"model": TINY, "data": character.folder, "trigger": character.name}
        values |= {"output": output, "seed": seed, **changes}
        if isinstance(values.get("init"), dict):
            values["init"] = values["init"][character.name]
        layers = [Layer(source="tiny", values=SD15.default_train_settings(TINY)), Layer(source="here", values=values)]
        train(resolve_settings(SD15TrainSettings, layers))
        load_engram(pipeline, output)
        images = draw(pipeline, drawings, steps=20, guidance=4.0, batch_size=5)
        unload_engrams(pipeline)
    subjects, places = judge.name_subjects(images), judge.name_scenes(images)
    right = sum(map(character.is_seen, subjects))
    obeyed = sum(place == scene for place, scene in zip(places, scenes, strict=True))
    return right / len(images), obeyed / len(images)


def spread(values: list[float]) -> str:
    """Return mean, lowest and highest."""
    return f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
