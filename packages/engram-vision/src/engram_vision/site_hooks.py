"""The hooks that let each block of a denoiser read text states edited for it; detached without a trace.

The denoiser is asked once a pass what of the states it was given is edited, and every place that reads them then takes
its own. Where nothing is edited, every module gets the very same tensors as without hooks.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from engram_core.residual import Editor
from engram_core.torch import Delta
from engram_vision.families import Family
from engram_vision.recall import FiredRow, FiredRows
from engram_vision.sites import Corner, SiteEdits, find_places, join_deltas, project

__all__ = ["SiteReader", "StreamRecall", "attach_sites", "attached_sites", "detach_sites"]

_STATES = "encoder_hidden_states"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StreamRecall:
    """One stream whose residuals the sites read.

    Attributes:
        fired: the rows in which something fired.
        editor: makes their residuals.
    """

    fired: FiredRows
    editor: Editor


class SiteReader:
    """Knows what the sites of one denoiser read at the moment."""

    def __init__(
        self, family: Family, corners: Mapping[str, Corner], streams: Mapping[str, StreamRecall], *, first_site: int = 0
    ) -> None:
        """Prepare; what has fired is looked up when the denoiser is given states.

        Args:
            family: of the pipeline.
            corners: where each stream's states are.
            streams: of the adapter; without, sites read what is `given`.
            first_site: which of the adapter's sites is this denoiser's first.
        """
        self._family, self._corners, self._streams, self._first = family, corners, streams, first_site
        self._given: Mapping[str, Delta | None] | None = None
        self._given_edits: SiteEdits | None = None
        self._here = threading.local()
        self._last: tuple[weakref.ref[Tensor], int, SiteEdits | None] | None = None

    @contextlib.contextmanager
    def given(self, deltas: Mapping[str, Delta | None]) -> Iterator[None]:
        """Let the sites read these residuals, by stream, whatever fired: while a concept learns.

        What the last pass read stays known, because gradient checkpointing reads it again on the way back.
        """
        self._given = deltas
        try:
            yield
        finally:
            self._given = None

    def begin(self, denoiser: nn.Module, states: Tensor) -> None:
        """Find out what is edited of the states [B, L, D] that the denoiser is given."""
        if self._given is not None:
            self._given_edits = self._prepare(denoiser, states, self._given)
            return
        # Pipelines give the same tensor at every step.
        version = None if states.is_inference() else states._version
        last = self._last
        if version is not None and last is not None and last[0]() is states and last[1] == version:
            self._here.edits = last[2]
            return
        self._here.edits = self._prepare(denoiser, states, self._recall(states))
        if version is not None:
            self._last = weakref.ref(states), version, self._here.edits

    def read(self, states: Tensor, site: int) -> Tensor:
        """Return the states as a site of this denoiser reads them; the very same tensor where nothing is edited."""
        # A plain attribute in training: on the way back, other threads read it.
        edits = self._given_edits if not self._streams else getattr(self._here, "edits", None)
        return states if edits is None else edits.apply(states, self._first + site)

    def _recall(self, states: Tensor) -> dict[str, Delta | None]:
        found: dict[str, Delta | None] = {}
        for stream, recall in self._streams.items():
            rows = recall.fired.find(self._corners[stream].cut(states))
            found[stream] = _join_rows(recall.editor, rows) if rows else None
        return found

    def _prepare(self, denoiser: nn.Module, states: Tensor, deltas: Mapping[str, Delta | None]) -> SiteEdits | None:
        parts = [(delta, self._corners[stream]) for stream, delta in deltas.items() if delta is not None]
        return project(self._family, denoiser, states, join_deltas(parts, states.shape)) if parts else None


def attach_sites(family: Family, denoiser: nn.Module, reader: SiteReader) -> None:
    """Let the blocks of a denoiser read what a reader says; replaces what was attached before."""
    global _untraced_begin, _untraced_read
    if _untraced_begin is None:
        apart: Any = torch.compiler.disable  # has no types
        _untraced_begin, _untraced_read = apart(_begin), apart(_read)
    detach_sites(denoiser)
    _drop_copied_hooks(denoiser)
    places = list(find_places(family, denoiser).values())
    handles = [denoiser.register_forward_pre_hook(_begin_hook, with_kwargs=True)]
    handles += [place.register_forward_pre_hook(_read_hook, with_kwargs=True) for place in places]
    _attachments[denoiser] = _Attachment(reader, handles)
    for number, place in enumerate(places):
        _places[place] = reader, number
    _forget_compiled(denoiser)


def attached_sites(denoiser: nn.Module) -> SiteReader | None:
    """Return the reader that is attached to a denoiser."""
    attachment = _attachments.get(denoiser)
    return None if attachment is None else attachment.reader


def detach_sites(denoiser: nn.Module) -> None:
    """Restore a denoiser exactly; does nothing when nothing is attached."""
    attachment = _attachments.pop(denoiser, None)
    if attachment is None:
        return
    for handle in attachment.handles:
        handle.remove()
    for module in denoiser.modules():
        _places.pop(module, None)
    _forget_compiled(denoiser)


@dataclass(slots=True, eq=False)
class _Attachment:
    reader: SiteReader
    handles: list[RemovableHandle]


_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[nn.Module, tuple[SiteReader, int]] = weakref.WeakKeyDictionary()
_untraced_begin: Callable[..., Any] | None = None  # made when first needed, because it loads the compiler
_untraced_read: Callable[..., Any] | None = None


def _begin_hook(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Leave what `torch.compile` traces, and look up what is edited."""
    if _untraced_begin is not None:
        _untraced_begin(denoiser, args, kwargs)


def _read_hook(place: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leave what `torch.compile` traces, and edit."""
    return None if _untraced_read is None else _untraced_read(place, args, kwargs)


def _begin(denoiser: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    attachment = _attachments.get(denoiser)
    if attachment is None:
        return
    number = list(inspect.signature(type(denoiser).forward).parameters).index(_STATES) - 1
    states = kwargs[_STATES] if _STATES in kwargs else args[number]
    if isinstance(states, Tensor):
        attachment.reader.begin(denoiser, states)


def _read(place: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return arguments with edited states; None, and so the very same ones, where nothing is edited."""
    reader, site = _places.get(place, (None, 0))
    if reader is None:
        return None
    given = kwargs[_STATES] if _STATES in kwargs else args[1] if len(args) > 1 else None
    # An adapter for pictures as prompts puts its own states beside those of the text.
    states = given[0] if isinstance(given, tuple) else given
    if not isinstance(states, Tensor):
        return None
    edited: Any = reader.read(states, site)
    if edited is states:
        return None
    if isinstance(given, tuple):
        edited = (edited, *given[1:])
    if _STATES in kwargs:
        return args, {**kwargs, _STATES: edited}
    return (args[0], edited, *args[2:]), kwargs


def _drop_copied_hooks(denoiser: nn.Module) -> None:
    """Remove the hooks that a copy of a denoiser took along: with them a place would be edited twice."""
    for module in denoiser.modules():
        for number in [n for n, hook in module._forward_pre_hooks.items() if hook in (_begin_hook, _read_hook)]:
            del module._forward_pre_hooks[number]
            module._forward_pre_hooks_with_kwargs.pop(number, None)


def _forget_compiled(denoiser: nn.Module) -> None:
    """Let what was compiled of a denoiser be compiled anew: compiled code does not look for hooks that come or go."""
    if any(module._compiled_call_impl is not None for module in denoiser.modules()):
        torch.compiler.reset()


def _join_rows(editor: Editor, rows: Sequence[tuple[int, FiredRow]]) -> Delta:
    """Return the residuals of the rows in which something fired."""
    values = [editor.sum_up(fired.edit, fired.rho) for _, fired in rows]
    counts = [len(each) for each in values]
    return Delta(
        row=torch.tensor([row for row, _ in rows]).repeat_interleave(torch.tensor(counts)),
        position=torch.cat([torch.from_numpy(fired.edit.plan.position) for _, fired in rows]),
        values=torch.from_numpy(np.concatenate(values)),
    )
