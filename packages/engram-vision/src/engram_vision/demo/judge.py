"""The judge of the small world: tells the subject and the scene of a picture of 64 x 64 pixels.

Two small classifiers, trained by `recipes/small_world` on drawn pictures, none of which shows a demo character.
A monster is named by its attributes; it counts as a character only when every one of them is right.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import ResNetForImageClassification

from engram_core import InputError
from engram_vision.quiet import quiet_libraries

__all__ = ["Judge", "to_inputs"]

SIDE = 64
Region = tuple[int, int, int, int]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Judge:
    """Both classifiers and what their outputs mean.

    Attributes:
        subject: model over cut-out subjects.
        scene: model over whole pictures.
        groups: for each thing the subject model tells (kind, color, ...), its values in order of the outputs.
        scenes: the scenes in order of the outputs.
        regions: where subjects stand: `alone`, `left`, `right`, in pixels (left, top, right, bottom).
    """

    subject: ResNetForImageClassification
    scene: ResNetForImageClassification
    groups: Mapping[str, Sequence[str]]
    scenes: Sequence[str]
    regions: Mapping[str, Region]

    @classmethod
    def load(cls, folder: Path) -> Judge:
        """Load a judge from the folder that the recipe wrote.

        Raises:
            InputError: the folder is not a judge.
        """
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            return cls(
                subject=_load(folder / "subject"),
                scene=_load(folder / "scene"),
                groups=config["groups"],
                scenes=config["scenes"],
                regions={name: tuple(region) for name, region in config["regions"].items()},
            )
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{folder}: is not a judge: {type(error).__name__}: {error}") from None

    @torch.no_grad()
    def name_scenes(self, images: Sequence[Image.Image]) -> list[str]:
        """Return the scene of each picture."""
        best = self.scene(to_inputs(images)).logits.argmax(-1)
        return [self.scenes[index] for index in best.tolist()]

    @torch.no_grad()
    def name_subjects(self, images: Sequence[Image.Image], region: str = "alone") -> list[dict[str, str]]:
        """Return what stands in a region of each picture: `kind`, and for monsters every attribute."""
        box = self.regions[region]
        logits = self.subject(to_inputs([image.crop(box) for image in images])).logits
        names: list[dict[str, str]] = [{} for _ in images]
        first = 0
        for group, values in self.groups.items():
            best = logits[:, first : first + len(values)].argmax(-1).tolist()
            first += len(values)
            for name, index in zip(names, best, strict=True):
                if group == "kind" or name["kind"] == "monster":
                    name[group] = values[index]
        return names


def _load(folder: Path) -> ResNetForImageClassification:
    with quiet_libraries():
        model = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32)
    model.requires_grad_(False).train(False)
    return model


def to_inputs(images: Sequence[Image.Image]) -> Tensor:
    """Return pictures as the classifiers read them, float32 [N, 3, 64, 64] in -1..1."""
    resized = [image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2) / 127.5 - 1
