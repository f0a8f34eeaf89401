"""Tables that stay in host memory or in the mapped file; only the rows of a pass come to the model's device.

The rows depend on token ids alone, so those of all layers are asked for before the first layer runs, and are read
by another thread while earlier layers compute.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engram_core import HashedMemory
from engram_core.memory import Stored

__all__ = ["HostTable", "as_stored", "copy_tensor"]

_TYPES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}

_FEWEST = 512  # rows below which reading takes less than asking a thread for it
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engram-table")


class HostTable(nn.Module):
    """All heads' rows of one layer, in host memory or in a mapped file.

    It holds no parameter: what a model moves, casts or saves leaves it alone.
    """

    def __init__(self, stored: Stored, device: torch.device, dtype: torch.dtype) -> None:
        """Keep a table.

        Args:
            stored: [rows, width], as it lies in a file.
            device: where rows are needed.
            dtype: in which type.
        """
        super().__init__()
        self._stored, self._device, self._dtype = stored, device, dtype

    def __deepcopy__(self, _: object) -> HostTable:
        return self  # a copy of a model reads the same rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def fetch(self, rows: Tensor) -> Future[Tensor]:
        """Begin to read rows, int64 [..., R]."""
        rows = rows.cpu()
        if rows.numel() < _FEWEST:
            ready: Future[Tensor] = Future()
            ready.set_result(self._read(rows))
            return ready
        return _reader.submit(self._read, rows)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, rows: Tensor | Future[Tensor]) -> Tensor:
        """Return the channels of rows, [..., R·width], on the device."""
        found = rows.result() if isinstance(rows, Future) else self._read(rows.cpu())
        return found.to(self._device, non_blocking=True).to(self._dtype)

    def _read(self, rows: Tensor) -> Tensor:
        dtype, values = self._stored
        # NumPy copies rows of a mapped file; PyTorch could map it only as if it were to be written to, which systems
        # refuse for files larger than memory.
        taken: npt.NDArray[Any] = np.take(values, rows.reshape(-1).numpy(), axis=0)
        found = _as_tensor(dtype, taken).reshape(*rows.shape[:-1], -1)
        return found.pin_memory() if self._device.type == "cuda" else found


def as_stored(values: Tensor) -> Stored:
    """Return a tensor on the host as it lies in a file."""
    bits = values.contiguous().view(torch.uint16) if values.dtype == torch.bfloat16 else values.contiguous()
    return _TYPES[values.dtype], bits.numpy()


def copy_tensor(source: HashedMemory, layer: int, name: str) -> Tensor:
    """Return a tensor of a file, read into memory."""
    dtype, stored = source.tensor(layer, name)
    return _as_tensor(dtype, np.array(stored))


def _as_tensor(dtype: str, stored: npt.NDArray[Any]) -> Tensor:
    values = torch.from_numpy(stored)
    return values.view(torch.bfloat16) if dtype == "bf16" else values
