"""From a trigger phrase to the token n-grams that address its memory, in one stream.

The registration rule is the published one (Tiny-Engram report, section 2.4): every contiguous span of 2..N
tokens, and the whole trigger when it is longer than N. On top of it the trigger is tokenised in many
contexts, because tokenizers cut a phrase differently after a space, a quote or in another case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engram_core.errors import InputError, TriggerError
from engram_core.tokenizer import StreamTokenizer

Ngram = tuple[int, ...]

DEFAULT_MAX_NGRAM = 7

CONTEXTS: tuple[tuple[str, str], ...] = (
    ("", ""),
    ("a photo of ", ""),
    ("", " in the snow"),
    ("a photo of ", " in the snow"),
    ("a photo of ", ", in the snow"),
    ("a photo of ", ". It snows"),
    ("a photo of ", "; it snows"),
    ("a photo of ", ": a portrait"),
    ("a photo of ", "! In the snow"),
    ("a photo of ", "?"),
    ("a photo of ", "'s hat"),
    ("a photo of ", "-like hat"),
    ('a photo of "', '" in the snow'),
    ("a photo of “", "” in the snow"),
    ("a photo of '", "' in the snow"),
    ("a photo of ‘", "’ in the snow"),
    ("a photo of (", ") in the snow"),
    ("a photo of [", "] in the snow"),
    ("a photo of *", "* in the snow"),
    # At the start of a text some tokenizers melt the sign into the word, where after a space they do not.
    ('"', '" in the snow'),
    ("“", "” in the snow"),
    ("'", "' in the snow"),
    ("(", ":1.2) in the snow"),
    ("[", "] in the snow"),
    ("<", "> in the snow"),
    ("*", "* in the snow"),
    ("((", ":1.2))"),
    ("snow,", ",snow"),
    ("snow/", "/snow"),
    ("snow\n", "\nsnow"),
    ("snow—", "—snow"),
)
"""Text before and after the trigger under which its tokens are looked up."""

# Words to stand in for the trigger: comparing both texts shows which tokens belong to the context.
_FILLERS = ("mango", "Quartz", "zephyr7", "7up", "(ink)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way a tokenizer cuts the full trigger.

    Attributes:
        ids: the token ids.
        example: a text in which the trigger is cut this way; training shows the variant by using it.
    """

    ids: Ngram
    example: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SkippedContext:
    """A context in which the trigger will not fire, and why."""

    example: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Registry:
    """The addresses of one concept in one stream: V variants, K entries, P trainable vectors.

    Attributes:
        trigger: the phrase.
        variants: V token variants of the full trigger; the first is the trigger on its own.
        entries: K n-grams in canonical order (length, then ids), each once.
        slots: for each of the K entries the vector it uses, 0..P-1. Variants of equal length share
            vectors position by position; a variant of another length has vectors of its own.
        skipped: contexts in which the trigger is cut in a way that is not registered.
    """

    trigger: str
    variants: tuple[Variant, ...]
    entries: tuple[Ngram, ...]
    slots: tuple[int, ...]
    skipped: tuple[SkippedContext, ...]
    max_ngram: int

    @property
    def n_slots(self) -> int:
        """P, the number of vectors to train."""
        return 1 + max(self.slots, default=-1)

    def slots_of(self, variant: Variant) -> frozenset[int]:
        """Return the vectors that an occurrence of `variant` reads."""
        slot_of = dict(zip(self.entries, self.slots, strict=True))
        return frozenset(slot_of[span] for span in ngram_spans(variant.ids, self.max_ngram))

    def keep_trained(self, trained: Sequence[bool]) -> tuple[Registry, list[int]]:
        """Drop what training never visited: an entry that was never trained is never stored.

        Args:
            trained: P flags, true where the vector received a gradient.

        Returns:
            The registry of the variants whose vectors were all trained, and for each of its entries
            the index of the vector in the original numbering.

        Raises:
            InputError: the number of flags is not P, or no variant remains.
        """
        if len(trained) != self.n_slots:
            raise InputError(f"got {len(trained)} flags for {self.n_slots} vectors of trigger {self.trigger!r}")
        kept = [v for v in self.variants if all(trained[s] for s in self.slots_of(v))]
        if not kept:
            raise InputError(f"training visited no token variant of {self.trigger!r} in full; nothing can be stored")
        wanted = {span for v in kept for span in ngram_spans(v.ids, self.max_ngram)}
        pairs = [(e, s) for e, s in zip(self.entries, self.slots, strict=True) if e in wanted]
        used = sorted({s for _, s in pairs})
        renumber = {old: new for new, old in enumerate(used)}
        registry = replace(
            self,
            variants=tuple(kept),
            entries=tuple(e for e, _ in pairs),
            slots=tuple(renumber[s] for _, s in pairs),
        )
        return registry, [s for _, s in pairs]


def ngram_spans(ids: Ngram, max_ngram: int) -> list[Ngram]:
    """Return the spans registered for one token variant, by (length, start); repeats are kept.

    Spans have 2..min(T, N) tokens; the whole variant joins when T > N; a single token is its own span.
    """
    length = len(ids)
    if length == 1:
        return [ids]
    spans = [ids[i : i + n] for n in range(2, min(length, max_ngram) + 1) for i in range(length - n + 1)]
    if length > max_ngram:
        spans.append(ids)
    return spans


def build_registry(
    trigger: str,
    tokenizer: StreamTokenizer,
    *,
    max_ngram: int = DEFAULT_MAX_NGRAM,
    allow_single_token: bool = False,
    contexts: Sequence[tuple[str, str]] = CONTEXTS,
) -> Registry:
    """Register a trigger's token n-grams for one stream (report, section 2.4; docs/concepts.md).

    Args:
        trigger: the phrase a user will write in prompts.
        tokenizer: the stream's tokenizer.
        max_ngram: N, the longest span below the full trigger.
        allow_single_token: accept a trigger of one token, which fires wherever that token occurs.
        contexts: (text before, text after) pairs in which to look for further token variants.

    Raises:
        TriggerError: the trigger has no token, one token (on its own or, as written, in one of the contexts)
            without `allow_single_token`, a special token, or more tokens than the encoder reads.
        InputError: `max_ngram` below 2.
    """
    if max_ngram < 2:
        raise InputError(f"max_ngram is {max_ngram}; spans have at least 2 tokens")
    phrase = trigger.strip()
    primary = tuple(int(i) for i in tokenizer.encode(phrase)) if phrase else ()
    reason = _refusal(primary, tokenizer, allow_single_token)
    if reason:
        raise TriggerError(f"trigger {trigger!r} {reason}")

    found: dict[Ngram, str] = {primary: phrase}
    skipped: dict[str, str] = {}
    for form in dict.fromkeys((phrase, phrase.lower(), phrase.upper(), phrase.title())):
        for before, after in contexts:
            example = f"{before}{form}{after}"
            ids = _locate(before, form, after, tokenizer)
            if ids in found:
                continue
            reason = _refusal(ids, tokenizer, allow_single_token)
            if reason and form == phrase and len(ids) == 1:
                # Not a rare context to leave out: the phrase as written is an ordinary word here.
                raise TriggerError(f"trigger {trigger!r} as in {example!r} {reason}")
            if reason:
                skipped.setdefault(reason, example)
            else:
                found[ids] = example
    variants = tuple(Variant(ids=ids, example=example) for ids, example in found.items())
    slot_of = _share_slots([v.ids for v in variants], max_ngram)
    entries = tuple(sorted(slot_of, key=lambda ids: (len(ids), ids)))
    return Registry(
        trigger=phrase,
        variants=variants,
        entries=entries,
        slots=tuple(slot_of[e] for e in entries),
        skipped=tuple(SkippedContext(example=e, reason=r) for r, e in skipped.items()),
        max_ngram=max_ngram,
    )


def _refusal(ids: Ngram, tokenizer: StreamTokenizer, allow_single_token: bool) -> str | None:
    """Return why these ids cannot be a trigger, as the end of a sentence, or None."""
    name = tokenizer.spec.class_name
    if not ids:
        return f"gives no token with {name}; use a phrase with letters or digits"
    special = sorted(tokenizer.special_ids.intersection(ids))
    if special:
        shown = " ".join(tokenizer.show(special))
        return f"contains special tokens of {name} (ids {special}: {shown}); use plain words it knows"
    if len(ids) == 1 and not allow_single_token:
        return (
            f"is the single token {ids[0]} of {name} and would fire wherever that token occurs; "
            "use a longer, invented name, or allow single tokens explicitly"
        )
    if tokenizer.max_tokens is not None and len(ids) > tokenizer.max_tokens:
        return f"has {len(ids)} tokens with {name}, the encoder reads {tokenizer.max_tokens}; shorten it"
    return None


def _locate(before: str, phrase: str, after: str, tokenizer: StreamTokenizer) -> Ngram:
    """Return the tokens of `before + phrase + after` that hold any part of `phrase`.

    Needs nothing but an encode function. Tokens shared with the bare context, or with the same context
    around another word, cannot hold the phrase, provided that word begins and ends differently.
    A token that straddles the border (quote and first letter, say) counts as part of the variant.
    """
    encode = tokenizer.encode
    ids = [int(i) for i in encode(before + phrase + after)]
    start, stop = 0, len(ids)
    others = [list(encode(before + filler + after)) for filler in _FILLERS if _differs(filler, phrase)]
    if before:
        start = max(_common_prefix(ids, other) for other in [*others, encode(before.rstrip())])
    if after:
        stop -= max(_common_prefix(ids[::-1], other[::-1]) for other in others)
    return tuple(ids[start : max(start, stop)])


def _differs(filler: str, phrase: str) -> bool:
    return filler[0].casefold() != phrase[0].casefold() and filler[-1].casefold() != phrase[-1].casefold()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    length = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        length += 1
    return length


def _share_slots(variants: Sequence[Ngram], max_ngram: int) -> dict[Ngram, int]:
    """Return entry -> vector: shared by equal ids, and position by position among variants of equal length."""
    slot_of: dict[Ngram, int] = {}
    slot_at: dict[tuple[int, int], int] = {}  # (variant length, index of the span in it) -> vector
    n_slots = 0
    for ids in variants:
        for index, span in enumerate(ngram_spans(ids, max_ngram)):
            slot = slot_of.get(span, slot_at.get((len(ids), index)))
            if slot is None:
                slot, n_slots = n_slots, n_slots + 1
            slot_of.setdefault(span, slot)
            slot_at.setdefault((len(ids), index), slot)
    return slot_of
