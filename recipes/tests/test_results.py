"""The page of results follows from the kept figures alone: losses are told, plots are drawn, nothing is made up."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from recipes.results.__main__ import fill
from recipes.results.blocks import BLOCKS, Sources
from recipes.results.figures import NOT_YET, Comparison, Spread

MACHINE = {"cores": "2", "machine": "x86_64 Linux", "python": "3.11.7", "torch": "2.15.0"}
BASE, OURS, LORA = "the base model", "engram, one residual, 300 steps", "LoRA of the U-Net, rank 4"
BLOCKS_METHOD = "engram, a residual for each block, 300 steps"


def row(method, seed, identity, distance=0.0, **costs):
    counts = {"new scenes: identity": f"{identity} of 10", "other subjects: distance": f"{distance} of 10"}
    return {"method": method, "character": "Zorbit Quell", "seed": seed, "counts": counts, "costs": costs}


@pytest.fixture
def sources(tmp_path):
    costs = {"size": 10_000.0, "seconds": 3.0, "peak": 2.0**30, "values": 100.0, "load_seconds": 0.01}
    rows = [
        *(row(BASE, seed, 0) for seed in (0, 1)),
        *(row(OURS, seed, 8 + seed, **costs) for seed in (0, 1)),
        *(row(BLOCKS_METHOD, seed, 7, **costs) for seed in (0, 1)),
        *(row(LORA, seed, 9 + seed, distance=2, **costs | {"size": 1e5, "seconds": 2.0}) for seed in (0, 1)),
    ]
    crowd = [row(f"engrams, {count} in one file", 0, 9) for count in ("1", "10", "1,000")]
    crowd += [row("LoRA, 1", 0, 9), row("LoRA, 10 side by side", 0, 1), row("LoRA, 10 TIES", 0, 2)]
    ratio = {"median": 1.01}
    size = {"concepts": 1, "entries": 8, "size": 900, "open_seconds": 0.001, "load_seconds": 0.002, "memory": 0}
    size |= {"quiet": ratio, "firing": ratio, "alone": [5, 5], "base": [10, 10], "fired": [1, 1]}
    short = [row(name, 0, 5, size=900.0) for name in (OURS, "LoRA of the transformer, rank 4")]
    tried = [row(name, seed, 5) for name in ("as learned", "0.75 everywhere") for seed in (0, 1)]
    clips = {"identity": [0.5, 0.7], "identity_drop": [0.0, 0.1], "scene": [1.0], "motion": [1.0, 0.8]}
    clips |= {"identical": [8, 8], "controls": [8, 8], "difference": [0.0, 0.0]}
    clips = {
        "quality": {
            "machine": MACHINE,
            "figures": {"seeds": [0, 1], "engram": clips, LORA: clips | {"identity": [0.8, 0.6]}},
        }
    }
    (tmp_path / "clips.json").write_text(json.dumps(clips), encoding="utf-8")
    results = {
        "comparison_sd35": {"machine": MACHINE, "figures": {"seeds": [0], "rows": short}},
        "strengths": {"machine": MACHINE, "figures": {"seeds": [0, 1], "rows": tried}},
        "concepts": {
            "machine": MACHINE,
            "figures": {"concepts": 4, "seconds": {"batch of 1": {"1": [8.0], "4": [4.0]}}},
        },
        "comparison": {"machine": MACHINE, "figures": {"seeds": [0, 1], "rows": rows}},
        "accumulation": {"machine": MACHINE, "figures": {"seeds": [0], "rows": crowd}},
        "scale": {"machine": MACHINE, "figures": {"sizes": [size, {**size, "concepts": 5, "entries": 100}]}},
    }
    (tmp_path / "results.json").write_text(json.dumps(results), encoding="utf-8")
    (tmp_path / "plots").mkdir()
    folder = tmp_path / "grids" / "comparison" / "0123"
    folder.mkdir(parents=True)
    for backbone in ("sd15", "sd35", "wan22"):
        Image.new("RGB", (64, 64)).save(folder / f"{backbone}-zorbit-quell.png")
    files = {"vision": tmp_path / "results.json", "video": tmp_path / "clips.json"}
    return Sources(**files, grids=tmp_path / "grids", plots=tmp_path / "plots")


def test_shares_are_added_up_by_seed(sources):
    found = sources.comparison("comparison")
    assert found.share(OURS, "new scenes: identity") == Spread(seeds=(0.8, 0.9))
    assert found.share(OURS, "new scenes: identity", "other subjects: distance") == Spread(seeds=(0.4, 0.45))
    assert found.share(OURS, "no such count") is None
    assert found.cost(BASE, "size") is None


def test_where_others_do_better_is_told(sources):
    told = BLOCKS["losses"](sources)
    assert f"**identity in new scenes**: {LORA} has 0.95 (0.90 to 1.00), the engram 0.70." in told
    assert f"**seconds of training**: {LORA} has 2 s, the engram 3 s." in told
    assert "distance" not in told  # less is better there
    assert "size" not in told


def test_where_a_lora_of_clips_does_better_is_told(sources):
    lost = f"- **identity in clips**: *{LORA}* has 0.70 (0.60 to 0.80), *engram* 0.60 (0.50 to 0.70)"
    assert BLOCKS["clip_losses"](sources) == f"{lost}; the seeds of both overlap."


def test_the_goal_is_held_against_the_best_lora(sources):
    told = BLOCKS["goal"](sources)
    assert f"**{BLOCKS_METHOD}**: identity in new scenes 0.70, 10.0 kB" in told
    assert f"**{LORA}**: identity in new scenes 0.95 (0.90 to 1.00), 100.0 kB" in told
    assert told.endswith("The engram's mean is 0.25 below LoRA's, at 0.10 of its size.")


def test_concepts_an_hour_follow_from_the_seconds(sources):
    assert "| 1 | 4 | 3600 |" in BLOCKS["pace"](sources)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_made_of_figures_and_says_when_there_are_none(sources, name, tmp_path):
    none = Sources(vision=tmp_path / "x", video=tmp_path / "y", grids=tmp_path / "z", plots=tmp_path)
    assert BLOCKS[name](none) == NOT_YET
    text = BLOCKS[name](sources)
    assert text != NOT_YET
    for plot in (part.split(")")[0] for part in text.split("](plots/")[1:]):
        assert (sources.plots / plot).read_bytes().startswith((b"<?xml", b"RIFF"))


def test_the_same_figures_give_the_same_plots(sources):
    BLOCKS["identity"](sources)
    first = (sources.plots / "identity.svg").read_bytes()
    BLOCKS["identity"](sources)
    assert (sources.plots / "identity.svg").read_bytes() == first


def test_marks_are_filled_again_and_again(sources):
    page = "# Results\n\n<!-- results: losses -->\nold\n<!-- end of results -->\n\nProse.\n"
    filled = fill(page, sources)
    assert "old" not in filled
    assert LORA in filled
    assert fill(filled, sources) == filled
    with pytest.raises(KeyError, match="nothing"):
        fill(page.replace("losses", "nothing"), sources)


def test_spreads_overlap_where_seeds_lie_among_one_another():
    assert Spread(seeds=(0.1, 0.5)).overlaps(Spread(seeds=(0.4, 0.9)))
    assert not Spread(seeds=(0.1, 0.3)).overlaps(Spread(seeds=(0.4, 0.9)))
    assert Comparison({"figures": {"rows": []}}).methods == []
