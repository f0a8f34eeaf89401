"""The models that figures are measured with, loaded and tried before anything is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from engram_core import Watcher
from engram_vision.demo.judge import Judge
from engram_vision.evaluation.measures import Figure, measure_change, measure_consistency, measure_identity
from engram_vision.evaluation.settings import EvaluateSettings
from engram_vision.features import (
    FeatureModel,
    Features,
    ImageModel,
    JudgeModel,
    compare_features,
    load_feature_model,
    read_references,
)
from engram_vision.shipped import TINY

__all__ = ["Judges", "load_judges"]

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True, eq=False)
class Judges:
    """What measures pictures and clips.

    Attributes:
        image: the model for pictures; None where none was named.
        text: the model for texts and pictures, likewise; may be the same.
        references: features of the reference pictures, [M, d]; None where there are none.
        subject: what the reference pictures show, as the judge of the small world names it; None without it.
    """

    image: ImageModel | None = None
    text: FeatureModel | JudgeModel | None = None
    references: Features | None = None
    subject: dict[str, str] | None = None

    def to(self, device: torch.device) -> None:
        """Move the models to a device; the judge of the small world is small enough for the CPU."""
        for model in (self.image, self.text):
            if isinstance(model, FeatureModel):
                model.to(device)

    def measure(self, frames: Pixels, prompt: str | None) -> tuple[list[Figure], Features | None]:
        """Return the figures of a picture or clip, and how alike each frame is to the reference pictures, [F].

        Args:
            frames: uint8 [F, H, W, 3].
            prompt: what it shall show; None when unknown.
        """
        look = _Look(frames)
        figures: list[Figure] = []
        identity: Features | None = None
        if self.image is not None:
            name, features = self.image.name, look.embed(self.image)
            if self.references is not None:
                found, identity = measure_identity(name, features, self.references)
                figures += found
            if self.subject is not None and isinstance(self.image, JudgeModel):
                right = [named == self.subject for named in self.image.name_subjects(look.pictures)]
                figures.append(_share(name, "subject right", right))
            figures += measure_consistency(name, features)
        if prompt is not None and isinstance(self.text, FeatureModel):
            alike = compare_features(look.embed(self.text), self.text.embed_texts([prompt]))
            figures.append(
                Figure(subject=self.text.name, metric="adherence", value=float(alike.mean()), higher_is_better=True)
            )
        if prompt is not None and isinstance(self.text, JudgeModel):
            scene = self.text.find_scene(prompt)
            if scene is not None:
                right = [named == scene for named in self.text.name_scenes(look.pictures)]
                figures.append(_share(self.text.name, "scene right", right))
        return figures, identity

    def compare(self, before: Pixels, after: Pixels) -> list[Figure]:
        """Return how far a picture or clip moved from another of the same prompt, uint8 [F, H, W, 3] each."""
        features = None
        if self.image is not None:
            features = (_Look(before).embed(self.image), _Look(after).embed(self.image))
        return measure_change(before, after, features)

    def list_notes(self, prompts: Sequence[str]) -> list[str]:
        """Return what to tell about prompts: those that the model for texts does not read, or not to the end."""
        if isinstance(self.text, FeatureModel):
            return self.text.find_cut(prompts)
        if isinstance(self.text, JudgeModel):
            unknown = [prompt for prompt in dict.fromkeys(prompts) if self.text.find_scene(prompt) is None]
            return [
                f"{prompt!r} names no scene of the small world, or several; it is not measured" for prompt in unknown
            ]
        return []


class _Look:
    """The frames of one clip as pictures, each model's features of them computed once."""

    def __init__(self, frames: Pixels) -> None:
        self._frames = frames
        self._features: dict[int, Features] = {}

    @cached_property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(np.ascontiguousarray(frame)) for frame in self._frames]

    def embed(self, model: ImageModel) -> Features:
        if id(model) not in self._features:
            self._features[id(model)] = model.embed(self.pictures)
        return self._features[id(model)]


def load_judges(settings: EvaluateSettings, judge_folder: Callable[[], Path], watcher: Watcher) -> Judges:
    """Load what the settings name, on the CPU, and look at the reference pictures.

    Args:
        settings: which models and pictures.
        judge_folder: returns where the judge is that `tiny` names.
        watcher: hears what is not measured.

    Raises:
        InputError: a model or a picture cannot be used.
    """
    references = None if settings.references is None else read_references(settings.references)
    small = JudgeModel(Judge.load(judge_folder())) if TINY in (settings.image_model, settings.text_model) else None
    text: Any = _load(settings.text_model, small, texts=True)
    shares = settings.image_model is not None and settings.image_model == settings.text_model
    image: Any = text if shares else _load(settings.image_model, small, texts=False)
    features = subject = None
    if references and image is not None:
        features = image.embed(references)
        if isinstance(image, JudgeModel):
            subject = image.find_subject(references)
            if subject is None:
                watcher.note(f"{settings.references}: the pictures do not show one subject, so none can be right")
    if image is not None and references is None:
        watcher.note("identity is not measured: there are no reference pictures (--references)")
    return Judges(image=image, text=text, references=features, subject=subject)


def _load(model: str | None, small: JudgeModel | None, *, texts: bool) -> FeatureModel | JudgeModel | None:
    if model is None:
        return None
    return small if model == TINY else load_feature_model(model, texts=texts)


def _share(subject: str, metric: str, flags: Sequence[bool]) -> Figure:
    return Figure(subject=subject, metric=metric, value=sum(flags) / len(flags), higher_is_better=True)
