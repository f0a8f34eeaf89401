"""What the arguments of a decoder say of its positions: padding, document borders, token ids that do not exist.

Shapes: B rows, T positions in the cache, L new positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from engram_core import InputError
from engram_llm.reading import find_previous, find_starts

__all__ = ["Layout", "read_layout"]


class Layout:
    """Where tokens stand.

    Attributes:
        valid: whether there is a token, bool [B, L]; None: everywhere.
        starts: whether a document begins after another one, bool [B, L]; None: nowhere.
    """

    __slots__ = ("starts", "valid")

    def __init__(self, valid: Tensor | None, starts: Tensor | None) -> None:
        """Keep them."""
        self.valid, self.starts = valid, starts


def read_layout(ids: Tensor, mask: Any, position_ids: Any, cache: Any, vocabulary: int) -> Layout:
    """Return where tokens stand among the new positions.

    A document begins where the position is not the one after that of the token before; with an attention mask, which
    tells the rest, where it does not rise. It begins as well where a square mask hides all that is before. One new
    token alone goes on with the text before it.

    Args:
        ids: token ids, [B, L].
        mask: attention mask as decoders of transformers take it: None, [B, T+L], [B, 1, L, T+L], or several of these
            by kind of layer.
        position_ids: [B, L] or [1, L]; None or other shapes tell nothing.
        cache: of keys and values, or None.
        vocabulary: token ids there are.

    Raises:
        InputError: an id is outside the vocabulary, the mask tells no padding, or it hides from a token the one before.
    """
    if isinstance(mask, Mapping):  # one for each kind of layer; all know the padding, this one hides nothing else
        mask = mask["full_attention"] if "full_attention" in mask else next(iter(mask.values()), None)
    length = ids.shape[1]
    before = 0 if cache is None else cache.get_seq_length()  # a tensor when the cache is static
    no = torch.zeros((), dtype=torch.bool, device=ids.device)
    valid, starts, broken = None, None, no
    if isinstance(mask, Tensor) and mask.ndim == 2:
        valid = _read_flat(ids, mask, before)
    elif length > 1 and mask is not None:
        valid, starts, broken = _read_square(ids, mask, before)
    if isinstance(position_ids, Tensor) and position_ids.ndim == 2 and length > 1:
        everywhere = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
        places = position_ids.to(ids.device).expand_as(ids)
        found = find_starts(everywhere, places, gaps=mask is None)
        starts = found if starts is None else starts | found
    if torch.compiler.is_compiling():
        return Layout(valid, starts)  # no look at values
    outside = ((ids < 0) | (ids >= vocabulary)).any()
    # One look for all: on a GPU each would wait.
    flags = (outside, broken, no if valid is None else ~valid.all(), no if starts is None else starts.any())
    unknown, branched, padded, packed = torch.stack(flags).tolist()
    if unknown:
        raise InputError(
            f"token ids reach from {int(ids.min())} to {int(ids.max())}; the memory's vocabulary has 0 to "
            f"{vocabulary - 1}"
        )
    if branched:
        raise InputError(
            "the attention mask hides from a token the one before it, but not all before: its n-grams cannot be known; "
            "a memory reads texts in one line, not in trees"
        )
    return Layout(valid if padded else None, starts if packed else None)


def _read_flat(ids: Tensor, mask: Tensor, before: int | Tensor) -> Tensor:
    """Return where there are tokens, bool [B, L]."""
    length, known = ids.shape[1], mask.shape[1]
    if isinstance(before, Tensor):
        places = (before.to(mask.device) + torch.arange(length, device=mask.device)).clamp_max(known - 1)
        return mask.index_select(1, places).to(ids.device, torch.bool)
    if known < before + length:
        raise InputError(
            f"the attention mask has length {known}, expected {before + length}: {before} positions in the cache and "
            f"{length} new ones"
        )
    return mask[:, before : before + length].to(ids.device, torch.bool)


def _read_square(ids: Tensor, mask: Any, before: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return where there are tokens, where documents begin, both bool [B, L], and whether texts branch."""
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        raise InputError(
            f"the attention mask is a {type(mask).__name__}, from which a memory cannot tell padding; pass one of "
            "shape [batch, length]"
        )
    seen = mask[:, 0].to(ids.device)
    if seen.dtype.is_floating_point:  # what is added to scores
        seen = seen > torch.finfo(seen.dtype).min / 2
    seen = seen.to(torch.bool).expand(ids.shape[0], -1, -1)
    length, width = ids.shape[1], seen.shape[2]
    before = torch.as_tensor(before, device=ids.device)
    # Where the new positions begin: sliding caches hold the newest, static ones have room for more.
    begin = before.clamp_max(width - length)
    own = begin + torch.arange(length, device=ids.device)
    # A token may always attend to itself, and padding never.
    valid = seen.gather(2, own.view(1, -1, 1).expand(ids.shape[0], -1, -1)).squeeze(2)
    previous = find_previous(valid)[:, :-1]
    follows = seen.gather(2, (begin + previous.clamp_min(0)).unsqueeze(2)).squeeze(2)
    alone = ~(seen & (torch.arange(width, device=ids.device) < own.unsqueeze(1))).any(2)
    starts = valid & alone & ((previous >= 0) | (before > 0))
    return valid, starts, (valid & (previous >= 0) & ~follows & ~alone).any()
