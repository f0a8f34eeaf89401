"""What fired in the rows of a text encoder's states, found again by whoever reads those states later.

A denoiser gets states, not words. Pipelines repeat rows, put them beside those of other prompts and encoders, cut
padding off and change their number type, but leave their values as they are: the bytes of a row tell what fired in it.
Shapes: B rows, L positions, d width.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engram_core import Matches
from engram_core.residual import Edit, Editor
from engram_core.torch import mean_norm

__all__ = ["FiredRow", "FiredRows"]

_KEPT = 1 << 14  # rows; a few kilobytes each
_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # what pipelines turn states into


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FiredRow:
    """What fired in one row.

    Attributes:
        edit: of a batch of this row alone.
        rho: float32 [1], the mean norm of its states, where a relative rule needs it.
    """

    edit: Edit
    rho: npt.NDArray[np.float32] | None


class FiredRows:
    """Remembers rows in which something fired, the latest 16,384."""

    def __init__(self) -> None:
        """Begin with none."""
        self._rows: OrderedDict[tuple[int, bytes], FiredRow] = OrderedDict()
        self._lock = threading.Lock()

    def remember(
        self,
        hidden: Tensor,
        matches: Matches,
        editor: Editor,
        strength: float | Mapping[str, float],
        lengths: Tensor | None,
    ) -> bool:
        """Remember the rows of some states in which something fires, and return whether there are any.

        Args:
            hidden: frozen states [B, L, d].
            matches: what fires in them.
            editor: of the stream.
            strength: one factor, or concept name to factor.
            lengths: integers [B], positions that the denoiser reads; None means all.

        Raises:
            InputError, AdapterFormatError: as `Editor.prepare`.
        """
        any_fires = False
        for row in np.unique(matches.row).tolist():
            states = hidden[row : row + 1]
            length = states.shape[1] if lengths is None else int(lengths[row])
            edit = editor.prepare(states.shape, matches.of_row(row), strength)
            keys = {(length, _digest(states[0, :length].to(dtype), [length])[0]) for dtype in (hidden.dtype, *_TYPES)}
            if edit is None:  # strength 0, and perhaps another one before
                with self._lock:
                    for key in keys:
                        self._rows.pop(key, None)
                continue
            rho = None
            if edit.relative.any():
                rho = mean_norm(states, None if lengths is None else lengths[row : row + 1]).cpu().numpy()
            fired, any_fires = FiredRow(edit=edit, rho=rho), True
            with self._lock:
                for key in keys:
                    self._rows[key] = fired
                    self._rows.move_to_end(key)
                while len(self._rows) > _KEPT * len(_TYPES):
                    self._rows.popitem(last=False)
        return any_fires

    def find(self, states: Tensor) -> list[tuple[int, FiredRow]]:
        """Return which rows of some states are remembered, and what fired in each.

        Args:
            states: [B, L, d]; what follows a row's own positions does not count.
        """
        with self._lock:
            known = dict(self._rows)
        lengths = sorted({length for length, _ in known if length <= states.shape[1]})
        found = []
        for row in range(len(states) if lengths else 0):
            keys = zip(lengths, _digest(states[row], lengths), strict=True)
            # The longest: a prompt's states may begin as a shorter one's do.
            hits = [known[key] for key in keys if key in known]
            if hits:
                found.append((row, hits[-1]))
        return found


def _digest(states: Tensor, lengths: Sequence[int]) -> list[bytes]:
    """Return digests of the first positions of a row [L, d], for ascending lengths."""
    data: npt.NDArray[Any] = states.detach()[: lengths[-1]].contiguous().cpu().view(torch.uint8).numpy()
    digest, digests, first = hashlib.blake2b(str(states.dtype).encode(), digest_size=16), [], 0
    for length in lengths:
        digest.update(data[first:length].tobytes())
        digests.append(digest.digest())
        first = length
    return digests
