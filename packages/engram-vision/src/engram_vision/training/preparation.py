"""Everything that comes before the first step: data, frozen model, registry, first vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engram_core import (
    Adapter,
    ConceptRecord,
    InputError,
    Manifest,
    Registry,
    StreamSpec,
    StreamTokenizer,
    Watcher,
    build_registry,
)
from engram_core.settings import dump_settings
from engram_core.torch import TrainableConcept, TrainableStream
from engram_vision.dataset import CaptionedImage, read_dataset
from engram_vision.loading import pipeline_tokenizers
from engram_vision.models import load_pipeline, model_fingerprint
from engram_vision.settings import TrainSettings
from engram_vision.shipped import TINY
from engram_vision.training.frozen import FrozenData, freeze
from engram_vision.training.initial import describe_vectors, random_vectors

__all__ = ["BACKBONE", "STREAM", "Prepared", "prepare", "read_data"]

BACKBONE = "sd15"
STREAM = "clip_l"
_SITE = "last_hidden_state"

# Settings that may change between an interrupted run and its continuation.
_FREE = {"output", "run_dir", "device", "save_every", "preview_every", "preview_prompts", "tracker", "license", "name"}
_FREE |= {"model", "data", "validation_data", "validate_every", "keep"}  # what these hold is compared, not their paths
# Settings that the adapter's record keeps.
_RECORDED = {"rule", "init", "steps", "batch_size", "accumulate", "vector_rate", "scale_rate", "warm_up", "schedule"}
_RECORDED |= {"weight_decay", "min_snr", "resolution", "flip", "crops", "precision", "seed"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What the steps work with.

    Attributes:
        pipeline: the frozen model on its device.
        data: the training set.
        unseen: the validation set; the training set itself where none was given.
        n_pictures: pictures in the training set.
        model: the base model's name and a digest of its weights.
        manifest: of the adapter.
        concept: what learns.
    """

    pipeline: Any
    data: FrozenData
    unseen: FrozenData
    n_pictures: int
    model: str
    manifest: Manifest
    concept: TrainableConcept

    @property
    def stream(self) -> TrainableStream:
        """The concept's memory in the only stream."""
        return self.concept.stream(STREAM)

    def adapter(self, settings: TrainSettings, step: int) -> Adapter:
        """Return the concept's present vectors and scales as an adapter."""
        training = {name: value for name, value in dump_settings(settings).items() if name in _RECORDED}
        training |= {"kept_step": step, "pictures": self.n_pictures}
        record = replace(self.concept.record, training=training)
        return Adapter.build(self.manifest, [self.concept.snapshot(record)])

    def describe(self, settings: TrainSettings) -> dict[str, str]:
        """Return what must be the same when the run goes on, by name."""
        values = {name: str(value) for name, value in dump_settings(settings).items() if name not in _FREE}
        for role, frozen in (("training", self.data), ("validation", self.unseen)):
            values |= {f"digest of the {role} {kind}": digest for kind, digest in frozen.origin.items()}
        return values | {"model": self.model}


def read_data(settings: TrainSettings, watcher: Watcher) -> tuple[list[CaptionedImage], list[CaptionedImage] | None]:
    """Return the training set and, where one is given, the validation set.

    Raises:
        InputError: a folder, picture or caption cannot be used.
    """

    def read(folder: Path) -> list[CaptionedImage]:
        return read_dataset(folder, settings.trigger, insert_trigger=settings.insert_trigger, note=watcher.note)

    watcher.begin("reading pictures")
    return read(settings.data), read(settings.validation_data) if settings.validation_data else None


def prepare(
    settings: TrainSettings,
    data: Sequence[CaptionedImage],
    unseen: Sequence[CaptionedImage] | None,
    device: torch.device,
    watcher: Watcher,
) -> Prepared:
    """Load the model and run its frozen parts over the data, once.

    Raises:
        InputError: the model, the resolution, a picture or a caption cannot be used.
        TriggerError: the trigger cannot be registered.
    """
    watcher.begin(f"loading {settings.model}")
    pipeline = load_pipeline(settings.model, precision=settings.precision, device=device)
    pipeline.unet.requires_grad_(False)
    tokenizers = pipeline_tokenizers(pipeline)
    registry = build_registry(
        settings.trigger,
        tokenizers[STREAM],
        max_ngram=settings.max_ngram,
        allow_single_token=settings.allow_single_token,
    )
    resolution = _resolution(pipeline, settings.resolution)

    def run_frozen(items: Sequence[CaptionedImage], *, flip: bool, crops: int) -> FrozenData:
        watcher.begin("encoding pictures and captions", len(items) * crops * (2 if flip else 1))
        return freeze(
            pipeline,
            items,
            {STREAM: registry},
            tokenizers,
            resolution=resolution,
            flip=flip,
            crops=crops,
            seed=settings.seed,
            advance=watcher.advance,
            note=watcher.note,
        )

    frozen = run_frozen(data, flip=settings.flip, crops=settings.crops)
    spec = StreamSpec(width=pipeline.text_encoder.config.hidden_size, site=_SITE, tokenizer=tokenizers[STREAM].spec)
    return Prepared(
        pipeline=pipeline,
        data=frozen,
        unseen=frozen if unseen is None else run_frozen(unseen, flip=False, crops=1),
        n_pictures=len(data),
        model=f"{_model_name(settings.model)} with weights {_digest_weights(pipeline)}",
        manifest=Manifest(
            backbone=BACKBONE,
            base_model=_model_name(settings.model),
            base_fingerprint=model_fingerprint(settings.model),
            streams={STREAM: spec},
        ),
        concept=_first_concept(settings, pipeline, registry, tokenizers[STREAM], spec).to(device),
    )


def _first_concept(
    settings: TrainSettings, pipeline: Any, registry: Registry, tokenizer: StreamTokenizer, spec: StreamSpec
) -> TrainableConcept:
    record = ConceptRecord(
        name=settings.name or registry.trigger,
        trigger=registry.trigger,
        activation=settings.activation,
        rule=settings.rule,
        overlap=settings.overlap,
        max_ngram=settings.max_ngram,
        dtype=settings.dtype,
        license=settings.license,
    )
    if settings.init is None:
        vectors = random_vectors(registry, spec.width, std=settings.init_std, seed=settings.seed)
    else:
        vectors = describe_vectors(
            pipeline,
            registry,
            tokenizer,
            settings.init,
            rule=settings.rule,
            overlap=settings.overlap,
            scale=settings.init_scale,
        )
    scales = torch.full((spec.width,), settings.init_scale)
    return TrainableConcept(record, {STREAM: TrainableStream(record, registry, spec, vectors, scales)})


def _resolution(pipeline: Any, asked: int | None) -> int:
    """Return the pixels a side to train with."""
    factor = int(pipeline.vae_scale_factor)
    # The U-Net halves the latents between its blocks.
    multiple = factor * 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if asked is not None and asked % multiple:
        raise InputError(f"resolution is {asked}, expected a multiple of {multiple}")
    return asked or int(pipeline.unet.config.sample_size) * factor


def _model_name(model: str) -> str:
    """Return what to call the base model: of a local one its name, because its path means nothing to others."""
    path = Path(model).expanduser()
    return path.resolve().stem if model != TINY and path.exists() else model


def _digest_weights(pipeline: Any) -> str:
    """Return a digest over the first values of every weight: enough to tell one checkpoint from another."""
    digest = hashlib.sha256()
    for name in ("text_encoder", "unet", "vae"):
        for key, weight in getattr(pipeline, name).state_dict().items():
            digest.update(f"{name}.{key}".encode())
            digest.update(weight.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
