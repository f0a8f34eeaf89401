"""The recipe of the published experiment holds the published values, and runs."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from engram_core import open_adapter
from engram_core.settings import Layer, resolve_settings
from engram_vision import SD15TrainSettings, train
from engram_vision.shipped import characters_folder

if sys.version_info < (3, 11):
    import tomli as tomllib
else:
    import tomllib

RECIPE = Path(__file__).parents[1] / "tinyengram-sd15.toml"
# AutoArk/TinyEngram, vision_tinyengram/run_train_vision.sh and train_vision_engram.py.
PUBLISHED = {
    "trigger": "Aldric Vortex-9 CyberNebula",
    "max_ngram": 7,
    "rule": "absolute-tanh",
    "activation": "spans",
    "resolution": 512,
    "batch_size": 4,
    "steps": 5000,
    "vector_rate": 1e-3,
    "scale_rate": 1e-4,
    "schedule": "linear",
    "warm_up": 500,
    "weight_decay": 1e-2,
    "max_grad_norm": 0,
}


@pytest.fixture
def values():
    table = tomllib.loads(RECIPE.read_text(encoding="utf-8"))["train"]
    assert table.pop("backbone") == "sd15"
    return table


def test_the_recipe_holds_the_published_values(values):
    settings = resolve_settings(SD15TrainSettings, [Layer(source="recipe", values=values)])
    assert {name: getattr(settings, name) for name in PUBLISHED} == PUBLISHED


def test_the_recipe_runs_on_the_tiny_checkpoint(values, tmp_path):
    data = tmp_path / "aldric_photos"
    (data / "preprocessed").mkdir(parents=True)
    captions = {}
    for number, path in enumerate(sorted(characters_folder().glob("zorbit-quell/*.png"))):
        name = f"aldric_{number}.png"
        Image.open(path).save(data / "preprocessed" / name)
        captions[name] = {"training_prompt": f"A photo of {PUBLISHED['trigger']} in scene {number}"}
    (data / "metadata.json").write_text(json.dumps(captions), encoding="utf-8")
    changed = {"model": "tiny", "data": data, "output": tmp_path / "aldric.safetensors", "resolution": 64, "steps": 3}
    layers = [Layer(source="recipe", values=values), Layer(source="test", values=changed)]
    report = train(resolve_settings(SD15TrainSettings, layers))
    (concept,) = open_adapter(report.output).concepts()
    assert (concept.record.trigger, concept.record.activation) == (PUBLISHED["trigger"], "spans")
    assert {len(entry) for entry in concept.streams["clip_l"].entries} >= set(range(2, 8))
