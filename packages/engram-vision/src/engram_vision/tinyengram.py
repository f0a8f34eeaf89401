"""Import of TinyEngram's image checkpoints (github.com/AutoArk/TinyEngram) as concepts with `spans` activation.

What its scripts save, and what that means here:

- SD1.5 (`train_vision_engram.py`): `engram_weights.pt` holds `engram_embeddings` (n-gram name to [1, d]) and
  `injection_scale` [d]; `engram_config.json` beside it holds the trigger, the ids of every n-gram, and the
  switches: `enable_tanh_gating` is the rule `absolute-tanh`, `normalization_mode` the overlap `mean`.
- SD3.5 (`train_vision_engram_sd3.py`): `engram_1..3.pt` (n-gram name to [1, d]) and `scale_1..3.pt` [d] for
  CLIP-L, CLIP-G and T5, without any configuration: trigger and longest n-gram must be told, and the ids are
  found again with the model's tokenizers. Its published runs use the relative rule, and its overlaps add up.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from engram_core import (
    DEFAULT_MAX_NGRAM,
    Adapter,
    AdapterFormatError,
    AdapterReadError,
    Concept,
    ConceptRecord,
    ConceptStream,
    ConvertSettings,
    InputError,
    Manifest,
    Overlap,
    Rule,
    StreamSpec,
    StreamTokenizer,
)

__all__ = ["convert_sd15", "convert_sd35"]

Floats = npt.NDArray[np.float32]
Ngram = tuple[int, ...]

_CONFIG = "engram_config.json"
_FINAL_WEIGHTS = "engram_weights.pt"
_FULL = "trigger_full"
_LARGEST_CONFIG = 1 << 20


class _Source(Protocol):
    """What conversion needs of a backbone."""

    name: str
    streams: Mapping[str, str]
    default_model: str

    def load_tokenizers(self, model: str) -> Mapping[str, StreamTokenizer]: ...


def convert_sd15(source: Path, settings: ConvertSettings, backbone: _Source) -> Adapter:
    """Import an SD1.5 checkpoint.

    Args:
        source: the `.pt` file, or the folder that holds `engram_weights.pt`.
        settings: what the user said; trigger, N and rule are in the checkpoint and may only repeat it.
        backbone: `sd15`.

    Raises:
        AdapterReadError: a file is missing.
        AdapterFormatError: a file does not hold what TinyEngram saves.
        InputError: the settings contradict the checkpoint, or the tokenizer is another one.
    """
    _expect(source)
    weights = source / _FINAL_WEIGHTS if source.is_dir() else source
    config = _read_config(weights.parent / _CONFIG)
    checkpoint = _load(weights)
    if not isinstance(checkpoint, dict) or not {"engram_embeddings", "injection_scale"} <= checkpoint.keys():
        raise AdapterFormatError(f"{weights}: lacks engram_embeddings and injection_scale; not a TinyEngram SD1.5 file")
    trigger = config["trigger_word"]
    rule: Rule = "absolute-tanh" if config["enable_tanh_gating"] else "absolute"
    overlap: Overlap = "mean" if config["normalization_mode"] else "sum"
    for field, said, found in (("--trigger", settings.trigger, trigger), ("--rule", settings.rule, rule)):
        if said is not None and said != found:
            raise InputError(
                f"{weights}: {field} says {said!r}, the checkpoint's configuration {found!r}; leave it out"
            )
    if settings.max_ngram not in (None, config["max_ngram_size"]):
        raise InputError(
            f"{weights}: --max-ngram says {settings.max_ngram}, the checkpoint's configuration "
            f"{config['max_ngram_size']}; leave it out"
        )
    (stream,) = backbone.streams
    model = settings.model or backbone.default_model
    tokenizer = backbone.load_tokenizers(model)[stream]
    ids = _trigger_ids(trigger, tokenizer)
    registered = {name: tuple(ngram) for name, ngram in config["target_ngrams"].items()}
    expected = _published_registry(ids, config["max_ngram_size"])
    if sorted(registered.values()) != sorted(expected.values()):
        raise InputError(
            f"{weights.parent / _CONFIG}: target_ngrams are not those of {trigger!r} with the tokenizer of {model} "
            f"({len(registered)} against {len(expected)}); pass --model with the model it was trained on"
        )
    concept = Concept(
        record=_record(settings, trigger, rule, overlap, config["max_ngram_size"], len(ids), weights),
        streams={
            stream: _stream(
                weights, registered, ids, checkpoint["engram_embeddings"], checkpoint["injection_scale"], rule, overlap
            )
        },
    )
    return _adapter(backbone, model, concept, {stream: tokenizer})


def convert_sd35(source: Path, settings: ConvertSettings, backbone: _Source) -> Adapter:
    """Import an SD3.5 checkpoint.

    Args:
        source: the folder with `engram_1..3.pt` and `scale_1..3.pt`.
        settings: `trigger` is required; N is 7 and the rule `relative` unless told otherwise.
        backbone: `sd35`.

    Raises:
        AdapterReadError: a file is missing.
        AdapterFormatError: a file does not hold what TinyEngram saves.
        InputError: no trigger, or one that does not give the checkpoint's n-grams.
    """
    _expect(source)
    if not source.is_dir():
        raise AdapterReadError(f"{source}: is not a folder; give the checkpoint folder with engram_1.pt .. scale_3.pt")
    if settings.trigger is None:
        raise InputError(f"{source}: the checkpoint does not record its trigger; pass it with --trigger")
    max_ngram = DEFAULT_MAX_NGRAM if settings.max_ngram is None else settings.max_ngram
    rule: Rule = settings.rule or "relative"
    model = settings.model or backbone.default_model
    tokenizers = backbone.load_tokenizers(model)
    streams, longest = {}, 0
    for number, stream in enumerate(backbone.streams, start=1):
        weights, scale = source / f"engram_{number}.pt", source / f"scale_{number}.pt"
        embeddings = _load(weights)
        ids = _trigger_ids(settings.trigger, tokenizers[stream])
        registered = _published_registry(ids, max_ngram)
        if not isinstance(embeddings, dict) or embeddings.keys() != registered.keys():
            found = len(embeddings) if isinstance(embeddings, dict) else 0
            raise InputError(
                f"{weights}: has {found} n-grams, {settings.trigger!r} gives {len(registered)} with the "
                f"{stream} tokenizer of {model} and N = {max_ngram}; check --trigger, --max-ngram and --model"
            )
        streams[stream] = _stream(weights, registered, ids, embeddings, _load(scale), rule, "sum")
        longest = max(longest, len(ids))
    record = _record(settings, settings.trigger, rule, "sum", max_ngram, longest, source)
    return _adapter(backbone, model, Concept(record=record, streams=streams), tokenizers)


def _published_registry(ids: Ngram, max_ngram: int) -> dict[str, Ngram]:
    """Return TinyEngram's n-grams by its names; a repeated span appears once for each place."""
    if max_ngram <= 0:
        return {"aldric_main": ids}
    spans = {
        f"trigger_{n}gram_{start}": ids[start : start + n]
        for n in range(2, min(len(ids), max_ngram) + 1)
        for start in range(len(ids) - n + 1)
    }
    return spans | ({_FULL: ids} if len(ids) > max_ngram else {})


def _stream(
    file: Path,
    registered: Mapping[str, Ngram],
    trigger: Ngram,
    embeddings: Any,
    scale: Any,
    rule: Rule,
    overlap: Overlap,
) -> ConceptStream:
    """Return one stream of the concept."""
    if not isinstance(embeddings, dict) or embeddings.keys() != registered.keys():
        raise AdapterFormatError(f"{file}: its embeddings do not have the names of its n-grams")
    scales = _vector(scale, file, "the scale")
    vectors: dict[Ngram, Floats] = {}
    for name, ngram in registered.items():
        vector = _vector(embeddings[name], file, name)
        if vector.shape != scales.shape:
            raise AdapterFormatError(f"{file}: {name} has width {len(vector)}, the scale {len(scales)}")
        if ngram in vectors:
            # TinyEngram adds a repeated span once for each of its entries. Here it is one entry; the sum of
            # the vectors does the same, but only where residuals are linear in the vector and simply add up.
            if rule == "relative" or overlap == "mean":
                raise InputError(
                    f"{file}: the n-gram {list(ngram)} occurs twice in the trigger, which cannot be converted exactly "
                    f"under the rule {rule!r} with overlap {overlap!r}"
                )
            vector = vectors[ngram] + vector
        vectors[ngram] = vector
    return ConceptStream(
        triggers=(trigger,), entries=tuple(vectors), vectors=np.stack(list(vectors.values())), scales=scales
    )


def _record(
    settings: ConvertSettings, trigger: str, rule: Rule, overlap: Overlap, max_ngram: int, length: int, source: Path
) -> ConceptRecord:
    return ConceptRecord(
        name=settings.name or trigger,
        trigger=trigger,
        activation="spans",
        rule=rule,
        overlap=overlap,
        max_ngram=max(2, max_ngram if max_ngram > 0 else length),
        training={"converted_from": "TinyEngram", "file": source.name},
    )


def _adapter(backbone: _Source, model: str, concept: Concept, tokenizers: Mapping[str, StreamTokenizer]) -> Adapter:
    specs = {
        name: StreamSpec(width=len(stream.scales), site=backbone.streams[name], tokenizer=tokenizers[name].spec)
        for name, stream in concept.streams.items()
    }
    # A local folder means nothing to others; TinyEngram trains on the family's usual model.
    base_model = backbone.default_model if Path(model).is_dir() else model
    return Adapter.build(Manifest(backbone=backbone.name, base_model=base_model, streams=specs), [concept])


def _trigger_ids(trigger: str, tokenizer: StreamTokenizer) -> Ngram:
    ids = tuple(int(i) for i in tokenizer.encode(trigger))
    if len(ids) < 2:
        raise InputError(f"trigger {trigger!r} has {len(ids)} tokens; TinyEngram registers nothing below 2")
    return ids


def _expect(source: Path) -> None:
    if not source.exists():
        raise AdapterReadError(f"{source}: does not exist; give a TinyEngram checkpoint")


def _load(file: Path) -> Any:
    """Load a PyTorch file without running anything in it."""
    if not file.is_file():
        raise AdapterReadError(f"{file}: is missing; it is part of a TinyEngram checkpoint")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about pickle protocols of files we refuse anyway
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise AdapterReadError(f"{file}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # noqa: BLE001 - junk makes the unpickler raise almost anything
        reason = " ".join(str(error).split()).split(". ")[0][:160]
        raise AdapterFormatError(f"{file}: cannot be loaded safely (weights only): {reason}") from None


def _vector(value: Any, file: Path, what: str) -> Floats:
    """Return a tensor [d] or [1, d] as float32 [d]."""
    if (
        not isinstance(value, torch.Tensor)
        or not value.is_floating_point()
        or value.numel() != value.shape[-1:].numel()
    ):
        raise AdapterFormatError(f"{file}: {what} is not a floating-point tensor of shape [1, d] or [d]")
    flat: Floats = value.detach().float().reshape(-1).numpy()
    if not np.isfinite(flat).all():
        raise AdapterFormatError(f"{file}: {what} holds NaN or infinity")
    return flat


def _read_config(file: Path) -> dict[str, Any]:
    """Read and check `engram_config.json`."""
    try:
        if file.stat().st_size > _LARGEST_CONFIG:
            raise AdapterFormatError(f"{file}: has {file.stat().st_size} bytes, a configuration has a few thousand")
        config: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise AdapterReadError(f"{file}: cannot be read: {error.strerror}; it must lie beside the weights") from None
    except (ValueError, RecursionError) as error:
        raise AdapterFormatError(f"{file}: is not JSON: {error}") from None
    fields = {"trigger_word": str, "max_ngram_size": int, "target_ngrams": dict}
    for name, expected in fields.items():
        if not isinstance(config, dict) or not isinstance(config.get(name), expected):
            raise AdapterFormatError(f"{file}: field {name!r} is missing or not {expected.__name__}")
    for name in ("normalization_mode", "enable_tanh_gating"):
        if not isinstance(config.setdefault(name, False), bool):
            raise AdapterFormatError(f"{file}: field {name!r} is {config[name]!r}, expected true or false")
    for name, ngram in config["target_ngrams"].items():
        if not isinstance(ngram, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in ngram):
            raise AdapterFormatError(f"{file}: target_ngrams[{name!r}] is not a list of token ids")
    checked: dict[str, Any] = config
    return checked
