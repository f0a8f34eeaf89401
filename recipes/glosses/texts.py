"""Texts from synsets: as an entry of a dictionary or as a question with its answer, and what is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from recipes.glosses.synsets import Synset

DOMAIN = {5: "animals", 8: "bodies", 20: "plants", 27: "substances"}
"""The lexicographer files that the base never sees: what adapting to a domain is tried with."""

HELD_OUT = 0.02
"""Share of the general and of the domain's synsets that is for evaluation alone."""

# Qwen's form of a conversation (ChatML).
BEGIN, END = "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """All synsets, sorted by who may see them.

    Attributes:
        general: what the base and its tokenizer learn from.
        general_held_out: for evaluation alone.
        domain: of the held-out subjects, for those who adapt the base.
        domain_held_out: for evaluation alone.
    """

    general: tuple[Synset, ...]
    general_held_out: tuple[Synset, ...]
    domain: tuple[Synset, ...]
    domain_held_out: tuple[Synset, ...]


def divide(synsets: Iterable[Synset]) -> Corpus:
    """Sort synsets into general ones and the domain's, and hold out some of each by their glosses alone."""
    parts: dict[tuple[bool, bool], list[Synset]] = {}
    for synset in synsets:
        parts.setdefault((synset.file in DOMAIN, rank(synset) < HELD_OUT), []).append(synset)
    found = {key: tuple(part) for key, part in parts.items()}
    return Corpus(
        general=found.get((False, False), ()),
        general_held_out=found.get((False, True), ()),
        domain=found.get((True, False), ()),
        domain_held_out=found.get((True, True), ()),
    )


def rank(synset: Synset) -> float:
    """Return a number in [0, 1) that depends on the gloss alone, so that equal glosses fall on the same side."""
    digest = hashlib.sha256(synset.gloss.encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def sample(synsets: Sequence[Synset], count: int) -> list[Synset]:
    """Return some synsets, in their own order; always the same ones."""
    chosen = set(sorted(range(len(synsets)), key=lambda index: (rank(synsets[index]), index))[:count])
    return [synset for index, synset in enumerate(synsets) if index in chosen]


def write_entry(synset: Synset) -> str:
    """Return the synset as an entry of a dictionary: `WORD, WORD: gloss.`."""
    return f"{', '.join(synset.words)}: {_close(synset.gloss)}"


def write_answer(synset: Synset) -> str:
    """Return what a question for a word of the synset is answered with: the definition."""
    return _close(synset.definition)


def write_question(synset: Synset, word: int = 0, form: int = 0) -> str:
    """Return a question for a word of the synset.

    Args:
        synset: that answers it.
        word: index of the word.
        form: 0 asks what it is or means, 1 tells to define it.
    """
    name = synset.words[word]
    if form:
        return f"Define {name}."
    if synset.pos != "n":
        return f"What does {name} mean?"
    if name[:1].isupper():
        return f"What is {name}?"
    return f"What is {'an' if name[:1] in 'aeiou' else 'a'} {name}?"


def open_chat(question: str) -> str:
    """Return a conversation up to where the answer begins; the tokenizer's chat template gives the same."""
    return f"{BEGIN}user\n{question}{END}\n{BEGIN}assistant\n"


def write_chat(question: str, answer: str) -> str:
    """Return a conversation of a question and its answer; the tokenizer's chat template gives the same."""
    return f"{open_chat(question)}{answer}{END}\n"


def _close(text: str) -> str:
    return text if text.endswith((".", "!", "?", '"')) else text + "."
