"""Captions in which a trigger takes the place of a generic mention of the subject. Imports no torch.

A captioner writes "a man with a hat"; to learn who the man is, the caption must say "Zorbit Quell with a hat". What is
replaced is the mention alone, article and noun; what is said of the subject stays.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from engram_core import InputError
from engram_core.errors import quote
from engram_vision.caption_files import CaptionFolder, Form
from engram_vision.dataset import PLACEHOLDER, clean_trigger, contains_trigger, is_accent
from engram_vision.images import Note, ignore_note

__all__ = [
    "SUBJECTS",
    "NormalizeReport",
    "NormalizedCaption",
    "Status",
    "find_mentions",
    "normalize_caption",
    "normalize_folder",
]

_ARTICLES = ("a", "an", "the", "this")
# People, then characters, then creatures. Nouns that often stand before another noun ("a human hand", "a robot arm"),
# and those for what usually is in the background (a dog, a car), are left to the user.
_NOUNS = (
    *("man", "woman", "person", "boy", "girl", "child", "kid", "guy", "lady", "gentleman", "individual"),
    *("human being", "human figure", "character", "cartoon character", "animated character", "anime character"),
    *("fictional character", "main character", "protagonist", "figure", "humanoid", "subject"),
    *("creature", "being", "monster", "beast", "animal"),
)

SUBJECTS: tuple[str, ...] = (
    *(
        f"{article} {noun}"
        for noun in _NOUNS
        for article in _ARTICLES
        if article not in ("a", "an") or (article == "an") == (noun[0] in "aeiou")
    ),
    "someone",
    "somebody",
)
"""What captioners call a subject whose name they do not know: article (a, an, the, this) and noun, or a pronoun."""

# Before one of these the mention only says what kind of thing another thing is: a monster truck, a character sheet.
_HEADS = frozenset(
    (
        *("art", "artwork", "band", "bust", "cave", "concept", "costume", "design", "doll", "drawing", "eater"),
        *("eight", "else", "face", "figurine", "fur", "group", "hand", "head", "hunter", "illustration", "mask"),
        *("model", "portrait", "print", "scout", "sculpture", "shape", "sheet", "silhouette", "skater", "skating"),
        *("skeleton", "skin", "skull", "statue", "study", "suit", "tamer", "toy", "trainer", "trap", "truck"),
        *("turnaround", "wire"),
    )
)

Status = Literal["changed", "already", "none", "several"]
"""What became of a caption: it was changed; it had the trigger already; it mentions no subject, or several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizedCaption:
    """A caption before and after.

    Attributes:
        before: as it was.
        after: with the trigger in the place of a mention; as it was where nothing was replaced.
        status: what became of it.
        mentions: where the candidates stand in `before`, as (start, stop), from left to right. Where the caption was
            changed, the first was replaced.
    """

    before: str
    after: str
    status: Status
    mentions: tuple[tuple[int, int], ...] = ()

    @property
    def inserted(self) -> tuple[int, int] | None:
        """Where the trigger stands in `after`; None where nothing was replaced."""
        if self.status != "changed":
            return None
        start, stop = self.mentions[0]
        return start, stop + len(self.after) - len(self.before)


@dataclass(frozen=True, slots=True, kw_only=True)
class NormalizeReport:
    """What became of the captions of a folder.

    Attributes:
        form: how the captions are kept.
        captions: by the name of the picture or clip.
        written: the files that were written.
    """

    form: Form
    captions: Mapping[str, NormalizedCaption]
    written: tuple[Path, ...]

    def names(self, status: Status) -> list[str]:
        """Return the pictures and clips whose captions ended so."""
        return [name for name, caption in self.captions.items() if caption.status == status]


def find_mentions(caption: str, subjects: Sequence[str] = (), *, only_subjects: bool = False) -> list[tuple[int, int]]:
    """Return where a caption mentions its subject, as (start, stop), from left to right.

    Case and the width of white space do not matter. A mention consists of whole words; parts of hyphenated ones do not
    count ("a man-eating plant"). Of mentions that overlap, the leftmost counts, and of those the longest. One from
    `SUBJECTS` does not count where it only describes the next noun ("a monster truck").

    Args:
        caption: the text.
        subjects: further mentions. Where one of them occurs, those of `SUBJECTS` do not count. One that begins without
            an article takes an article before it along: "purple monster" finds "the purple monster" as a whole.
        only_subjects: look for no others.

    Raises:
        InputError: a subject holds neither letters nor digits, or `only_subjects` comes without any.
    """
    for subject in subjects:
        if not any(character.isalnum() for character in subject):
            raise InputError(f"a subject is {quote(subject)}; give the words that captions call it, e.g. 'a man'")
    if only_subjects and not subjects:
        raise InputError("only named subjects are wanted, and none is named; name them (--subject)")
    named = _leftmost_longest(place for subject in subjects for place in _places(caption, _pattern(subject)))
    if named or only_subjects:
        return named
    return [(start, stop) for start, stop in _places(caption, _generic()) if not _describes(caption, stop)]


def normalize_caption(
    caption: str, trigger: str, subjects: Sequence[str] = (), *, only_subjects: bool = False, first: bool = False
) -> NormalizedCaption:
    """Put a trigger into the place where a caption mentions its subject.

    A caption that holds the trigger (see `engram_vision.dataset.contains_trigger`) or `{trigger}` stays as it is, and
    so does one without any mention. One that mentions subjects in several places is left alone too, because nobody but
    the user knows which is meant.

    Args:
        caption: the text.
        trigger: the phrase; it is put in as it is written, at the beginning of a sentence too.
        subjects: further mentions, see `find_mentions`.
        only_subjects: look for no others.
        first: of several mentions take the first.

    Raises:
        InputError: the trigger is empty, or as `find_mentions` says.
    """
    phrase = clean_trigger(trigger)
    mentions = tuple(find_mentions(caption, subjects, only_subjects=only_subjects))
    status: Status
    if contains_trigger(caption, phrase) or PLACEHOLDER in caption:
        return NormalizedCaption(before=caption, after=caption, status="already")
    if not mentions or (len(mentions) > 1 and not first):
        status = "several" if mentions else "none"
        return NormalizedCaption(before=caption, after=caption, status=status, mentions=mentions)
    start, stop = mentions[0]
    after = caption[:start] + phrase + caption[stop:]
    return NormalizedCaption(before=caption, after=after, status="changed", mentions=mentions)


def normalize_folder(
    folder: Path,
    trigger: str,
    subjects: Sequence[str] = (),
    *,
    only_subjects: bool = False,
    first: bool = False,
    write: bool = False,
    note: Note = ignore_note,
) -> NormalizeReport:
    """Put a trigger into the captions of a folder, see `normalize_caption`.

    Args:
        folder: pictures or clips with captions of a form that training reads.
        trigger: the phrase.
        subjects: further mentions, see `find_mentions`.
        only_subjects: look for no others.
        first: of several mentions take the first.
        write: write the changed captions back, in their form; else nothing is written.
        note: told what the user should know though it is no error.

    Raises:
        InputError: the folder's captions cannot be read, or an argument is wrong.
        AdapterWriteError: a file cannot be written.
    """
    place = CaptionFolder(folder, note=note)
    captions = {
        name: normalize_caption(text, trigger, subjects, only_subjects=only_subjects, first=first)
        for name, text in place.captions.items()
    }
    changes = {name: caption.after for name, caption in captions.items() if caption.status == "changed"}
    written = place.write(changes) if write else []
    return NormalizeReport(form=place.form, captions=captions, written=tuple(written))


def _places(caption: str, pattern: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return where a pattern matches words of their own."""
    found = [match.span() for match in pattern.finditer(caption)]
    # An accent belongs to the letter before it, but is none of the characters that `\w` matches.
    return [
        (start, stop)
        for start, stop in found
        if not is_accent(caption[stop : stop + 1]) and not (start and is_accent(caption[start - 1]))
    ]


@lru_cache(maxsize=256)
def _pattern(subject: str) -> re.Pattern[str]:
    """Return what finds a named subject, with an article before it if it has none of its own."""
    words = subject.split()
    article = "" if words[0].lower() in _ARTICLES else rf"(?:(?:{'|'.join(_ARTICLES)})\s+)?"
    return _whole_words(article + _spell(words))


@lru_cache(maxsize=1)
def _generic() -> re.Pattern[str]:
    """Return what finds any of `SUBJECTS`; of two that begin alike the longer one comes first."""
    return _whole_words("|".join(_spell(subject.split()) for subject in sorted(SUBJECTS, key=len, reverse=True)))


def _whole_words(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?:{pattern})(?!\w|-\w)", re.IGNORECASE)


def _spell(words: Sequence[str]) -> str:
    return r"\s+".join("".join(map(_spellings, unicodedata.normalize("NFC", word))) for word in words)


def _spellings(character: str) -> str:
    """Return a pattern for a character, however Unicode spells its accents."""
    decomposed = unicodedata.normalize("NFD", character)
    return re.escape(character) if decomposed == character else f"(?:{re.escape(character)}|{re.escape(decomposed)})"


def _leftmost_longest(places: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return places without those that overlap one which begins before them, or begins there and is longer."""
    kept: list[tuple[int, int]] = []
    for start, stop in sorted(places, key=lambda place: (place[0], -place[1])):
        if not kept or start >= kept[-1][1]:
            kept.append((start, stop))
    return kept


def _describes(caption: str, stop: int) -> bool:
    """Tell whether a mention that ends at `stop` only describes the noun after it."""
    following = re.match(r"\s+(\w+)", caption[stop:])
    return following is not None and following[1].lower() in _HEADS
