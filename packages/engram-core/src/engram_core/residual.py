"""The residual that matched entries add to frozen text states: the NumPy reference (report, section 2.5).

Shapes: B rows, L positions, d width, S sites, M matches, G (concept, position) groups, P edited positions; `...` is d,
or S, d where the stream has sites.
All arithmetic is float32 in one canonical order, so the bits do not depend on what else is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_core.adapter import Adapter
from engram_core.concept import ConceptRecord, Rule, plain_name
from engram_core.errors import InputError, quote
from engram_core.matcher import Matches
from engram_core.storage import decode_vectors

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

_MAX_FACTOR = float(np.finfo(np.float32).max)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Plan:
    """How matches become residuals: which (match, position) pairs add up, and in which order.

    Sums run rank by rank: within one rank every target occurs once, so each rank is one vectorised
    addition and the order of float additions is fixed on every device.

    Attributes:
        match: int64 [Q], for each covered position of each match the match; grouped.
        group: int64 [Q], the (position, concept) group it adds to.
        match_ranks: bounds of the ranks within `match` and `group`.
        group_size: int64 [G], entries that cover the position.
        group_concept: int64 [G].
        group_position: int64 [G], index into the edited positions.
        group_order: int64 [G], groups in the order in which they add to their position.
        group_ranks: bounds of the ranks within `group_order`.
        row, position: int64 [P], the edited positions.
    """

    match: Ints
    group: Ints
    match_ranks: list[int]
    group_size: Ints
    group_concept: Ints
    group_position: Ints
    group_order: Ints
    group_ranks: list[int]
    row: Ints
    position: Ints


def plan_residual(matches: Matches, concepts: Sequence[int]) -> Plan:
    """Lay out the additions for some matches, in canonical order (position, concept, entry, start).

    Args:
        matches: what fires.
        concepts: the concepts that fire, in the order in which they add up.
    """
    numbers = np.array(concepts, np.int64)
    by_number = np.argsort(numbers)
    rank = by_number[np.searchsorted(numbers, matches.concept, sorter=by_number)]
    match = np.repeat(np.arange(len(matches)), matches.length)
    first = np.cumsum(matches.length) - matches.length
    position = matches.start[match] + np.arange(len(match)) - first[match]
    row, concept = matches.row[match], rank[match]
    order = np.lexsort((matches.start[match], matches.entry[match], concept, position, row))
    match, row, position, concept = match[order], row[order], position[order], concept[order]
    new_position = _changes(row, position)
    new_group = new_position | _changes(concept)
    group = np.cumsum(new_group) - 1
    heads = np.flatnonzero(new_group)
    group_position = (np.cumsum(new_position) - 1)[heads]
    by_rank, match_ranks = _by_rank(new_group)
    group_order, group_ranks = _by_rank(_changes(group_position))
    return Plan(
        match=match[by_rank],
        group=group[by_rank],
        match_ranks=match_ranks,
        group_size=np.diff(np.append(heads, len(match))),
        group_concept=numbers[concept[heads]],
        group_position=group_position,
        group_order=group_order,
        group_ranks=group_ranks,
        row=row[new_position],
        position=position[new_position],
    )


def mean_norm(hidden: npt.NDArray[Any], lengths: npt.ArrayLike | None = None) -> Floats:
    """Return rho: for each row the mean over positions of the L2 norm of the frozen states.

    Args:
        hidden: [B, L, d].
        lengths: int [B], how many positions the generator reads; None means all L, padding included.

    Returns:
        float32 [B].

    Raises:
        InputError: the lengths are not B integers in 1..L.
    """
    norms: Floats = np.sqrt(np.square(hidden, dtype=np.float32).sum(axis=-1, dtype=np.float32))
    counts = [norms.shape[1]] * len(norms) if lengths is None else check_lengths(lengths, norms.shape).tolist()
    return np.array([row[:count].mean() for row, count in zip(norms, counts, strict=True)], np.float32)


def check_lengths(lengths: npt.ArrayLike, shape: Sequence[int]) -> npt.NDArray[np.integer[Any]]:
    """Return the lengths of B rows of at most L positions as an array.

    Args:
        lengths: integers [B].
        shape: B and L.

    Raises:
        InputError: they are not B integers in 1..L.
    """
    counts = np.asarray(lengths)
    if counts.dtype.kind not in "iu" or counts.shape != (shape[0],):
        raise InputError(f"lengths are {counts.dtype} {list(counts.shape)}, expected integers [{shape[0]}]")
    if counts.size and not (counts.min() >= 1 and counts.max() <= shape[1]):
        raise InputError(f"lengths reach from {counts.min()} to {counts.max()}, outside 1..{shape[1]}")
    return counts


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Edit:
    """Everything but the numbers: which entries fire, under which rule, and how their residuals add up.

    Attributes:
        matches: what fires, without concepts of strength 0.
        plan: the additions.
        entries: int64 [U], the distinct entries.
        concepts: their concepts.
        rules: their rules.
        which: int64 [M], for each match its place among the distinct entries.
        relative: bool [M], matches under the relative rule.
        mean: bool [G], groups whose entries are averaged.
        strength: float32 [G], the strength of each group's concept.
    """

    matches: Matches
    plan: Plan
    entries: Ints
    concepts: list[int]
    rules: list[Rule]
    which: Ints
    relative: npt.NDArray[np.bool_]
    mean: npt.NDArray[np.bool_]
    strength: Floats


class Editor:
    """Prepares the edits of one stream; arithmetic in NumPy or PyTorch builds on it."""

    def __init__(self, adapter: Adapter, stream: str) -> None:
        """Take one stream of an adapter; nothing is read yet."""
        if stream not in adapter.streams:
            raise InputError(f"{adapter.label}: has no stream {stream!r}; it has {', '.join(adapter.streams)}")
        self.table = adapter.streams[stream]
        self.sites = adapter.manifest.streams[stream].sites
        self._adapter = adapter
        self._records: dict[int, ConceptRecord] = {}  # read when a concept first fires
        self._known_names: set[str] = set()

    def site_index(self, site: str | None) -> tuple[Any, ...]:
        """Return the index that picks a site's residuals out of all; without sites, of everything.

        Raises:
            InputError: the stream has no such site, or has sites and none was named.
        """
        if self.sites is None and site is None:
            return ()
        if site not in (self.sites or ()):
            known = "none" if self.sites is None else ", ".join(self.sites)
            raise InputError(f"{self._adapter.label}: site is {quote(site)}, the stream's sites are {known[:300]}")
        return slice(None), (self.sites or ()).index(site or "")

    def prepare(self, shape: Sequence[int], matches: Matches, strength: float | Mapping[str, float]) -> Edit | None:
        """Return the edit for states of a shape, or None when nothing fires.

        Raises:
            InputError: shape, matches or strength do not fit.
            ConceptNotFoundError: `strength` names a concept that the adapter lacks.
            AdapterFormatError: a concept that fires is malformed.
        """
        width = self.table.scales.shape[-1]
        if len(shape) != 3 or shape[2] != width:
            raise InputError(f"states have shape {list(shape)}, expected [B, L, {width}]")
        if isinstance(strength, Mapping):
            self._check_names(strength)
        factors = {c: self._strength(c, strength) for c in matches.concepts()}
        matches = drop_silent(matches, [c for c, factor in factors.items() if factor == 0.0])
        if not len(matches):
            return None
        if int((matches.start + matches.length).max()) > shape[1] or int(matches.row.max()) >= shape[0]:
            raise InputError(f"matches reach beyond the states {list(shape)}; match the ids of the same positions")
        # Not by number alone: a merge that marks a name moves its concept, and must not move its residual.
        fired = sorted(matches.concepts(), key=lambda c: (plain_name(self._record(c).name), c))
        plan = plan_residual(matches, fired)
        entries, which = np.unique(matches.entry, return_inverse=True)
        concepts = self.table.concept[entries].tolist()
        rules = [self._record(c).rule for c in concepts]
        groups = plan.group_concept.tolist()
        return Edit(
            matches=matches,
            plan=plan,
            entries=entries,
            concepts=concepts,
            rules=rules,
            which=which,
            relative=np.array([rule == "relative" for rule in rules])[which],
            mean=np.array([self._record(c).overlap == "mean" for c in groups]),
            strength=np.array([factors[c] for c in groups], np.float32),
        )

    def sum_up(self, edit: Edit, rho: Floats | None) -> Floats:
        """Return the residual of each edited position, float32 [P, ...].

        Args:
            edit: from `prepare`.
            rho: float32 [B], see `mean_norm`; needed where some entry is relative.
        """
        plan = edit.plan
        terms = self._terms(edit)[edit.which]
        if rho is not None:
            terms[edit.relative] *= _spread(rho[edit.matches.row[edit.relative]], terms)
        groups = np.zeros((len(plan.group_size), *terms.shape[1:]), np.float32)
        for low, high in pairwise(plan.match_ranks):
            groups[plan.group[low:high]] += terms[plan.match[low:high]]
        groups[edit.mean] /= _spread(plan.group_size[edit.mean], terms).astype(np.float32)
        groups *= _spread(edit.strength, terms)
        delta = np.zeros((len(plan.row), *terms.shape[1:]), np.float32)
        for low, high in pairwise(plan.group_ranks):
            chosen = plan.group_order[low:high]
            delta[plan.group_position[chosen]] += groups[chosen]
        return delta

    def _terms(self, edit: Edit) -> Floats:
        """Return the residual of each distinct entry, float32 [U, ...]; for the relative rule without rho."""
        vectors = decode_vectors(self.table.vectors[edit.entries], self.table.dtype).astype(np.float32)
        scales = self.table.scales[edit.concepts].astype(np.float32)
        rules = np.array(edit.rules)
        bounded = rules != "absolute"
        scales[bounded] = np.tanh(scales[bounded])
        relative = rules == "relative"
        norms = np.sqrt(np.square(vectors[relative]).sum(axis=-1, dtype=np.float32))
        vectors[relative] /= np.maximum(norms, np.float32(1e-12))[..., None]
        return vectors * scales

    def _record(self, concept: int) -> ConceptRecord:
        record = self._records.get(concept)
        if record is None:
            # The whole concept is read, because reading it checks it: no NaN of a bad file reaches the states.
            record = self._records[concept] = self._adapter.concept(concept).record
        return record

    def _strength(self, concept: int, strength: float | Mapping[str, float]) -> float:
        factor: Any = strength.get(self._record(concept).name, 1.0) if isinstance(strength, Mapping) else strength
        if not isinstance(factor, (int, float, np.integer, np.floating)) or not abs(factor) <= _MAX_FACTOR:
            name = self._record(concept).name
            raise InputError(f"strength of concept {name!r} is {quote(factor)}, expected a finite number")
        return float(factor)

    def _check_names(self, names: Iterable[str]) -> None:
        """Refuse names of no concept: a typo would silently change nothing."""
        for name in names:
            if name not in self._known_names:
                self._adapter.index(name)  # raises when there is none
                self._known_names.add(name)


class Residual:
    """Edits the states of one stream with an adapter's concepts: the reference every backend is tested against."""

    def __init__(self, adapter: Adapter, stream: str) -> None:
        """Prepare one stream of an adapter; vectors are read when they fire."""
        self._editor = Editor(adapter, stream)

    def apply(
        self,
        hidden: npt.NDArray[Any],
        matches: Matches,
        *,
        strength: float | Mapping[str, float] = 1.0,
        lengths: npt.ArrayLike | None = None,
        site: str | None = None,
    ) -> npt.NDArray[Any]:
        """Return the edited states, as one site reads them; the very same object when nothing fires.

        Args:
            hidden: frozen states [B, L, d], float32 or float16; never modified.
            matches: what fires, as given by the stream's matcher on the ids of the same positions.
            strength: one factor, or concept name to factor (1.0 for others); 0 is exactly the base model.
            lengths: int [B], positions the generator reads, for the relative rule; None means all.
            site: which of the stream's sites; None for a stream without.

        Raises:
            InputError: shapes, types, the strength or the site do not fit.
            AdapterFormatError: a concept that fires is malformed.
        """
        if hidden.dtype.kind != "f":
            raise InputError(f"states are {hidden.dtype}, expected floats")
        place = self._editor.site_index(site)
        edit = self._editor.prepare(hidden.shape, matches, strength)
        if edit is None:
            return hidden
        edited: npt.NDArray[Any] = hidden.copy()
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows becomes infinite, as in PyTorch
            rho = mean_norm(hidden, lengths) if edit.relative.any() else None
            delta = self._editor.sum_up(edit, rho)[place]
            edited[edit.plan.row, edit.plan.position] += delta.astype(hidden.dtype)
        return edited


def _spread(values: npt.NDArray[Any], over: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return one value a row so that it applies to all of the row."""
    return values.reshape(-1, *(1,) * (over.ndim - 1))


def drop_silent(matches: Matches, concepts: list[int]) -> Matches:
    """Return the matches without those of some concepts (those with strength 0)."""
    if not concepts:
        return matches
    keep = ~np.isin(matches.concept, concepts)
    shown = ~np.isin(matches.trigger_concept, concepts)
    return Matches(
        row=matches.row[keep],
        start=matches.start[keep],
        length=matches.length[keep],
        entry=matches.entry[keep],
        concept=matches.concept[keep],
        trigger_row=matches.trigger_row[shown],
        trigger_start=matches.trigger_start[shown],
        trigger_length=matches.trigger_length[shown],
        trigger_concept=matches.trigger_concept[shown],
    )


def _changes(*columns: Ints) -> npt.NDArray[np.bool_]:
    """Return where a row of sorted columns differs from the one before; the first always does."""
    changed = np.zeros(len(columns[0]), bool)
    changed[:1] = True
    for column in columns:
        changed[1:] |= column[1:] != column[:-1]
    return changed


def _by_rank(begins: npt.NDArray[np.bool_]) -> tuple[Ints, list[int]]:
    """Reorder items so that the first of every group comes first, then every second, and so on.

    Returns:
        The order, and the bounds of the ranks within it.
    """
    heads = np.flatnonzero(begins)
    rank = np.arange(len(begins)) - heads[np.cumsum(begins) - 1] if len(begins) else np.zeros(0, np.int64)
    order = np.argsort(rank, kind="stable")
    return order, [0, *np.cumsum(np.bincount(rank)).tolist()]
