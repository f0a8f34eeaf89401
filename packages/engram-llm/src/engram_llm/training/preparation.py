"""Everything that comes before the first step: data, frozen model, and the first values of what learns."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engram_core import InputError, Manifest, MemoryRecord, Watcher
from engram_core.settings import dump_settings
from engram_llm.compression import compress_vocabulary
from engram_llm.data import (
    Collator,
    Documents,
    Samples,
    pack_documents,
    read_documents,
    split_documents,
    truncate_documents,
)
from engram_llm.models import describe_model, load_config, load_model, load_tokenizer, model_name
from engram_llm.settings import TrainSettings
from engram_llm.training.learned import Learned, count_table_values
from engram_llm.training.loss import padding_token

__all__ = ["BACKBONE", "Prepared", "check_model", "prepare"]

BACKBONE = "qwen3"

_MANY = 20_000_000  # values of all tables above which dense gradients cost more than the rest of a small step

_ROUNDING = 0.05  # share of the logits by which bfloat16 may change them; reading another document changes them all

# Settings that may change between an interrupted run and its continuation.
_FREE = {"output", "run_dir", "device", "save_every", "tracker", "license", "name", "keep", "dtype"}
_FREE |= {"model", "data", "eval_data"}  # what these hold is compared, not their paths
# Settings that the adapter's record keeps.
_RECORDED = {"method", "init_std", "engram_warmup_steps", "engram_soft_constraint_steps", "freeze_tables", "max_length"}
_RECORDED |= {"packing", "steps", "batch_size", "accumulate", "learning_rate", "table_rate", "warm_up", "schedule"}
_RECORDED |= {"weight_decay", "adam_beta2", "max_grad_norm", "precision", "seed"}
_LORA = {"lora_rank", "lora_alpha", "lora_dropout"}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prepared:
    """What the steps work with.

    Attributes:
        settings: of the run.
        learned: the frozen model and what learns in it.
        samples: to train on.
        unseen: to validate on; None for nothing.
        collator: makes batches.
        manifest: what the memory belongs to.
        sparse: whether the gradients of tables hold the touched rows alone.
        run: what must be the same when the run goes on, by name.
    """

    settings: TrainSettings
    learned: Learned
    samples: Samples
    unseen: Samples | None
    collator: Collator
    manifest: Manifest
    sparse: bool
    run: Mapping[str, str]

    def record(self, figures: Mapping[str, Any] | None = None) -> MemoryRecord | None:
        """Return what the memory says of itself; None where none learns.

        Args:
            figures: what came out, to keep with the settings; plain JSON values.
        """
        memory, settings = self.learned.memory, self.settings
        if memory is None:
            return None
        names = _RECORDED | (_LORA if settings.method == "both" else set())
        training = {name: value for name, value in dump_settings(settings).items() if name in names}
        training |= {"documents": len(self.samples.documents), "samples": len(self.samples), **(figures or {})}
        name = settings.name or settings.output.stem
        return MemoryRecord(name=name, settings=memory.settings, license=settings.license, training=training)


def check_model(settings: TrainSettings) -> None:
    """Refuse what a model's configuration tells to be impossible, before anything is loaded.

    Raises:
        InputError: the model cannot be found, has no such layers, or reads texts that are not as long.
    """
    config = load_config(settings.model)
    n_layers: int | None = getattr(config, "num_hidden_layers", None)
    missing = [] if n_layers is None else [layer for layer in settings.layer_ids if layer >= n_layers]
    if n_layers is not None and missing and settings.method != "lora":
        raise InputError(
            f"layer_ids is {list(settings.layer_ids)}; {settings.model} has layers 0 to {n_layers - 1}, "
            f"so there is no layer {missing[0]}"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and settings.max_length > longest:
        raise InputError(f"max_length is {settings.max_length}; {settings.model} reads {longest} tokens at most")


def prepare(settings: TrainSettings, device: torch.device, processes: int, watcher: Watcher) -> Prepared:
    """Read the data, load the model, and put into it what learns.

    Args:
        settings: of the run.
        device: where it will be.
        processes: that train together.
        watcher: hears how it goes, and what the user should know.

    Raises:
        InputError: data or model cannot be used.
    """
    tokenizer, config = load_tokenizer(settings.model), load_config(settings.model)
    if len(tokenizer) > config.vocab_size:
        raise InputError(f"{settings.model}: its tokenizer has {len(tokenizer)} ids, the model {config.vocab_size}")
    pad_id = padding_token(tokenizer) if settings.pad_id is None else settings.pad_id
    if pad_id >= len(tokenizer):
        raise InputError(f"pad_id is {pad_id}; the tokenizer of {settings.model} has ids 0 to {len(tokenizer) - 1}")
    documents, unseen = _read_data(settings, tokenizer, watcher)
    samples, checks = _make_samples(documents, settings, watcher), None
    if len(unseen):
        checks = _make_samples(unseen, settings, watcher, role="validation texts")
    watcher.begin(f"loading {settings.model}")
    base = load_model(settings.model, settings.precision, device)
    _check_reading(base, settings)
    lookup = np.zeros(1, np.int32) if settings.method == "lora" else compress_vocabulary(tokenizer)
    sparse = _choose_sparse(settings, device, processes, watcher)
    manifest = describe_model(BACKBONE, settings.model, config.hidden_size, tokenizer)
    run = {name: str(value) for name, value in dump_settings(settings).items() if name not in _FREE}
    run |= {
        "model": f"{model_name(settings.model)} with weights {_digest_weights(base)}",
        "tokenizer": manifest.streams["text"].tokenizer.fingerprint[:16],
        "digest of the training data": documents.digest(),
        "digest of the validation data": unseen.digest(),
        "number of processes": str(processes),
    }
    learned = Learned(base, settings, lookup, pad_id, sparse=sparse)
    if settings.gradient_checkpointing:
        # On the base: PEFT would pass the call on, and then ask for gradients of the embeddings.
        # Releases for Python 3.10 know it by the second name, of which later ones warn.
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return Prepared(
        settings=settings,
        learned=learned,
        samples=samples,
        unseen=checks,
        collator=Collator(padding_token(tokenizer), packed=settings.packing),
        manifest=manifest,
        sparse=sparse,
        run=run,
    )


def _read_data(settings: TrainSettings, tokenizer: Any, watcher: Watcher) -> tuple[Documents, Documents]:
    """Return what to train and what to validate on; the latter may be empty."""
    column = settings.text_column
    documents = read_documents(settings.data, tokenizer, text_column=column, watcher=watcher)
    if not settings.evaluate_every:
        return split_documents(documents, 0.0, 0)
    if settings.eval_data is None:
        training, unseen = split_documents(documents, settings.eval_fraction, settings.eval_samples)
        if settings.eval_fraction and not len(unseen):
            watcher.note(f"{settings.data}: all rows are equal, so none is left to validate on")
        return training, unseen
    # The whole file, limited as a split is: by what the texts say, not by their order.
    given = read_documents(settings.eval_data, tokenizer, text_column=column, watcher=watcher)
    unseen = given.lowest(settings.eval_samples)
    shared = unseen.count_shared(documents)
    if shared:
        watcher.note(f"{settings.eval_data}: {shared} of {len(unseen)} validation texts are in the training data too")
    return documents, unseen


def _make_samples(documents: Documents, settings: TrainSettings, watcher: Watcher, role: str = "texts") -> Samples:
    samples = (pack_documents if settings.packing else truncate_documents)(documents, settings.max_length)
    if samples.n_cut:
        what = "continue in samples of their own, without what came before" if settings.packing else "are cut there"
        count = f"{samples.n_cut} of {len(documents)} {role}"
        watcher.note(f"{count} have more than {settings.max_length} tokens and {what}")
    if samples.n_dropped:
        watcher.note(
            f"{samples.n_dropped} pieces of {role} are left out: no token in them is learned, because the answer lies "
            "beyond the cut or was emptied by the chat template"
        )
    if not len(samples):
        raise InputError(
            f"{settings.data}: no token of the {role} is left to learn; max_length is {settings.max_length}, "
            "give a larger one"
        )
    return samples


def _choose_sparse(settings: TrainSettings, device: torch.device, processes: int, watcher: Watcher) -> bool:
    if settings.method == "lora" or settings.freeze_tables:
        return False
    values = count_table_values(settings)
    wanted = values > _MANY if settings.sparse is None else settings.sparse
    if wanted and processes > 1 and device.type != "cpu":
        watcher.note(
            f"tables of {values:,} values get dense gradients: those of the touched rows alone cannot be exchanged "
            "between GPUs"
        )
        return False
    return wanted


@torch.no_grad()
def _check_reading(model: Any, settings: TrainSettings) -> None:
    """Refuse packing for models that read across the borders of documents, as some do without a word."""
    if not settings.packing:
        return
    ids = torch.arange(1, 17, device=model.device).remainder(model.config.get_text_config(decoder=True).vocab_size)
    positions = torch.arange(8, device=model.device)
    try:
        packed = model(input_ids=ids[None], position_ids=positions.repeat(2)[None], use_cache=False).logits[0, 8:]
        alone = model(input_ids=ids[None, 8:], position_ids=positions[None], use_cache=False).logits[0]
    except TypeError:  # it takes no positions
        is_apart = False
    else:
        difference = torch.linalg.vector_norm((packed - alone).float())
        is_apart = bool(difference <= _ROUNDING * torch.linalg.vector_norm(alone.float()))
    if not is_apart:
        raise InputError(f"{settings.model}: reads across the borders of packed documents; train it with packing off")


def _digest_weights(model: Any) -> str:
    """Return a digest over the first values of every weight: enough to tell one checkpoint from another."""
    digest = hashlib.sha256()
    for key, weight in model.state_dict().items():
        digest.update(key.encode())
        digest.update(weight.flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
