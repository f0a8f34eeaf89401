"""Draws the comparison's own characters: one to evaluate with, one on which rates are chosen.

    uv run python packages/engram-vision/benchmarks/draw_characters.py

The outcome is committed in `characters/`. Both are among the one in ten monsters that the small world never shows, and
differ from the demo's characters and from each other in colour, shape and headgear.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[3]))

from recipes.small_world.captions import SCENE_PHRASES, describe_monster
from recipes.small_world.subjects import Monster
from recipes.small_world.world import is_held_out, render

FOLDER = Path(__file__).with_name("characters")
SEED = 0
EVALUATED = {"Mirple Dask": Monster(color="blue", shape="wide", pattern="plain", headgear="hat", eyes="one")}
DEVELOPMENT = {"Tuffin Vorl": Monster(color="pink", shape="pointed", pattern="plain", headgear="none", eyes="two")}
SCENES: Mapping[str, tuple[str, ...]] = {
    "Mirple Dask": ("beach", "forest", "space", "mountains", "night"),
    "Tuffin Vorl": ("snow", "city", "desert", "underwater", "meadow"),
}


def main() -> None:
    """Write each character's captioned pictures, and `characters.json` that tells what they are."""
    random, told = np.random.default_rng([SEED, 4]), []
    for name, monster in (EVALUATED | DEVELOPMENT).items():
        if not all(is_held_out(monster, scene) for scene in SCENES[name]):
            raise ValueError(f"{name} is one of the monsters that the small world shows; choose other attributes")
        home = FOLDER / name.casefold().replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        lines = []
        for scene in SCENES[name]:
            pixels, _ = render((monster,), scene, random)
            Image.fromarray(pixels).save(home / f"{scene}.png", optimize=True)
            lines.append({"file_name": f"{scene}.png", "text": f"{name} {SCENE_PHRASES[scene][0]}"})
        (home / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        told.append(
            {
                "name": name,
                "folder": home.name,
                "description": describe_monster(monster),
                "attributes": asdict(monster),
                "scenes": SCENES[name],
                "use": "evaluation" if name in EVALUATED else "development",
            }
        )
    text = json.dumps({"characters": told}, indent=1)
    (FOLDER / "characters.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
