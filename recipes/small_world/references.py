"""The demo's reference pictures: five of each character, in five of the ten scenes."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from recipes.small_world.captions import SCENE_PHRASES, describe_monster
from recipes.small_world.world import CHARACTERS, render

REFERENCES = 5


def write_references(folder: Path, *, seed: int) -> None:
    """Write a captioned folder for each character, and `characters.json` that tells what they are.

    The first character is shown in every second scene from the first on, the second in the others, so that
    the scenes of one are held out for the other.
    """
    rng = np.random.default_rng([seed, 3])
    scenes = list(SCENE_PHRASES)
    characters = []
    for number, (name, monster) in enumerate(CHARACTERS.items()):
        home = folder / name.casefold().replace(" ", "-")
        home.mkdir(parents=True, exist_ok=True)
        shown = scenes[number % 2 :: 2][:REFERENCES]
        lines = []
        for scene in shown:
            picture, _ = render((monster,), scene, rng)
            Image.fromarray(picture).save(home / f"{scene}.png", optimize=True)
            lines.append({"file_name": f"{scene}.png", "text": f"{name} {SCENE_PHRASES[scene][0]}"})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (home / "metadata.jsonl").write_text(text, encoding="utf-8")
        characters.append(
            {
                "name": name,
                "folder": home.name,
                "description": describe_monster(monster),
                "attributes": asdict(monster),
                "scenes": shown,
            }
        )
    phrases = {scene: words[0] for scene, words in SCENE_PHRASES.items()}
    text = json.dumps({"characters": characters, "scenes": phrases}, indent=1)
    (folder / "characters.json").write_text(text + "\n", encoding="utf-8")
