"""One adapter's memory as a module: the compressed vocabulary, the addresses and the layers.

Its `state_dict` has the names of the file. Shapes: B rows, L positions, E channels retrieved, V token ids.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engram_core import HashedMemory, MemorySettings
from engram_core.memory import TABLE, Stored
from engram_llm.addresses import Addresses
from engram_llm.module import MemoryLayer, Table
from engram_llm.reading import PAD, Neighbours, Positions
from engram_llm.tables import HostTable, as_stored, copy_tensor

__all__ = ["Memory", "stored_tensors"]

_TYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Memory(nn.Module):
    """A hashed memory for all its layers.

    Attributes:
        settings: its shape.
        width: d of the model.
        layers: layer number, as text, to its memory.
        reach: R, how many tokens the memory looks back.
        key: under which caches keep its histories; a cache that another process stored has other keys.
    """

    lookup: Tensor

    def __init__(
        self,
        settings: MemorySettings,
        lookup: npt.NDArray[np.integer[Any]],
        width: int,
        make_table: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        """Make a memory that is to be trained or filled.

        Args:
            settings: its shape.
            lookup: token id to compressed id [V].
            width: d.
            make_table: returns the table of a layer with so many rows; None makes tables of zeros.
        """
        super().__init__()
        self.settings, self.width, self.key = settings, width, uuid.uuid4().hex
        ngrams = settings.hash_lookup(lookup)
        self.compressed_pad_id = ngrams.compressed_pad_id
        self.reach = max(settings.max_ngram_size - 1, (settings.kernel_size - 1) * settings.dilation)
        self.register_buffer("lookup", torch.from_numpy(lookup.astype(np.int64)), persistent=False)
        self.addresses = Addresses(ngrams)
        self.layers = nn.ModuleDict()
        for layer, n_rows in self.addresses.n_rows.items():
            table = make_table(layer, n_rows) if make_table else Table(n_rows, settings.head_width)
            self.layers[str(layer)] = MemoryLayer(settings, width, table)

    @classmethod
    def read(
        cls,
        source: HashedMemory,
        *,
        dtype: torch.dtype = torch.float32,
        host_tables: bool = False,
        device: torch.device | None = None,
    ) -> Memory:
        """Return the memory that a file holds, frozen.

        Args:
            source: the opened file.
            dtype: of all weights, and of what host tables give.
            host_tables: leave tables in the mapped file, whence rows are read when they are needed.
            device: of the weights; None means the CPU.

        Raises:
            AdapterFormatError: a tensor holds NaN or infinity. Tables that are left in the file are not looked through.
        """
        source.check(tables=not host_tables)
        device = device or torch.device("cpu")

        def make_table(layer: int, n_rows: int) -> nn.Module:
            if not host_tables:
                return Table(n_rows, source.settings.head_width)
            return HostTable(source.tensor(layer, TABLE), device, dtype)

        memory = cls(source.settings, source.lookup, source.width, make_table)
        weights = {
            f"layers.{layer}.{name}": copy_tensor(source, layer, name)
            for layer in source.settings.layer_ids
            for name in source.names()
            if not (host_tables and name == TABLE)
        }
        memory.load_state_dict(weights, assign=True)
        return memory.to(device, dtype).requires_grad_(False).eval()

    def compress(self, token_ids: Tensor) -> Tensor:
        """Return compressed ids of token ids, int64 of the same shape."""
        return self.lookup[token_ids]

    def retrieve(self, layer: int, rows: Tensor) -> Any:
        """Return what the layer's table takes for these rows; one on the host begins to read them."""
        table = self.layers[str(layer)].multi_head_embedding
        return table.fetch(rows) if isinstance(table, HostTable) else rows

    def rows(self, positions: Positions, neighbours: Neighbours, length: int) -> Mapping[int, Tensor]:
        """Return the table rows for the newest positions: layer to int64 [B, L, (N-1)·H]."""
        earlier = (neighbours.before(positions.ids, back, PAD) for back in range(1, self.settings.max_ngram_size))
        window = torch.stack((positions.ids[:, -length:], *earlier))
        found: Mapping[int, Tensor] = self.addresses(torch.where(window == PAD, self.compressed_pad_id, window))
        return found


def stored_tensors(memory: Memory, dtype: str | None = None) -> dict[int, Mapping[str, Stored]]:
    """Return a memory's weights as they are written to a file; see `engram_core.write_memory`.

    Args:
        memory: on any device.
        dtype: `f32`, `f16` or `bf16`; None means as they are.
    """
    tensors: dict[int, Mapping[str, Stored]] = {}
    for layer in memory.settings.layer_ids:
        group: dict[str, Stored] = {}
        for name, value in memory.layers[str(layer)].state_dict().items():
            group[name] = as_stored(value.detach().to("cpu", _TYPES[dtype] if dtype else value.dtype))
        tensors[layer] = group
    return tensors
