"""Everything that comes before the first step: data, frozen model, registry, first vectors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engram_core import (
    Adapter,
    ConceptRecord,
    Manifest,
    Registry,
    StreamSpec,
    Watcher,
    build_registry,
)
from engram_core.settings import dump_settings
from engram_core.torch import TrainableConcept, TrainableStream
from engram_vision.families import Family
from engram_vision.loading import pipeline_tokenizers
from engram_vision.models import load_pipeline, model_fingerprint
from engram_vision.settings import TrainSettings, without_streams
from engram_vision.shipped import TINY
from engram_vision.sites import Corner, find_corners, name_sites
from engram_vision.training.frozen import Captioned, FrozenData, TextReader, freeze
from engram_vision.training.initial import describe_vectors, random_vectors
from engram_vision.training.medium import Conditions, Medium
from engram_vision.training.store import FrozenStore

__all__ = ["Model", "Prepared", "Samples", "load_model", "prepare", "read_data"]

# Settings that may change between an interrupted run and its continuation.
_FREE = {"output", "run_dir", "device", "save_every", "preview_every", "preview_prompts", "tracker", "license", "name"}
_FREE |= {"model", "data", "validation_data", "validate_every", "keep"}  # what these hold is compared, not their paths
_FREE |= {"low_memory", "gradient_checkpointing", "cache_dir"}
# Settings that the frozen models' outcome depends on, beside data and weights; `seed` where crops are drawn.
_FROZEN = {"precision", "resolution", "flip", "crops", "width", "height", "frames"}
# Settings that the adapter's record keeps.
_RECORDED = {
    "sites",
    "rule",
    "init",
    "steps",
    "batch_size",
    "accumulate",
    "vector_rate",
    "scale_rate",
    "warm_up",
    "schedule",
}
_RECORDED |= {"weight_decay", "min_snr", "logit_mean", "logit_std", "resolution", "flip", "crops", "precision", "seed"}
_RECORDED |= {"width", "height", "frames"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Model:
    """The frozen model, before its encoders leave it.

    Attributes:
        pipeline: all of it.
        readers: its text encoders, by stream.
        conditioner: puts together what the denoiser reads.
        corners: where the streams' states are in what the denoiser reads.
        weights: a digest of its weights.
    """

    pipeline: Any
    readers: Mapping[str, TextReader]
    conditioner: Conditions
    corners: Mapping[str, Corner]
    weights: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Samples:
    """What a concept is learned from, as it was read from disk.

    Attributes:
        learned: the training set.
        unseen: the validation set, where one is given.
    """

    learned: Sequence[Captioned]
    unseen: Sequence[Captioned] | None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """One concept before its first step.

    Attributes:
        data: the training set.
        unseen: the validation set; the training set itself where none was given.
        n_samples: in the training set, by what they are called.
        model: the base model's name and a digest of its weights.
        manifest: of the adapter.
        concept: what learns.
    """

    data: FrozenData
    unseen: FrozenData
    n_samples: Mapping[str, int]
    model: str
    manifest: Manifest
    concept: TrainableConcept

    @property
    def streams(self) -> dict[str, TrainableStream]:
        """The concept's memories by stream."""
        return {name: self.concept.stream(name) for name in self.concept.streams}

    def adapter(self, settings: TrainSettings, step: int) -> Adapter:
        """Return the concept's present vectors and scales as an adapter."""
        training = {name: value for name, value in dump_settings(settings).items() if name in _RECORDED}
        training |= {"kept_step": step, **self.n_samples}
        record = replace(self.concept.record, training=training)
        return Adapter.build(self.manifest, [self.concept.snapshot(record)])

    def describe(self, settings: TrainSettings) -> dict[str, str]:
        """Return what must be the same when the run goes on, by name."""
        values = {name: str(value) for name, value in dump_settings(settings).items() if name not in _FREE}
        for role, frozen in (("training", self.data), ("validation", self.unseen)):
            values |= {f"digest of the {role} {kind}": digest for kind, digest in frozen.origin.items()}
        return values | {"model": self.model}


def read_data(settings: TrainSettings, medium: Medium, watcher: Watcher) -> Samples:
    """Return the training set and, where one is given, the validation set.

    Raises:
        InputError: a folder, a sample or a caption cannot be used.
    """
    watcher.begin(f"reading {medium.name}")
    data, unseen = settings.data, settings.validation_data
    return Samples(
        learned=medium.read(data, settings, watcher), unseen=medium.read(unseen, settings, watcher) if unseen else None
    )


def load_model(settings: TrainSettings, medium: Medium, device: torch.device, watcher: Watcher) -> Model:
    """Load the model that concepts are trained for.

    Args:
        settings: of any of them.
        medium: of the family.
        device: where its encoders will compute.
        watcher: hears how it goes.

    Raises:
        InputError: the model cannot be used.
    """
    family = settings.family
    watcher.begin(f"loading {settings.model}")
    pipeline = load_pipeline(family, settings.model, precision=settings.precision, without=without_streams(settings))
    getattr(pipeline, family.denoiser).requires_grad_(False)
    tokenizers = pipeline_tokenizers(pipeline)
    for stream in family.streams.keys() - tokenizers.keys():
        watcher.note(f"the model has no {family.streams[stream].encoder}, so the adapter will have no stream {stream}")
    return Model(
        pipeline=pipeline,
        readers={
            stream: TextReader(family, pipeline, stream, tokenizer, device) for stream, tokenizer in tokenizers.items()
        },
        conditioner=medium.conditioner(settings, pipeline),
        corners=find_corners(family, pipeline),
        weights=_digest_weights(family, pipeline),
    )


def prepare(
    settings: TrainSettings,
    medium: Medium,
    samples: Samples,
    model: Model,
    device: torch.device,
    cache: Path,
    watcher: Watcher,
    *,
    keeps: bool = True,
) -> Prepared:
    """Run the model's frozen parts over a concept's data, once.

    Args:
        settings: of the concept.
        medium: of the family.
        samples: what it is learned from.
        model: with its encoders.
        device: where to compute.
        cache: folder for what the frozen parts make.
        watcher: hears how it goes.
        keeps: whether this process writes there.

    Raises:
        InputError: the size, a sample or a caption cannot be used.
        TriggerError: the trigger cannot be registered.
        AdapterWriteError: the outcome cannot be kept.
    """
    family, pipeline, readers = settings.family, model.pipeline, model.readers
    registries = {
        stream: build_registry(
            settings.trigger,
            reader.tokenizer,
            max_ngram=settings.max_ngram,
            allow_single_token=settings.allow_single_token,
        )
        for stream, reader in readers.items()
    }

    def run_frozen(items: Sequence[Captioned], *, learning: bool) -> FrozenData:
        facts = _list_facts(settings, learning=learning) | {"weights": model.weights, "device": device.type}
        return freeze(
            readers,
            items,
            registries,
            lambda: medium.encode(items, settings, pipeline, device, watcher, learning=learning),
            FrozenStore(folder=cache, facts=facts, writes=keeps, note=watcher.note),
        )

    frozen = run_frozen(samples.learned, learning=True)
    sites = name_sites(family, pipeline) if settings.sites == "blocks" else None
    specs = {
        stream: StreamSpec(
            width=reader.width, site=family.streams[stream].site, tokenizer=reader.tokenizer.spec, sites=sites
        )
        for stream, reader in readers.items()
    }
    return Prepared(
        data=frozen,
        unseen=frozen if samples.unseen is None else run_frozen(samples.unseen, learning=False),
        n_samples={medium.name: len(samples.learned)},
        model=f"{_model_name(settings.model)} with weights {model.weights}",
        manifest=Manifest(
            backbone=family.name,
            base_model=_model_name(settings.model),
            base_fingerprint=model_fingerprint(family, settings.model),
            streams=specs,
        ),
        concept=_first_concept(settings, readers, registries, specs).to(device),
    )


def _first_concept(
    settings: TrainSettings,
    readers: Mapping[str, TextReader],
    registries: Mapping[str, Registry],
    specs: Mapping[str, StreamSpec],
) -> TrainableConcept:
    trigger = next(iter(registries.values())).trigger
    record = ConceptRecord(
        name=settings.name or trigger,
        trigger=trigger,
        activation=settings.activation,
        rule=settings.rule,
        overlap=settings.overlap,
        max_ngram=settings.max_ngram,
        dtype=settings.dtype,
        license=settings.license,
    )
    streams = {}
    for number, (stream, registry) in enumerate(registries.items()):
        spec = specs[stream]
        if settings.init is None:
            vectors = random_vectors(registry, spec.width, std=settings.init_std, seed=settings.seed + number)
        else:
            vectors = describe_vectors(
                readers[stream],
                registry,
                settings.init,
                rule=settings.rule,
                overlap=settings.overlap,
                scale=settings.init_scale,
            )
        # With sites every block begins with the same.
        vectors = vectors.unsqueeze(1).expand(-1, *spec.shape) if spec.sites else vectors
        scales = torch.full(spec.shape, settings.init_scale)
        streams[stream] = TrainableStream(record, registry, spec, vectors, scales)
    return TrainableConcept(record, streams)


def _list_facts(settings: TrainSettings, *, learning: bool) -> dict[str, str]:
    """Return the settings that the frozen models' outcome depends on."""
    values = dump_settings(settings)
    names = _FROZEN | ({"seed"} if values.get("crops", 1) > 1 else set())
    facts = {name: str(values[name]) for name in sorted(names & values.keys())}
    return facts | {"backbone": settings.family.name, "learning": str(learning)}


def _model_name(model: str) -> str:
    """Return what to call the base model: of a local one its name, because its path means nothing to others."""
    path = Path(model).expanduser()
    return path.resolve().stem if model != TINY and path.exists() else model


def _digest_weights(family: Family, pipeline: Any) -> str:
    """Return a digest over the first values of every weight: enough to tell one checkpoint from another."""
    digest = hashlib.sha256()
    for name in sorted(name for name in family.modules() if getattr(pipeline, name) is not None):
        for key, weight in getattr(pipeline, name).state_dict().items():
            digest.update(f"{name}.{key}".encode())
            digest.update(weight.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
