"""What learns in a run: a memory, LoRA, or both in one frozen model; put in, saved, read again, taken out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from engram_core import HashedMemory, InputError, Manifest, MemoryRecord, open_memory, write_memory
from engram_core.errors import one_line
from engram_llm.attachment import Active, attach, detach, find_decoder
from engram_llm.memory import Memory, stored_tensors
from engram_llm.module import Table
from engram_llm.quiet import quiet_libraries
from engram_llm.settings import TrainSettings

__all__ = ["LORA_WEIGHTS", "Learned", "count_table_values"]

LORA_WEIGHTS = "adapter_model.safetensors"
"""Where PEFT writes its weights."""

_NAME = "engram_memory"
_MEMORY = "memory.safetensors"
_LORA = "lora"


class Learned:
    """A frozen model and what learns in it.

    Attributes:
        model: what is trained: the base model, or PEFT's around it.
        memory: the memory, if one learns.
        lora: PEFT's model, if LoRA learns.
    """

    def __init__(
        self, base: Any, settings: TrainSettings, lookup: npt.NDArray[np.int32], pad_id: int, *, sparse: bool
    ) -> None:
        """Put into a model what the settings ask for, with first values that leave it as it is.

        Args:
            base: a decoder, frozen.
            settings: what learns, its shape and first values.
            lookup: token id to compressed id [V].
            pad_id: token id that stands left of the text.
            sparse: whether gradients of tables hold the touched rows alone.
        """
        self._base, self._lookup = base, lookup
        self._before = base.training, base.config.use_cache
        self.model = base
        self.memory: Memory | None = None
        self.lora: Any = None
        with torch.random.fork_rng(devices=[]):
            if settings.method != "engram":
                torch.manual_seed(settings.seed)
                self.lora = self.model = _add_lora(base, settings)
            if settings.method != "lora":
                torch.manual_seed(settings.seed)
                decoder, _ = find_decoder(base)
                width = decoder.config.get_text_config(decoder=True).hidden_size  # type: ignore[union-attr,operator]
                self.memory = _make_memory(settings, lookup, pad_id, int(width), sparse=sparse)
        if self.memory is not None:
            # A part of the model while it learns, so that whatever walks over the model's parameters finds it. LoRA
            # came first: it would adapt the memory's projections too.
            base.add_module(_NAME, self.memory)
            attach(base, [Active(self.memory, 1.0)])

    def remove(self) -> None:
        """Take everything out of the model again, and undo what the Trainer did to it."""
        if self.memory is not None:
            detach(self._base)
            delattr(self._base, _NAME)
        if self.lora is not None:
            with quiet_libraries():
                self.lora.unload()
            if hasattr(self._base, "peft_config"):  # older versions of PEFT leave it
                del self._base.peft_config
        was_training, self._base.config.use_cache = self._before
        self._base.train(was_training)
        vars(self._base).pop("_is_accelerate_prepared", None)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While entered, the model computes what it will when it is used: gates as they are, nothing dropped out."""
        layers: list[Any] = [] if self.memory is None else list(self.memory.layers.values())
        floors = [layer.gate_floor for layer in layers]
        was_training = self.model.training
        self.model.eval()
        self.set_gate_floor(0.0)
        try:
            yield
        finally:
            for layer, floor in zip(layers, floors, strict=True):
                layer.gate_floor = floor
            self.model.train(was_training)

    def set_gate_floor(self, floor: float) -> None:
        """Keep all gates at least this far open."""
        if self.memory is not None:
            layers: Any = self.memory.layers.values()
            for layer in layers:
                layer.gate_floor = floor

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Return everything that learns, by name."""
        return [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]

    def is_finite(self) -> bool:
        """Tell whether every value that learns is a number."""
        return all(bool(weight.detach().isfinite().all()) for _, weight in self.parameters())

    def rows(self) -> dict[str, int]:
        """Return how many rows the tables before each layer have."""
        if self.memory is None:
            return {}
        return {f"layer {layer}": n_rows for layer, n_rows in self.memory.addresses.n_rows.items()}

    def describe(self) -> str:
        """Return what learns, in words."""
        parts = [f"{n_rows} rows before {layer}" for layer, n_rows in self.rows().items()]
        if self.lora is not None:
            count = sum(name.endswith("lora_A.default.weight") for name, _ in self.parameters())
            parts.append(f"LoRA on {count} linear layers")
        return ", ".join(parts)

    def save(self, folder: Path, manifest: Manifest, record: MemoryRecord | None) -> None:
        """Write what learns to a new checkpoint, exactly."""
        if record is not None:
            self.write_memory(folder / _MEMORY, manifest, record)
        if self.lora is not None:
            self.write_lora(folder / _LORA)

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote.

        Raises:
            InputError: it is missing, or belongs to something else.
        """
        try:
            if self.memory is not None:
                self.memory.load_state_dict(Memory.read(open_memory(folder / _MEMORY)).state_dict())
            if self.lora is not None:
                with quiet_libraries():
                    report: Any = set_peft_model_state_dict(self.lora, load_file(folder / _LORA / LORA_WEIGHTS))
                if report.unexpected_keys:
                    raise ValueError(f"unknown weights {report.unexpected_keys[0]}")
        except Exception as error:
            reason = one_line(error)
            raise InputError(
                f"{folder}: does not fit the run: {reason}; delete this folder to go on from the one before, or begin "
                "anew with --force"
            ) from error

    def write_memory(
        self, path: Path, manifest: Manifest, record: MemoryRecord, *, dtype: str | None = None
    ) -> HashedMemory:
        """Write the memory to a file, replacing another one.

        Args:
            path: the file.
            manifest: what it belongs to.
            record: what it says of itself.
            dtype: how weights are stored; None means as they are.
        """
        if self.memory is None:
            raise InputError("there is no memory in this run")
        return write_memory(path, manifest, record, self._lookup, stored_tensors(self.memory, dtype), overwrite=True)

    def write_lora(self, folder: Path) -> None:
        """Write LoRA to a new folder, as PEFT does, without the model card."""
        with quiet_libraries():
            # Without the second argument PEFT asks the hub about the base model's vocabulary.
            self.lora.save_pretrained(folder, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)


def count_table_values(settings: TrainSettings) -> int:
    """Return about how many values all tables of a memory have; the true number is slightly higher."""
    heads = sum(settings.engram_vocab_size) * settings.n_head_per_ngram * len(settings.layer_ids)
    return heads * (settings.n_embed_per_ngram // settings.n_head_per_ngram)


def _add_lora(base: Any, settings: TrainSettings) -> PeftModel:
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",  # all but the output layer
        task_type="CAUSAL_LM",
    )
    with quiet_libraries():
        return get_peft_model(base, config)


def _make_memory(
    settings: TrainSettings, lookup: npt.NDArray[np.int32], pad_id: int, width: int, *, sparse: bool
) -> Memory:
    shape = settings.memory_settings(pad_id)

    def make_table(_: int, n_rows: int) -> nn.Module:
        return Table(n_rows, shape.head_width, sparse=sparse)

    memory = Memory(shape, lookup, width, make_table)
    layers: Any = memory.layers.values()
    for layer in layers:
        table = layer.multi_head_embedding.embedding.weight
        nn.init.normal_(table, std=settings.init_std)
        table.requires_grad_(not settings.freeze_tables)
        # Nothing is added at first: training begins at the base model.
        nn.init.zeros_(layer.value_proj.weight)
        if layer.value_proj.bias is not None:
            nn.init.zeros_(layer.value_proj.bias)
    return memory
