"""Training the judge that measures what the tiny models draw."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetConfig, ResNetForImageClassification

from engram_vision.demo.judge import Judge, to_inputs
from recipes.small_world.captions import SCENE_PHRASES
from recipes.small_world.subjects import ATTRIBUTES, EMOJI, Monster
from recipes.small_world.world import REGIONS, Box, Subject, World
from recipes.state import cosine

BATCH = 64
PEAK_RATE = 2e-3

GROUPS: Mapping[str, tuple[str, ...]] = {"kind": ("monster", *EMOJI), **ATTRIBUTES}
SCENES = tuple(SCENE_PHRASES)

Report = Callable[[str], None]


def build_classifier(outputs: int) -> ResNetForImageClassification:
    """Return an untrained classifier of 0.3 million parameters."""
    return ResNetForImageClassification(
        ResNetConfig(
            embedding_size=24,
            hidden_sizes=[24, 40, 64, 96],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            num_labels=outputs,
        )
    )


def train_judge(
    world: World,
    redrawn: np.ndarray,
    folder: Path,
    *,
    steps: int,
    seed: int,
    report: Report,
    regions: Mapping[str, Box] = REGIONS,
) -> Judge:
    """Train both classifiers and write them to a folder.

    Args:
        world: pictures of single subjects and pairs; none shows a demo character.
        redrawn: the same pictures, uint8 [N, 64, 64, 3], through the autoencoder and back: what a denoiser draws
            is never sharper than this, and the judge shall not take blur for another subject.
        folder: where to write.
        steps: of each classifier.
        seed: initial weights and batches.
        report: called with a line now and then.
        regions: where to look for a subject that is alone, left or right.
    """
    scene = _train(
        "scene",
        len(SCENES),
        lambda rng: _scene_batch(world, redrawn, rng),
        lambda logits, labels: torch.nn.functional.cross_entropy(logits, labels[:, 0]),
        steps,
        seed,
        report,
    )
    places = [(n, k) for n, subjects in enumerate(world.subjects) for k in range(len(subjects))]
    subject = _train(
        "subject",
        sum(map(len, GROUPS.values())),
        lambda rng: _subject_batch(world, redrawn, places, regions, rng),
        _grouped_loss,
        steps,
        seed,
        report,
    )
    for name, model in (("scene", scene), ("subject", subject)):
        model.half().save_pretrained(folder / name)
        model.float()
    config = {"groups": GROUPS, "scenes": SCENES, "regions": regions}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return Judge.load(folder)


def _train(
    what: str,
    outputs: int,
    batch: Callable[[np.random.Generator], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    steps: int,
    seed: int,
    report: Report,
) -> ResNetForImageClassification:
    torch.manual_seed(seed)
    model = build_classifier(outputs).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_RATE, weight_decay=1e-2)
    total = 0.0
    for step in range(steps):
        pixels, labels = batch(np.random.default_rng([seed, step]))
        optimizer.param_groups[0]["lr"] = cosine(step, steps, peak=PEAK_RATE, warm_up=50)
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(pixels).logits
        loss = loss_of(logits.float(), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        total += float(loss.detach())
        if (step + 1) % 200 == 0:
            report(f"judge of the {what} {step + 1}/{steps}: loss {total / 200:.4f}")
            total = 0.0
    return model.eval()


def _scene_batch(world: World, redrawn: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    rows = rng.integers(len(world.scenes), size=BATCH)
    images = [Image.fromarray((redrawn if rng.random() < 0.5 else world.images)[row]) for row in rows]
    labels = [[SCENES.index(world.scenes[row])] for row in rows]
    return _disturb(to_inputs(images), rng), torch.tensor(labels)


def _subject_batch(
    world: World,
    redrawn: np.ndarray,
    places: Sequence[tuple[int, int]],
    regions: Mapping[str, Box],
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    images, labels = [], []
    for place in rng.integers(len(places), size=BATCH):
        row, which = places[place]
        image = Image.fromarray((redrawn if rng.random() < 0.5 else world.images)[row])
        region = "alone" if len(world.subjects[row]) == 1 else ("left", "right")[which]
        images.append(image.crop(_shift(regions[region], rng)))
        labels.append(label(world.subjects[row][which]))
    return _disturb(to_inputs(images), rng), torch.tensor(labels)


def _shift(region: Box, rng: np.random.Generator) -> Box:
    x, y = (int(value) for value in rng.integers(-2, 3, size=2))
    left, top, right, bottom = region
    return left + x, top + y, right + x, bottom + y


def _disturb(pixels: Tensor, rng: np.random.Generator) -> Tensor:
    noise = torch.from_numpy(rng.normal(0, 0.05, pixels.shape).astype(np.float32))
    return pixels + noise * float(rng.random())


def label(subject: Subject) -> list[int]:
    """Return the index in every group, -1 where a subject has none."""
    if not isinstance(subject, Monster):
        return [GROUPS["kind"].index(subject)] + [-1] * len(ATTRIBUTES)
    return [0, *(values.index(getattr(subject, name)) for name, values in ATTRIBUTES.items())]


def _grouped_loss(logits: Tensor, labels: Tensor) -> Tensor:
    parts = torch.split(logits, [len(values) for values in GROUPS.values()], dim=1)
    losses = [
        torch.nn.functional.cross_entropy(part, labels[:, column], ignore_index=-1) for column, part in enumerate(parts)
    ]
    return torch.stack(losses).sum()
