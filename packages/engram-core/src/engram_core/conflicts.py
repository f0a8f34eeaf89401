"""Concepts that contradict each other: found before a merge, and settled the way the user chooses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from engram_core.adapter import Adapter
from engram_core.concept import MARK_DIGITS, NAME_MARK
from engram_core.errors import ConflictError, InputError
from engram_core.parts import Part, PartColumn, join_manifests, load_parts
from engram_core.registry import Ngram
from engram_core.trie import Trie

OnConflict = Literal["error", "keep-first", "keep-last", "both"]
ON_CONFLICT: tuple[OnConflict, ...] = ("error", "keep-first", "keep-last", "both")


class Member(NamedTuple):
    """One concept of one of the adapters being combined, by number."""

    part: int
    concept: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """Two different concepts that cannot simply live together.

    Attributes:
        kind: `trigger` (both own these trigger tokens), `span` (both own this n-gram and one of them fires
            on it anywhere) or `name` (both have the name, under different triggers; the mark that an
            earlier merge gave to one of them does not count).
        first, second: the concepts' names.
        first_label, second_label: the files they come from.
        stream: where they meet; empty for a name.
        ids: the shared token ids; empty for a name.
    """

    kind: Literal["trigger", "span", "name"]
    first: str
    second: str
    first_label: str
    second_label: str
    stream: str = ""
    ids: Ngram = ()

    def describe(self) -> str:
        """Return the conflict as one line."""
        what = (
            f"the name {min(self.first, self.second)!r}"
            if self.kind == "name"
            else f"the {self.kind} {list(self.ids)} of {self.stream}"
        )
        return f"{self.first!r} of {self.first_label} and {self.second!r} of {self.second_label} share {what}"


def find_conflicts(adapters: Sequence[Adapter]) -> list[Conflict]:
    """Return every pair of concepts of different adapters that a merge would have to settle.

    Concepts that are identical, name included, agree and are no conflict. Concepts that already live
    together in one of the adapters were settled before.

    Raises:
        IncompatibleAdaptersError: the adapters do not merge at all.
    """
    parts = load_parts(adapters)
    join_manifests(parts)
    return Pool(parts).conflicts()


class Pool:
    """All concepts of the adapters being combined; identical ones are one."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """Collect the concepts and drop repetitions."""
        self._parts = parts
        self._digests: dict[Member, str] = {}
        self._homes: dict[Member, set[int]] = {}  # the parts that hold the concept
        self._plain: dict[Member, str] = {}  # its name without the mark a merge gave it
        self._names: dict[Member, str] = {}  # the first of the names it has in them
        by_name: dict[str, list[Member]] = {}
        for number, part in enumerate(parts):
            for index, record in enumerate(part.records):
                member = Member(number, index)
                plain = self._plain_name(member)
                same = next((m for m in by_name.get(plain, ()) if self._identical(m, member)), None)
                if same is None:
                    by_name.setdefault(plain, []).append(member)
                    self._homes[member] = {number}
                    self._plain[member], self._names[member] = plain, record.name
                else:
                    self._homes[same].add(number)
                    self._names[same] = min(self._names[same], record.name)
        self._groups = self._shared_addresses()
        self._groups += [("name", "", (), members) for members in by_name.values() if len(members) > 1]

    @property
    def members(self) -> list[Member]:
        """Every distinct concept, in the order given."""
        return list(self._homes)

    def name(self, member: Member) -> str:
        """Return a concept's name."""
        return self._parts[member.part].records[member.concept].name

    def digest(self, member: Member) -> str:
        """Return a concept's digest; opens its file again."""
        if member not in self._digests:
            self._digests[member] = self._parts[member.part].adapter().concept(member.concept).digest()
        return self._digests[member]

    def conflicts(self) -> list[Conflict]:
        """Return every conflict, one for each pair of concepts, the strongest kind first."""
        found: dict[tuple[Member, Member], Conflict] = {}
        for kind, stream, ids, members in self._groups:
            for position, second in enumerate(members):
                for first in members[:position]:
                    if (first, second) in found or not self._opposed(kind, first, second):
                        continue
                    found[first, second] = Conflict(
                        kind=kind,
                        first=self.name(first),
                        second=self.name(second),
                        first_label=self._parts[first.part].label,
                        second_label=self._parts[second.part].label,
                        stream=stream,
                        ids=ids,
                    )
        return [found[pair] for pair in sorted(found)]

    def settle(self, on_conflict: OnConflict) -> dict[Member, str]:
        """Choose the concepts of the merge, and their names.

        Raises:
            ConflictError: there are conflicts and the choice is `error`; lists each.
            InputError: not a known choice.
        """
        if on_conflict not in ON_CONFLICT:
            raise InputError(f"on_conflict is {on_conflict!r}, expected one of {', '.join(ON_CONFLICT)}")
        if on_conflict == "error":
            conflicts = self.conflicts()
            if conflicts:
                lines = "".join(f"\n  {conflict.describe()}" for conflict in conflicts)
                raise ConflictError(
                    f"{len(conflicts)} conflicting pair{'s' * (len(conflicts) > 1)} of concepts; "
                    f"choose keep-first, keep-last or both (--on-conflict):{lines}",
                    conflicts,
                )
        members = self.members
        if on_conflict in ("keep-first", "keep-last"):
            members = self._keep(members if on_conflict == "keep-first" else members[::-1])
        return self._distinct_names(members)

    def _keep(self, members: Iterable[Member]) -> list[Member]:
        """Keep each concept that contradicts none kept before it."""
        touching: dict[Member, list[tuple[Literal["trigger", "span", "name"], list[Member]]]] = {}
        for kind, _, _, group in self._groups:
            for member in group:
                touching.setdefault(member, []).append((kind, group))
        kept: set[Member] = set()
        for member in members:
            rivals = (
                rival
                for kind, group in touching.get(member, ())
                for rival in group
                if rival in kept and self._opposed(kind, rival, member)
            )
            if next(rivals, None) is None:
                kept.add(member)
        return [member for member in self.members if member in kept]

    def _distinct_names(self, members: list[Member]) -> dict[Member, str]:
        """Name every concept; those that share a name all get a mark made of what they hold.

        A concept that carries its own mark counts under the name before it, so that the outcome is the
        same in whichever order, and in however many steps, concepts come together.
        """
        groups: dict[str, list[Member]] = {}
        for member in members:
            groups.setdefault(self._plain[member], []).append(member)
        names = {}
        for plain, group in groups.items():
            for member in group:
                names[member] = plain + self._mark(member) if len(group) > 1 else self._names[member]
        return {member: names[member] for member in members}

    def _plain_name(self, member: Member) -> str:
        name = self.name(member)
        plain, _, digits = name.rpartition(NAME_MARK)
        marked = plain and len(digits) == MARK_DIGITS and NAME_MARK + digits == self._mark(member)
        return plain if marked else name

    def _mark(self, member: Member) -> str:
        return NAME_MARK + self.digest(member)[:MARK_DIGITS]

    def _opposed(self, kind: str, first: Member, second: Member) -> bool:
        """Tell whether two concepts that share an address or a name contradict each other."""
        if first == second or self._homes[first] & self._homes[second]:
            return False
        if kind == "name":  # two that carry their marks already are told apart by them
            return any(self._names[member] == self._plain[member] for member in (first, second))
        return kind != "span" or "spans" in (self._activation(first), self._activation(second))

    def _activation(self, member: Member) -> str:
        return self._parts[member.part].records[member.concept].activation

    def _identical(self, one: Member, other: Member) -> bool:
        first, second = (self._parts[member.part].records[member.concept].parse() for member in (one, other))
        return first == replace(second, name=first.name) and self.digest(one) == self.digest(other)

    def _shared_addresses(self) -> list[tuple[Literal["trigger", "span", "name"], str, Ngram, list[Member]]]:
        """Return the n-grams that several concepts own: (kind, stream, ids, owners)."""
        groups: list[tuple[Literal["trigger", "span", "name"], str, Ngram, list[Member]]] = []
        any_spans = any(self._activation(member) == "spans" for member in self._homes)
        kinds: tuple[Literal["trigger", "span"], ...] = ("trigger", "span") if any_spans else ("trigger",)
        for kind in kinds:
            for stream in sorted({name for part in self._parts for name in part.streams}):
                columns = [
                    (
                        number,
                        part.streams[stream].triggers if kind == "trigger" else part.streams[stream].entries,
                    )
                    for number, part in enumerate(self._parts)
                    if stream in part.streams
                ]
                groups += [(kind, stream, ids, members) for ids, members in self._shared_rows(columns)]
        return groups

    def _shared_rows(self, columns: list[tuple[int, PartColumn]]) -> list[tuple[Ngram, list[Member]]]:
        sizes = [len(column.offsets) - 1 for _, column in columns]
        starts = np.cumsum([0, *sizes])
        shifts = np.cumsum([0, *(len(column.ids) for _, column in columns)])
        ids = np.concatenate([column.ids for _, column in columns])
        offsets = np.concatenate(
            [[0], *(c.offsets[1:] + shift for (_, c), shift in zip(columns, shifts, strict=False))]
        )
        shared = []
        for rows in Trie(ids, offsets).equal_patterns():
            owners = set()
            for row in rows:
                which = int(np.searchsorted(starts, row, side="right")) - 1
                number, column = columns[which]
                concept = int(np.searchsorted(column.bounds, row - starts[which], side="right")) - 1
                owners.add(Member(number, concept))
            members = sorted(owners & self._homes.keys())
            if len(members) > 1:
                shared.append((tuple(ids[offsets[rows[0]] : offsets[rows[0] + 1]].tolist()), members))
        return shared
