"""Where each position's earlier tokens lie: in plain text one beside the other; past padding and document borders else.

Shapes: B rows, T positions read before, L new positions, R tokens that a memory looks back, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PAD", "Neighbours", "Positions", "find_previous", "find_starts"]

PAD = -1
"""Stands for padding among compressed ids."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Positions:
    """What stands at a run of positions.

    Attributes:
        ids: compressed ids, `PAD` at padding, int64 [B, L].
        starts: whether a document begins after another one, bool [B, L].
        plain: whether there is certainly neither padding between tokens nor a document that begins after another.
    """

    ids: Tensor
    starts: Tensor
    plain: bool

    def __len__(self) -> int:
        """Return L."""
        return int(self.ids.shape[1])

    def then(self, newer: Positions) -> Positions:
        """Return these positions and the newer ones after them."""
        return Positions(
            ids=torch.cat((self.ids, newer.ids), dim=1),
            starts=torch.cat((self.starts, newer.starts), dim=1),
            plain=self.plain and newer.plain,
        )


class Neighbours:
    """Looks up what belongs to the tokens before each of the newest positions."""

    def __init__(self, positions: Positions, length: int, reach: int) -> None:
        """Find them.

        Args:
            positions: all T+L, the earlier ones first.
            length: L, the newest.
            reach: R.
        """
        self._length = length
        # [B, T+L+1] each: where the token 1, 2, ..., R before lies, also before a position after the end; -1 for none.
        plain = positions.plain or not len(positions)
        self._pointers: list[Tensor] | None = None if plain else _find_pointers(positions, reach)

    def before(self, values: Tensor, back: int, fill: int) -> Tensor:
        """Return the value that belongs to the token `back` before each new position.

        Args:
            values: of all positions, [B, T+L] or [B, T+L, C].
            back: how many tokens before, 1 to R.
            fill: where there is no such token.

        Returns:
            [B, L] or [B, L, C].
        """
        total, length = values.shape[1], self._length
        if self._pointers is not None:
            return _gather(values, self._pointers[back - 1][:, -length - 1 : -1], fill)
        begin = total - length - back
        return _pad_left(values[:, max(0, begin) : max(0, begin + length)], length, fill)

    def newest(self, values: Tensor, count: int, fill: int) -> Tensor:
        """Return the values of each row's newest tokens, the newest last: [B, count] or [B, count, C]."""
        if self._pointers is None:
            return _pad_left(values[:, max(0, values.shape[1] - count) :], count, fill)
        return _gather(values, torch.cat([pointer[:, -1:] for pointer in self._pointers[:count][::-1]], dim=1), fill)


def find_starts(valid: Tensor, position_ids: Tensor, *, gaps: bool) -> Tensor:
    """Return where a document begins after another one: where the position does not rise from that of the token before.

    Args:
        valid: whether there is a token, bool [B, L].
        position_ids: [B, L], restarting with each document.
        gaps: whether it begins as well where the position rises by more than one.

    Returns:
        bool [B, L].
    """
    previous = find_previous(valid)[:, :-1]
    earlier = position_ids.gather(1, previous.clamp_min(0))
    jumps = position_ids != earlier + 1 if gaps else position_ids <= earlier
    return (previous >= 0) & jumps


def _find_pointers(positions: Positions, reach: int) -> list[Tensor]:
    previous = find_previous(positions.ids >= 0)
    starts = torch.cat((positions.starts, torch.zeros_like(positions.starts[:, :1])), dim=1)
    previous = torch.where(starts, -1, previous)
    pointers = [previous]
    for _ in range(reach - 1):
        step = pointers[-1]
        pointers.append(torch.where(step >= 0, previous.gather(1, step.clamp_min(0)), -1))
    return pointers


def find_previous(valid: Tensor) -> Tensor:
    """Return the position of the token before each position and before one after the end, [B, L+1]; -1 for none."""
    positions = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    newest = torch.where(valid, positions, -1).cummax(1).values
    return torch.cat((newest.new_full((newest.shape[0], 1), -1), newest), dim=1)


def _gather(values: Tensor, where: Tensor, fill: int) -> Tensor:
    index, known = where.clamp_min(0), where >= 0
    if values.ndim == 3:
        index, known = index.unsqueeze(-1).expand(-1, -1, values.shape[2]), known.unsqueeze(-1)
    return torch.where(known, values.gather(1, index), fill)


def _pad_left(values: Tensor, length: int, fill: int) -> Tensor:
    missing = length - values.shape[1]
    if not missing:
        return values
    return torch.cat((values.new_full((values.shape[0], missing, *values.shape[2:]), fill), values), dim=1)
