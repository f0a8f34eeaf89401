"""Features of pictures and texts, and how alike they are: what evaluations of pictures and of clips share.

Shapes: N pictures or texts, M reference pictures, d channels of features; features float32 [N, d], rows of length 1.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from engram_core import InputError
from engram_core.errors import one_line
from engram_vision.dataset import contains_trigger
from engram_vision.demo.characters import read_characters
from engram_vision.demo.judge import SIDE, Judge, to_inputs
from engram_vision.images import SUFFIXES, load_picture, show_path
from engram_vision.quiet import quiet_libraries

__all__ = [
    "FeatureModel",
    "Features",
    "ImageModel",
    "JudgeModel",
    "compare_features",
    "load_feature_model",
    "read_references",
]

Features: TypeAlias = npt.NDArray[np.float32]

_AT_ONCE = 16  # pictures
_LONGEST_TEXT = 512  # tokens, of models that name no limit
_SUITABLE = "such as a CLIP, SigLIP, DINOv2 or ViT model"
_SUITABLE_FOR_TEXTS = "such as a CLIP or SigLIP model"
# Beside its name and the phrase in which captions name it; how the recipe's captions say it.
_MORE_WORDS: Mapping[str, Sequence[str]] = {"underwater": ("under the sea",)}


class ImageModel(Protocol):
    """What turns pictures into features.

    Attributes:
        name: as the user calls it.
    """

    name: str

    def embed(self, pictures: Sequence[Image.Image]) -> Features:
        """Return the features of each picture, [N, d]."""


class FeatureModel:
    """A model of transformers for pictures, and where it was trained on both, for texts; see `load_feature_model`."""

    def __init__(self, name: str, model: Any, processor: Any, tokenizer: Any = None, *, pools: bool = True) -> None:
        """Take the parts.

        Args:
            name: as the user calls it.
            model: the frozen model.
            processor: makes its pixels.
            tokenizer: makes its token ids; None where it is to read no texts.
            pools: whether its pooling layer was trained; what an untrained one gives is noise.
        """
        self.name = name
        self._model, self._processor, self._tokenizer, self._pools = model, processor, tokenizer, pools

    def to(self, device: torch.device) -> None:
        """Move the model to a device."""
        self._model.to(device)

    def embed(self, pictures: Sequence[Image.Image]) -> Features:
        """Return the features of each picture, [N, d].

        Raises:
            InputError: the model cannot use the pictures, or gives no features.
        """
        batches = (pictures[first : first + _AT_ONCE] for first in range(0, len(pictures), _AT_ONCE))
        return np.concatenate([self._run("pictures", self._embed_pictures, batch) for batch in batches])

    def embed_texts(self, texts: Sequence[str]) -> Features:
        """Return the features of each text, [N, d], to be compared with those of pictures.

        Texts are cut where the model stops reading, see `find_cut`.

        Raises:
            InputError: the model was not loaded for texts, or gives no features.
        """
        return self._run("texts", self._embed_texts, texts)

    def find_cut(self, texts: Iterable[str]) -> list[str]:
        """Return a sentence for each text that is longer than the model reads."""
        sentences = []
        for text in dict.fromkeys(texts):
            with quiet_libraries():
                count = len(self._tokenizer(text)["input_ids"])
            if count > self._length:
                sentences.append(f"{text!r} has {count} tokens, {self.name} reads {self._length}; the rest is not seen")
        return sentences

    @cached_property
    def _length(self) -> int:
        """How many tokens of a text the model reads."""
        positions = getattr(self._model.config.text_config, "max_position_embeddings", None)
        limits = [limit for limit in (positions, self._tokenizer.model_max_length) if isinstance(limit, int)]
        return min([*limits, _LONGEST_TEXT])  # tokenizers without a limit say 10^30

    def _run(self, what: str, work: Callable[[Any], Any], items: Sequence[Any]) -> Features:
        try:
            with torch.inference_mode(), quiet_libraries(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of settings that are not used here
                features = work(items)
        except torch.OutOfMemoryError:
            raise InputError(f"{self.name}: the device has not enough memory for {len(items)} {what}") from None
        except Exception as error:
            raise InputError(f"{self.name}: cannot read {what}: {_reason(error)}") from error
        shape = list(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(features, Tensor) or features.ndim != 2 or len(features) != len(items):
            raise InputError(
                f"{self.name}: gives {shape} for {len(items)} {what}, expected one vector each; "
                f"use another model, {_SUITABLE}"
            )
        return _normalise(features, self.name)

    def _embed_pictures(self, pictures: Sequence[Image.Image]) -> Any:
        images = [picture.convert("RGB") for picture in pictures]
        inputs = self._processor(images=images, return_tensors="pt")["pixel_values"].to(self._model.device)
        if hasattr(self._model, "get_image_features"):
            return _pooled(self._model.get_image_features(pixel_values=inputs))
        found = self._model(pixel_values=inputs)
        if self._pools and getattr(found, "pooler_output", None) is not None:
            return _pooled(found)
        states = found.last_hidden_state
        # [N, L, d] of a transformer, whose first token stands for all; [N, d, H, W] of a convolutional network.
        return states[:, 0] if states.ndim == 3 else states.flatten(2).mean(2)

    def _embed_texts(self, texts: Sequence[str]) -> Any:
        # SigLIP was trained with padding to the end and reads it; to CLIP it makes no difference.
        inputs = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        return _pooled(self._model.get_text_features(**inputs.to(self._model.device)))


def load_feature_model(model: str, *, texts: bool = False) -> FeatureModel:
    """Return a model of transformers on the CPU, in float32.

    Whether it can be used is told by its configuration, before its weights are loaded. Features of pictures are those
    that `get_image_features` returns, else the pooled output, else the state of the first token.

    Args:
        model: hub id, or folder in transformers layout.
        texts: whether it is to read texts as well.

    Raises:
        InputError: it cannot be found or read, is no model of pictures (and texts), or weights are missing.
    """
    place = Path(model).expanduser()
    source = str(place) if place.is_dir() else model
    config = _load(AutoConfig, source, model)
    kind = MODEL_MAPPING.get(type(config), None)
    takes_pictures = hasattr(kind, "get_image_features") or getattr(kind, "main_input_name", None) == "pixel_values"
    if not takes_pictures:
        raise InputError(
            f"{model}: is a {config.model_type} model, which reads no pictures; use one that does, {_SUITABLE}"
        )
    if texts and not hasattr(kind, "get_text_features"):
        raise InputError(
            f"{model}: is a {config.model_type} model, which reads no texts; compare texts and pictures with one that "
            f"reads both, {_SUITABLE_FOR_TEXTS}"
        )
    processor = _load(AutoImageProcessor, source, model)
    tokenizer = _load(AutoTokenizer, source, model) if texts else None
    loaded, info = _load(AutoModel, source, model, dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if others := [key for key in missing if "pooler" not in key]:
        raise InputError(f"{model}: lacks {len(others)} of its weights, e.g. {others[0]}; download it again")
    return FeatureModel(model, loaded.requires_grad_(False).eval(), processor, tokenizer, pools=not missing)


class JudgeModel:
    """The judge of the small world, as one for pictures: its features are the probabilities of what it tells apart."""

    name = "judge"

    def __init__(self, judge: Judge) -> None:
        """Take the judge."""
        self._judge = judge

    @torch.no_grad()
    def embed(self, pictures: Sequence[Image.Image]) -> Features:
        """Return the probability of every kind and attribute of the subject of each picture, [N, d]."""
        box = self._judge.regions["alone"]
        logits = self._judge.subject(to_inputs([picture.crop(box) for picture in self._fit(pictures)])).logits
        sizes = [len(values) for values in self._judge.groups.values()]
        return _normalise(torch.cat([part.softmax(-1) for part in logits.split(sizes, dim=-1)], dim=-1), self.name)

    def name_subjects(self, pictures: Sequence[Image.Image]) -> list[dict[str, str]]:
        """Return what each picture shows: `kind`, and for monsters every attribute."""
        return self._judge.name_subjects(self._fit(pictures))

    def name_scenes(self, pictures: Sequence[Image.Image]) -> list[str]:
        """Return the scene of each picture."""
        return self._judge.name_scenes(pictures)

    def find_subject(self, references: Sequence[Image.Image]) -> dict[str, str] | None:
        """Return what most of the reference pictures show, every attribute alike; None where they do not agree."""
        named = Counter(tuple(each.items()) for each in self.name_subjects(references))
        best, count = named.most_common(1)[0]
        return dict(best) if 2 * count > len(references) else None

    def find_scene(self, prompt: str) -> str | None:
        """Return the scene that a prompt names; None where it names none or several."""
        named = [
            scene
            for scene, phrase in self._phrases.items()
            if any(contains_trigger(prompt, words) for words in (scene, phrase, *_MORE_WORDS.get(scene, ())))
        ]
        return named[0] if len(named) == 1 else None

    @cached_property
    def _phrases(self) -> Mapping[str, str]:
        _, phrases = read_characters()
        return {scene: phrases.get(scene, scene) for scene in self._judge.scenes}

    def _fit(self, pictures: Sequence[Image.Image]) -> list[Image.Image]:
        """Return pictures of the size in which the judge knows where subjects stand."""
        return [picture.resize((SIDE, SIDE), Image.Resampling.BILINEAR) for picture in pictures]


def compare_features(features: Features, references: Features) -> Features:
    """Return how alike each of N is to M references: the mean of the cosines, [N], in -1..1.

    Args:
        features: [N, d].
        references: [M, d], of the same model.
    """
    # Cosines of a vector with itself may round to more than 1.
    alike: Features = np.clip(features @ references.T, -1, 1).mean(axis=1)
    return alike


def read_references(place: Path) -> list[Image.Image]:
    """Return reference pictures, RGB, in the order of their names.

    Args:
        place: a folder, whose hidden files and subfolders are passed over, or one picture.

    Raises:
        InputError: it does not exist, holds no picture, or a picture cannot be read.
    """
    if place.is_file():
        return [load_picture(place)]
    if not place.is_dir():
        raise InputError(f"{show_path(place)}: is no folder; give one with reference pictures of the subject")
    files = sorted(
        file
        for file in place.iterdir()
        if file.suffix.lower() in SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
    if not files:
        raise InputError(
            f"{show_path(place)}: holds no reference picture ({', '.join(SUFFIXES)}); put pictures of the subject there"
        )
    return [load_picture(file) for file in files]


def _load(loader: Any, source: str, model: str, **options: Any) -> Any:
    try:
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that are not used
            return loader.from_pretrained(source, **options)
    except Exception as error:
        raise InputError(
            f"{model}: cannot be loaded: {_reason(error)}; give the hub id or folder of a model of transformers, "
            f"{_SUITABLE}"
        ) from error


def _pooled(found: Any) -> Any:
    """Return the one vector for each picture or text, whichever way a model gives it; others as they are."""
    found = getattr(found, "pooler_output", found)
    return found.flatten(1) if isinstance(found, Tensor) else found  # convolutional networks give [N, d, 1, 1]


def _normalise(features: Tensor, name: str) -> Features:
    features = features.cpu().double()
    lengths = features.norm(dim=1, keepdim=True)
    if not (torch.isfinite(lengths) & (lengths > 0)).all():
        raise InputError(f"{name}: gives features that are zero or no numbers; use another model, {_SUITABLE}")
    vectors: Features = (features / lengths).float().numpy()
    return vectors


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
