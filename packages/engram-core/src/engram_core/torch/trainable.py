"""A concept while it is trained: vectors and scales that learn, everything else frozen.

The arithmetic is the residual's own, so what training sees is what generation does, but for the last bits in which
NumPy and PyTorch round tanh and norms differently.
Shapes: B rows, L positions, d width, S sites, K entries, P trainable vectors (variants share them), U matched entries;
`...` is d, or S, d where the stream has sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from engram_core.adapter import Adapter
from engram_core.concept import Concept, ConceptRecord, ConceptStream
from engram_core.errors import InputError
from engram_core.manifest import Manifest, StreamSpec
from engram_core.matcher import Matcher
from engram_core.registry import Registry
from engram_core.residual import Editor
from engram_core.torch.residual import Delta, entry_terms, match_tensor, mean_norm, sum_terms

__all__ = ["TrainableConcept", "TrainableStream"]


class TrainableStream(nn.Module):
    """A concept's memory in one stream.

    Attributes:
        vectors: parameter float32 [P, ...].
        scales: parameter float32 [...].
        visited: bool [P] on the host, true for vectors that some call of this module used.
    """

    def __init__(self, record: ConceptRecord, registry: Registry, spec: StreamSpec, vectors: Tensor, scales: Tensor):
        """Begin with some values.

        Args:
            record: rule, overlap and activation count.
            registry: of the trigger in this stream.
            spec: width, site and tokenizer of the stream.
            vectors: float [P, ...].
            scales: float [...].

        Raises:
            InputError: shapes that do not fit the registry, the width and the sites.
        """
        super().__init__()
        if tuple(vectors.shape) != (registry.n_slots, *spec.shape) or tuple(scales.shape) != spec.shape:
            raise InputError(
                f"vectors {list(vectors.shape)} and scales {list(scales.shape)} do not fit {registry.n_slots} vectors "
                f"of shape {list(spec.shape)}"
            )
        self.vectors = nn.Parameter(vectors.detach().float().clone())
        self.scales = nn.Parameter(scales.detach().float().clone())
        self.visited = torch.zeros(registry.n_slots, dtype=torch.bool)
        self.registry = registry
        # Matching and the order of additions come from an adapter with the same addresses; its zeros are not used.
        blank = ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=np.zeros((len(registry.entries), *spec.shape), np.float32),
            scales=np.zeros(spec.shape, np.float32),
        )
        manifest = Manifest(backbone="training", base_model="training", streams={"stream": spec})
        adapter = Adapter.build(manifest, [Concept(record=replace(record, training={}), streams={"stream": blank})])
        self._matcher = Matcher(adapter, "stream")
        self._editor = Editor(adapter, "stream")
        self._slots = torch.tensor(registry.slots)

    def forward(self, hidden: Tensor, ids: Tensor, lengths: Tensor | None = None) -> Delta | None:
        """Return what is added to the states, for `add_delta`; differentiable in vectors and scales.

        None when nothing fires.

        Args:
            hidden: frozen states [B, L, d], any float type.
            ids: the token ids of the same positions, integers [B, L].
            lengths: integers [B], positions the generator reads, for the relative rule; None means all.
        """
        edit = self._editor.prepare(hidden.shape, match_tensor(self._matcher, ids), 1.0)
        if edit is None:
            return None
        slots = self._slots[torch.from_numpy(edit.entries)]
        self.visited[slots] = True
        device = self.vectors.device
        terms = entry_terms(
            self.vectors[slots.to(device)], self.scales.expand(len(slots), *self.scales.shape), edit.rules
        )
        terms = terms[torch.from_numpy(edit.which).to(device)]
        if edit.relative.any():
            rho = mean_norm(hidden, lengths).to(device)
            rho = rho[torch.from_numpy(edit.matches.row).to(device)]
            terms = terms * rho.view(-1, *(1,) * (terms.ndim - 1))
        return sum_terms(edit, terms)

    @torch.no_grad()
    def snapshot(self) -> ConceptStream:
        """Return the present memory without the variants that no call ever used.

        Raises:
            InputError: no variant was used in full.
        """
        registry, slots = self.registry.keep_trained(self.visited.tolist())
        return ConceptStream(
            triggers=tuple(variant.ids for variant in registry.variants),
            entries=registry.entries,
            vectors=self.vectors.detach().cpu()[slots].numpy(),
            scales=self.scales.detach().cpu().numpy().copy(),
        )


class TrainableConcept(nn.Module):
    """A concept in training: its streams by name."""

    streams: nn.ModuleDict

    def __init__(self, record: ConceptRecord, streams: Mapping[str, TrainableStream]):
        """Put the streams of a concept together."""
        super().__init__()
        self.record = record
        self.streams = nn.ModuleDict(streams)

    def forward(self, states: Mapping[str, tuple[Tensor, Tensor, Tensor | None]]) -> dict[str, Delta | None]:
        """Return what is added to the states of each stream, for `add_delta`; None where nothing fires.

        Args:
            states: stream to frozen states [B, L, d], token ids [B, L], and the positions that the generator reads [B];
                None means all.
        """
        return {name: self.streams[name](*parts) for name, parts in states.items()}

    def stream(self, name: str) -> TrainableStream:
        """Return one stream's memory."""
        stream = self.streams[name]
        if not isinstance(stream, TrainableStream):
            raise TypeError(f"stream {name!r} is a {type(stream).__name__}")
        return stream

    def snapshot(self, record: ConceptRecord | None = None) -> Concept:
        """Return the present memory as a concept, under another record if one is given.

        Raises:
            InputError: some stream was never used.
        """
        streams = {name: self.stream(name).snapshot() for name in self.streams}
        return Concept(record=record or self.record, streams=streams)
