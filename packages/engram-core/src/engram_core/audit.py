"""Interference audit: which text fires a concept that should not, and which concepts meet in one trigger."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import numpy as np

from engram_core.adapter import Adapter
from engram_core.errors import InputError
from engram_core.matcher import Matcher, Matches
from engram_core.registry import Ngram
from engram_core.tokenizer import StreamTokenizer

_BATCH = 512  # lines matched together


@dataclass(frozen=True, slots=True, kw_only=True)
class Firing:
    """One concept firing in one line, in one stream.

    Attributes:
        line: number of the line, from 1.
        text: the line.
        stream: where it fires.
        concept: name of the concept.
        ids: the line's token ids.
        spans: (start, stop) token ranges that fire, merged where they touch.
    """

    line: int
    text: str
    stream: str
    concept: str
    ids: Ngram
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Interference:
    """A concept whose address occurs inside another concept's trigger.

    Attributes:
        stream: where.
        concept: the concept that could fire.
        inside: the concept whose trigger contains the address.
        ids: the address.
        resolved: true when anchored activation settles it (the longer trigger wins); false when both fire.
    """

    stream: str
    concept: str
    inside: str
    ids: Ngram
    resolved: bool


def audit_lines(adapter: Adapter, tokenizers: Mapping[str, StreamTokenizer], lines: Iterable[str]) -> Iterator[Firing]:
    """Report every line that would fire, and the spans at fault, in one pass over the lines.

    Args:
        adapter: the concepts.
        tokenizers: a tokenizer for each of the adapter's streams.
        lines: any text, one prompt a line; read lazily.

    Raises:
        InputError: a tokenizer is missing or is not the one the adapter was made with.
    """
    check_tokenizers(adapter, tokenizers)
    matchers = {stream: Matcher(adapter, stream) for stream in adapter.streams}
    numbered = enumerate(lines, start=1)
    while batch := list(islice(numbered, _BATCH)):
        firings = []
        for stream, matcher in matchers.items():
            ids = [list(tokenizers[stream].encode(text)) for _, text in batch]
            matches = matcher.match(ids)
            for row, concept, spans in fired_spans(matches):
                number, text = batch[row]
                name = adapter.record(concept).name
                firings.append(
                    Firing(line=number, text=text, stream=stream, concept=name, ids=tuple(ids[row]), spans=spans)
                )
        yield from sorted(firings, key=lambda firing: (firing.line, firing.concept, firing.stream))


def fired_spans(matches: Matches) -> list[tuple[int, int, tuple[tuple[int, int], ...]]]:
    """Return (row, concept, merged token ranges) for everything that fires."""
    ranges: dict[tuple[int, int], list[tuple[int, int]]] = {}
    order = np.lexsort((matches.start, matches.concept, matches.row))
    columns = (column[order].tolist() for column in (matches.row, matches.concept, matches.start, matches.length))
    for row, concept, start, length in zip(*columns, strict=True):
        spans = ranges.setdefault((row, concept), [])
        if spans and start <= spans[-1][1]:
            spans[-1] = (spans[-1][0], max(spans[-1][1], start + length))
        else:
            spans.append((start, start + length))
    return [(row, concept, tuple(spans)) for (row, concept), spans in ranges.items()]


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReading:
    """What one stream makes of a prompt.

    Attributes:
        ids: token ids of the whole prompt, special tokens left out.
        n_read: how many of them the encoder reads; the rest is cut off.
        fired: (concept, merged token ranges) of what fires within them.
    """

    ids: Ngram
    n_read: int
    fired: tuple[tuple[str, tuple[tuple[int, int], ...]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentTrigger:
    """A trigger that stands in a prompt as text but does not fire in a stream, or not everywhere; and why."""

    concept: str
    stream: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptReport:
    """What a prompt does: per stream its reading, and the triggers that stay silent."""

    prompt: str
    streams: Mapping[str, StreamReading]
    silent: tuple[SilentTrigger, ...]


class PromptAudit:
    """Tells for each prompt what fires, and which triggers stand in it as text without firing."""

    def __init__(
        self, adapter: Adapter, tokenizers: Mapping[str, StreamTokenizer], streams: Collection[str] | None = None
    ) -> None:
        """Index an adapter.

        Args:
            adapter: its concepts.
            tokenizers: by stream.
            streams: look at these alone; None means all of the adapter's.

        Raises:
            InputError: a tokenizer is missing or is not the one the adapter was made with.
        """
        check_tokenizers(adapter, tokenizers, streams)
        self._adapter, self._tokenizers = adapter, tokenizers
        chosen = [stream for stream in adapter.streams if streams is None or stream in streams]
        self._matchers = {stream: Matcher(adapter, stream) for stream in chosen}
        self._triggers = [_plain(record.trigger) for record in adapter.records()]

    def show(self, stream: str, ids: Ngram) -> list[str]:
        """Return a stream's token ids as one short string each, for people."""
        return self._tokenizers[stream].show(ids)

    def examine(self, prompt: str) -> PromptReport:
        """Return what one prompt does."""
        streams: dict[str, StreamReading] = {}
        text = _plain(prompt)
        present = [index for index, trigger in enumerate(self._triggers) if _stands_in(trigger, text)]
        silent = []
        for stream, matcher in self._matchers.items():
            tokenizer = self._tokenizers[stream]
            ids = tuple(int(i) for i in tokenizer.encode(prompt))
            n_read = len(ids) if tokenizer.max_tokens is None else min(len(ids), tokenizer.max_tokens)
            fired = {concept: spans for _, concept, spans in fired_spans(matcher.match(ids[:n_read]))}
            streams[stream] = StreamReading(
                ids=ids,
                n_read=n_read,
                fired=tuple((self._adapter.record(concept).name, spans) for concept, spans in fired.items()),
            )
            for concept in present:
                rows = self._adapter.streams[stream].trigger_rows(concept)
                if rows.start == rows.stop:
                    continue  # the concept has no memory in this stream
                reason = _explain(matcher, ids, n_read, concept, fires=concept in fired)
                if reason:
                    name = self._adapter.record(concept).name
                    silent.append(SilentTrigger(concept=name, stream=stream, reason=reason))
        return PromptReport(prompt=prompt, streams=streams, silent=tuple(silent))


def _explain(matcher: Matcher, ids: Ngram, n_read: int, concept: int, *, fires: bool) -> str | None:
    """Return why a trigger that stands in a prompt does not fire, or None when all of it does."""
    if fires and n_read == len(ids):
        return None
    _, start, length, owner = matcher.find_addresses(ids)
    start, stop = start[owner == concept], (start + length)[owner == concept]
    cut = stop > n_read
    if cut.any():
        first, last = int(start[cut].min()) + 1, int(stop[cut].max())
        return f"it is cut off: it stands at tokens {first} to {last}, the encoder reads {n_read}"
    if fires:
        return None
    if not start.size:
        return "the tokenizer cuts it here into tokens that are not registered"
    return "a trigger that begins earlier, or is longer, covers it"


def _stands_in(trigger: str, text: str) -> bool:
    """Tell whether a trigger stands in a text as words of its own, not as part of a longer word."""
    at = text.find(trigger)
    while at >= 0:
        before, after = text[at - 1 : at], text[at + len(trigger) : at + len(trigger) + 1]
        if not (before.isalnum() and trigger[0].isalnum()) and not (after.isalnum() and trigger[-1].isalnum()):
            return True
        at = text.find(trigger, at + 1)
    return False


def _plain(text: str) -> str:
    """Return text as people compare it: case and runs of white space do not matter."""
    return " ".join(text.casefold().split())


def find_interference(adapter: Adapter) -> list[Interference]:
    """Return every address of one concept that occurs inside the trigger of another."""
    found = []
    anchored = adapter.anchored()
    for stream, table in adapter.streams.items():
        matcher = Matcher(adapter, stream)
        triggers = table.triggers(slice(0, len(table.trigger_concept)))
        columns = (column.tolist() for column in matcher.find_addresses(triggers))
        pairs: dict[tuple[int, int, Ngram], bool] = {}
        for row, start, length, concept in zip(*columns, strict=True):
            owner = int(table.trigger_concept[row])
            if owner != concept:
                ids = triggers[row][start : start + length]
                longer_wins = anchored[owner] and anchored[concept] and length < len(triggers[row])
                # The address may be a whole variant of the owner's trigger as well as part of another.
                pairs[concept, owner, ids] = bool(longer_wins) and pairs.get((concept, owner, ids), True)
        found += [
            Interference(
                stream=stream,
                concept=adapter.record(concept).name,
                inside=adapter.record(owner).name,
                ids=ids,
                resolved=resolved,
            )
            for (concept, owner, ids), resolved in sorted(pairs.items())
        ]
    return found


def check_tokenizers(
    adapter: Adapter, tokenizers: Mapping[str, StreamTokenizer], streams: Collection[str] | None = None
) -> None:
    """Check that every stream has the tokenizer it was made with.

    Args:
        adapter: its manifest tells.
        tokenizers: by stream.
        streams: check these alone; None means all of the adapter's.

    Raises:
        InputError: naming the stream and both tokenizers.
    """
    for stream, spec in adapter.manifest.streams.items():
        if streams is not None and stream not in streams:
            continue
        if stream not in tokenizers:
            raise InputError(f"{adapter.label}: stream {stream!r} needs its tokenizer ({spec.tokenizer.class_name})")
        one, other = spec.tokenizer, tokenizers[stream].spec
        if one.fingerprint != other.fingerprint:
            raise InputError(
                f"{adapter.label}: stream {stream!r} was made with the tokenizer {one.class_name} "
                f"{one.fingerprint[:12]} of {one.vocab_size} ids, this one is {other.class_name} "
                f"{other.fingerprint[:12]} of {other.vocab_size}; use the tokenizer of {adapter.manifest.base_model}"
            )
