"""The hook that edits a text encoder's states: attached to an unmodified module, detached without a trace.

One hook a module, however many pipelines and adapters use it. What is loaded is an immutable object that is
replaced as a whole, so a forward pass in another thread sees either the old or the new state.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram_core import Adapter, InputError, Matcher
from engram_core.torch import Residual, match_tensor

__all__ = ["TextEdit", "attach", "attached", "detach"]


@dataclass(frozen=True, slots=True, eq=False)
class TextEdit:
    """What is added to one encoder's states: one stream of an adapter, and how strongly.

    Attributes:
        adapter: the concepts.
        stream: the adapter's stream that belongs to the encoder.
        strength: one factor, or concept name to factor.
        matcher, residual: prepared from these; see `TextEdit.of`.
    """

    adapter: Adapter
    stream: str
    strength: float | Mapping[str, float]
    matcher: Matcher
    residual: Residual

    @classmethod
    def of(cls, adapter: Adapter, stream: str, strength: float | Mapping[str, float] = 1.0) -> TextEdit:
        """Prepare one stream of an adapter."""
        return cls(adapter, stream, strength, Matcher(adapter, stream), Residual(adapter, stream))


@dataclass(slots=True, eq=False)
class _Attachment:
    edit: TextEdit
    handle: RemovableHandle


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()


def attach(encoder: nn.Module, edit: TextEdit) -> None:
    """Edit an encoder's last hidden state from now on; replaces what was attached before."""
    attachment = _attachments.get(encoder)
    if attachment is not None:
        attachment.edit = edit
        return
    # The hook must not keep the encoder alive through the attachment, nor be found by names in the module.
    handle = encoder.register_forward_hook(_edit_output, with_kwargs=True)
    _attachments[encoder] = _Attachment(edit, handle)


def attached(encoder: nn.Module) -> TextEdit | None:
    """Return what is attached to an encoder."""
    attachment = _attachments.get(encoder)
    return None if attachment is None else attachment.edit


def detach(encoder: nn.Module) -> None:
    """Restore an encoder exactly; does nothing when nothing is attached."""
    attachment = _attachments.pop(encoder, None)
    if attachment is not None:
        attachment.handle.remove()


def _edit_output(encoder: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    """Add the residual to the last hidden state; returns None, and so the very same output, when nothing fires."""
    edit = attached(encoder)
    if edit is None or len(rest) < 2:
        # PyTorch leaves the keywords out while another thread is attaching or detaching: nothing is attached then.
        return None
    kwargs, output = rest
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor):
        return None
    matches = match_tensor(edit.matcher, ids.reshape(-1, ids.shape[-1]))
    if not len(matches):
        return None
    hidden = output[0]
    edited = edit.residual.apply(hidden, matches, strength=edit.strength)
    if edited is hidden:
        return None
    if kwargs.get("output_hidden_states"):
        # A pipeline that asks for all states (clip_skip) reads another one than the memory was learned for.
        raise InputError(
            "an engram fires, but the pipeline reads a hidden state other than the last one (clip_skip); "
            "leave clip_skip out, or unload the engrams"
        )
    if isinstance(output, tuple):
        return (edited, *output[1:])
    return type(output)(**{**output, "last_hidden_state": edited})
