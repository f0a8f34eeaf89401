"""The hook that edits a text encoder's states: attached to an unmodified module, detached without a trace.

One hook a module, however many pipelines and adapters use it. What is loaded is an immutable object that is
replaced as a whole, so a forward pass in another thread sees either the old or the new state.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram_core import Adapter, InputError, Matcher, Matches
from engram_core.torch import Residual, match_tensor
from engram_vision.families import PENULTIMATE, known_families
from engram_vision.recall import FiredRows

__all__ = ["TextEdit", "attach", "attached", "detach"]


@dataclass(frozen=True, slots=True, eq=False)
class TextEdit:
    """What is added to one encoder's states: one stream of an adapter, and how strongly.

    Attributes:
        adapter: the concepts.
        stream: the adapter's stream that belongs to the encoder.
        strength: one factor, or concept name to factor.
        site: which of the encoder's states is edited.
        reads_padding: whether the denoiser reads the states of padding, too.
        matcher, residual: prepared from these; see `TextEdit.of`.
        fired: where the denoiser's sites edit the states, and not the encoder: what they will have to know.
    """

    adapter: Adapter
    stream: str
    strength: float | Mapping[str, float]
    site: str
    reads_padding: bool
    matcher: Matcher
    residual: Residual
    fired: FiredRows | None

    @classmethod
    def of(cls, adapter: Adapter, stream: str, strength: float | Mapping[str, float] = 1.0) -> TextEdit:
        """Prepare one stream of an adapter."""
        site, family = adapter.manifest.streams[stream].site, known_families().get(adapter.manifest.backbone)
        reads_padding = family is None or family.streams[stream].reads_padding
        fired = None if adapter.manifest.streams[stream].sites is None else FiredRows()
        matcher, residual = Matcher(adapter, stream), Residual(adapter, stream)
        return cls(adapter, stream, strength, site, reads_padding, matcher, residual, fired)

    def with_strength(self, strength: float | Mapping[str, float]) -> TextEdit:
        """Return the same edit with another strength; nothing is prepared anew."""
        return replace(self, strength=strength)


@dataclass(slots=True, eq=False)
class _Attachment:
    edit: TextEdit
    handle: RemovableHandle


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_untraced: Callable[..., Any] | None = None  # made when first needed, because it loads the compiler


def attach(encoder: nn.Module, edit: TextEdit) -> None:
    """Edit an encoder's states from now on; replaces what was attached before."""
    global _untraced
    attachment = _attachments.get(encoder)
    if attachment is not None:
        attachment.edit = edit
        return
    if _untraced is None:
        apart: Any = torch.compiler.disable  # has no types
        _untraced = apart(_edit)
    _drop_copied_hook(encoder)
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


def _drop_copied_hook(encoder: nn.Module) -> None:
    """Remove the hook that a copy of an encoder took along: with it the copy's states would be edited twice."""
    for number in [number for number, hook in encoder._forward_hooks.items() if hook is _edit_output]:
        del encoder._forward_hooks[number]
        encoder._forward_hooks_with_kwargs.pop(number, None)


def _edit_output(encoder: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    """Leave what `torch.compile` traces, and edit."""
    return None if _untraced is None else _untraced(encoder, args, *rest)


def _edit(encoder: nn.Module, args: tuple[Any, ...], *rest: Any) -> Any:
    """Add the residual to the states at the site; returns None, and so the very same output, when nothing fires."""
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
    if edit.site == PENULTIMATE:
        return _edit_penultimate(edit, matches, output)
    mask = None if edit.reads_padding else kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
    return _edit_last(edit, matches, mask, kwargs, output)


def _apply(edit: TextEdit, hidden: Tensor, matches: Matches, lengths: Tensor | None) -> Tensor | None:
    """Return the edited states, or the very same ones where the denoiser's sites edit them; None when nothing fires."""
    if edit.fired is not None:
        return hidden if edit.fired.remember(hidden, matches, edit.residual.editor, edit.strength, lengths) else None
    edited = edit.residual.apply(hidden, matches, strength=edit.strength, lengths=lengths)
    return None if edited is hidden else edited


def _edit_last(edit: TextEdit, matches: Matches, mask: Tensor | None, kwargs: Mapping[str, Any], output: Any) -> Any:
    hidden = output[0]
    lengths = None if mask is None else mask.gt(0).sum(dim=-1)
    edited = _apply(edit, hidden, matches, lengths)
    if edited is None:
        return None
    if kwargs.get("output_hidden_states"):
        # A pipeline that asks for all states (clip_skip) reads another one than the memory was learned for.
        raise _other_state("last one")
    if edited is hidden:
        return None
    if isinstance(output, tuple):
        return (edited, *output[1:])
    return type(output)(**{**output, "last_hidden_state": edited})


def _edit_penultimate(edit: TextEdit, matches: Matches, output: Any) -> Any:
    is_tuple = isinstance(output, tuple)
    # In a plain tuple the attentions, [B, heads, L, L] each, may stand beside the states.
    found = (part for part in output if isinstance(part, tuple) and part[0].ndim == 3) if is_tuple else ()
    states = next(iter(found), None) if is_tuple else output.hidden_states
    if states is None:
        return None  # who asks for no hidden states reads none: pooled states are never edited
    edited = _apply(edit, states[-2], matches, None)
    if edited is None:
        return None
    replaced = _EditedStates((*states[:-2], edited, states[-1]))
    if is_tuple:
        return tuple(replaced if part is states else part for part in output)
    return type(output)(**{**output, "hidden_states": replaced})


class _EditedStates(tuple[Tensor, ...]):
    """All hidden states, of which the last but one is edited: reading another one would leave the memory out."""

    __slots__ = ()

    def __getitem__(self, index: SupportsIndex | slice) -> Any:
        if isinstance(index, slice) or range(len(self))[index] == len(self) - 2:
            return super().__getitem__(index)
        raise _other_state("last but one")


def _other_state(edited: str) -> InputError:
    return InputError(
        f"an engram fires, but the pipeline reads a hidden state other than the {edited} (clip_skip); "
        "leave clip_skip out, or unload the engrams"
    )
