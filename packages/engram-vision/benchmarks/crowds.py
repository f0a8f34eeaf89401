"""Many adapters at once: engrams merged into one file, and LoRAs merged into one by PEFT.

The others beside the evaluated characters are made up: for engrams vectors drawn like trained ones under invented
names, for LoRA random monsters learned for a short while.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from lessons import open_model
from PIL import Image
from ways_to_learn import Method

from engram_core import Adapter, build_registry, open_adapter
from engram_core.concept import Concept, ConceptStream
from engram_core.errors import TriggerError
from engram_vision.demo.characters import DemoCharacter
from engram_vision.loading import pipeline_tokenizers
from engram_vision.quiet import quiet_libraries

sys.path.append(str(Path(__file__).resolve().parents[3]))

from recipes.small_world.captions import SCENE_PHRASES, describe_monster, invent_name
from recipes.small_world.subjects import random_monster
from recipes.small_world.world import render


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """One way in which PEFT merges LoRAs.

    Attributes:
        options: of `add_weighted_adapter`.
        averages: whether the weights are 1 / n each, instead of 1.
    """

    options: Mapping[str, Any]
    averages: bool = False


WAYS: Mapping[str, Way] = {
    "side by side": Way(options={"combination_type": "cat"}),  # the exact sum of all
    "linear": Way(options={"combination_type": "linear"}),
    "linear, averaged": Way(options={"combination_type": "linear"}, averages=True),
    "TIES": Way(options={"combination_type": "ties", "density": 0.5}),
    "DARE": Way(options={"combination_type": "dare_linear", "density": 0.5}),
}
PICTURES = 5  # of an invented monster
MERGED = "merged"
Values = npt.NDArray[np.float32]


def gather_crowd(files: Sequence[Path], count: int, tokenizer: Any, seed: int) -> list[Adapter]:
    """Return trained adapters, and one of invented concepts, that have so many concepts in all.

    Args:
        files: adapters of one concept each.
        count: concepts in all, at least as many as files.
        tokenizer: of the stream, as registries know it.
        seed: of names and vectors.
    """
    trained = [open_adapter(file) for file in files]
    n_others = count - len(trained)
    if n_others < 0:
        raise ValueError(f"{count} concepts were asked for and {len(files)} are trained; ask for more")
    if not n_others:
        return trained
    concepts = [adapter.concept(name) for adapter in trained for name in adapter.names()]
    others = invent_concepts(concepts, n_others, tokenizer, seed)
    return [*trained, Adapter.build(trained[0].manifest, others)]


def invent_concepts(like: Sequence[Concept], count: int, tokenizer: Any, seed: int) -> list[Concept]:
    """Return concepts under invented names, with values of the mean and spread that trained ones have by channel."""
    random = np.random.default_rng([seed, 5])
    (stream,) = like[0].streams
    taken = {ids for concept in like for ids in concept.streams[stream].triggers}
    vectors = [np.asarray(concept.streams[stream].vectors, np.float32) for concept in like]
    scales = np.stack([np.asarray(concept.streams[stream].scales, np.float32) for concept in like])
    found: dict[str, Concept] = {}
    while len(found) < count:
        name = invent_name(random)
        try:
            registry = build_registry(name, tokenizer)
        except TriggerError:  # a single token, which would be an ordinary word
            continue
        ids = {variant.ids for variant in registry.variants}
        if name in found or ids & taken:
            continue
        taken |= ids
        slots = draw_like(np.concatenate(vectors), registry.n_slots, random)
        memory = ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=slots[list(registry.slots)],
            scales=draw_like(scales, 1, random)[0],
        )
        record = replace(like[0].record, name=name, trigger=name, training={"steps": 0})
        found[name] = Concept(record=record, streams={stream: memory})
    return list(found.values())


def tiny_tokenizer(device: str) -> Any:
    """Return the base model's tokenizer as registries know it."""
    (tokenizer,) = pipeline_tokenizers(open_model(device)).values()
    return tokenizer


def invent_characters(folder: Path, count: int, *, seed: int) -> list[DemoCharacter]:
    """Draw five captioned pictures of each of some random monsters, as reference pictures of characters are drawn."""
    random = np.random.default_rng([seed, 6])
    scenes, found = list(SCENE_PHRASES), list[DemoCharacter]()
    for number in range(count):
        monster = random_monster(random)
        name = f"{invent_name(random).split()[0]} {invent_name(random).split()[0]}"
        home = folder / f"{number}-{name.replace(' ', '-')}"
        home.mkdir(parents=True, exist_ok=True)
        shown = tuple(scenes[at] for at in sorted(random.choice(len(scenes), PICTURES, replace=False)))
        lines = []
        for scene in shown:
            pixels, _ = render((monster,), scene, random)
            Image.fromarray(pixels).save(home / f"{scene}.png")
            lines.append({"file_name": f"{scene}.png", "text": f"{name} {SCENE_PHRASES[scene][0]}"})
        (home / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        description, attributes = describe_monster(monster), asdict(monster)
        found.append(DemoCharacter(name=name, folder=home, description=description, attributes=attributes, shown=shown))
    return found


def merge_loras(
    method: Method, learned: Sequence[tuple[str, Path]], way: str, *, device: str, seed: int
) -> tuple[Any, dict[str, float]]:
    """Return a pipeline whose U-Net has several LoRAs merged into one by PEFT, and how long merging took.

    Args:
        method: how they were learned.
        learned: trigger and place of each; a single one is used as it is.
        way: a key of `WAYS`.
        device: where to draw.
        seed: of what DARE drops.
    """
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    states, configs = [], []
    for trigger, output in learned:
        pipeline = open_model(device)
        method.load(pipeline, trigger, output)
        ((name, config),) = pipeline.unet.peft_config.items()
        states.append(get_peft_model_state_dict(pipeline.unet, adapter_name=name, save_embedding_layers=False))
        configs.append(config)
    if len(learned) == 1:
        return pipeline, {}
    pipeline = open_model(device)
    names = [f"adapter_{number}" for number in range(len(learned))]
    with quiet_libraries():
        model = get_peft_model(pipeline.unet, configs[0], adapter_name=names[0])
        for name, config in zip(names[1:], configs[1:], strict=True):
            model.add_adapter(name, config)
        for name, state in zip(names, states, strict=True):
            values = {f"base_model.model.{key}": value for key, value in state.items()}
            if set_peft_model_state_dict(model, values, adapter_name=name).unexpected_keys:
                raise RuntimeError(f"{name}: PEFT does not know its values")
        torch.manual_seed(seed)
        weights = [1 / len(names) if WAYS[way].averages else 1.0] * len(names)
        started = monotonic()
        model.base_model.add_weighted_adapter(names, weights, MERGED, **WAYS[way].options)
        seconds = monotonic() - started
        model.set_adapter(MERGED)
    pipeline.unet = model.get_base_model()
    merged = (value for name, value in pipeline.unet.named_parameters() if f".{MERGED}." in name)
    return pipeline, {"merge_seconds": seconds, "size": sum(value.nbytes for value in merged)}


def draw_like(values: Values, count: int, random: np.random.Generator) -> Values:
    """Return rows, float32 [count, d], with the mean and spread that rows [M, d] have in each channel."""
    spread = random.standard_normal((count, values.shape[1])) * values.std(axis=0)
    drawn: Values = (values.mean(axis=0) + spread).astype(np.float32)
    return drawn
