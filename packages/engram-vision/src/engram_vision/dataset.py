"""A folder of pictures with captions as training data. Importing this imports no torch.

What is said of pictures holds for clips too (`engram_video.dataset`). Captions are of one form, for all pictures of a
folder; `engram_vision.caption_files` says which there are.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_core import InputError
from engram_vision.caption_files import CaptionFolder
from engram_vision.caption_stores import Items, show_some
from engram_vision.images import SUFFIXES, Note, ignore_note, load_picture, show_path

__all__ = [
    "PLACEHOLDER",
    "CaptionedFile",
    "CaptionedImage",
    "caption_with",
    "clean_trigger",
    "contains_trigger",
    "is_accent",
    "put_trigger_first",
    "read_captions",
    "read_dataset",
]

PLACEHOLDER = "{trigger}"
"""What stands for the trigger in a caption."""

_PICTURES = Items(name="picture", plural="pictures", suffixes=SUFFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedFile:
    """A file and what it shows.

    Attributes:
        path: the file; nothing was read of it.
        caption: the text, with the trigger in it.
        extra: what else its line of `metadata.jsonl` says, as JSON has it.
    """

    path: Path
    caption: str
    extra: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedImage:
    """A picture and what it shows.

    Attributes:
        path: the file; it was decoded in full once.
        caption: the text, with the trigger in it.
    """

    path: Path
    caption: str


def read_dataset(
    folder: Path, trigger: str, *, insert_trigger: bool = False, note: Note = ignore_note
) -> list[CaptionedImage]:
    """Read and check the pictures and captions of a folder.

    `{trigger}` in a caption is replaced by the trigger, and white space at both ends is dropped; else captions stay as
    they are. Hidden files and files of other kinds are ignored.

    Args:
        folder: pictures with captions of one kind, see the module's documentation.
        trigger: the phrase that every caption must contain, see `contains_trigger`.
        insert_trigger: put the trigger in front of captions that lack it, and use it alone where a picture has no
            caption, instead of refusing them.
        note: told what the user should know though it is no error, one line each.

    Returns:
        At least one picture, in the order of the file names (by code point, so alike on every system).

    Raises:
        InputError: one line naming the file, the fact and the remedy.
    """
    files = read_captions(folder, trigger, _PICTURES, insert_trigger=insert_trigger, note=note)
    for file in files:
        load_picture(file.path)
    return [CaptionedImage(path=file.path, caption=file.caption) for file in files]


def read_captions(
    folder: Path, trigger: str, items: Items, *, insert_trigger: bool = False, note: Note = ignore_note
) -> list[CaptionedFile]:
    """Read and check the captions of a folder; what `read_dataset` does, but for opening the pictures.

    Args:
        folder: files with captions of one kind, see the module's documentation.
        trigger: as for `read_dataset`.
        items: what the files are.
        insert_trigger: as for `read_dataset`.
        note: as for `read_dataset`.

    Raises:
        InputError: as for `read_dataset`.
    """
    phrase = clean_trigger(trigger)
    place = CaptionFolder(folder, items, note=note)
    texts = {name: text.replace(PLACEHOLDER, phrase).strip() for name, text in place.captions.items()}
    if insert_trigger:
        texts = {name: put_trigger_first(text, phrase) for name, text in texts.items()}
    else:
        _expect_trigger(folder, texts, phrase)
    extras = place.extras
    files = [
        CaptionedFile(path=place.locate(name), caption=texts[name], extra=extras.get(name, {}))
        for name in sorted(texts)
    ]
    if len(files) == 1:
        note(f"{show_path(files[0].path)}: is the only {items.name}; with several the subject is learned more reliably")
    return files


def clean_trigger(trigger: str) -> str:
    """Return a trigger with single spaces between its words.

    Raises:
        InputError: there is nothing in it.
    """
    phrase = " ".join(trigger.split())
    if not phrase:
        raise InputError(f"the trigger is {trigger!r}; give the phrase that shall recall the subject")
    return phrase


def contains_trigger(caption: str, trigger: str) -> bool:
    """Tell whether a caption contains a trigger as words of its own.

    Case and the width of white space do not matter, nor does the way in which Unicode spells an accent. The characters
    before and after must not be letters, digits or accents.
    """
    return next(_occurrences(caption, trigger), None) is not None


def put_trigger_first(caption: str, trigger: str) -> str:
    """Return a caption that contains a trigger: the caption itself, or `TRIGGER, caption`, or the trigger alone."""
    if contains_trigger(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption else trigger


def caption_with(caption: str, trigger: str, replacement: str) -> str:
    """Return a caption with every occurrence of a trigger (see `contains_trigger`) replaced by another text."""
    pieces, end = [], 0
    for start, stop in _occurrences(caption, trigger):
        pieces += [caption[end:start], replacement]
        end = stop
    return "".join([*pieces, caption[end:]])


def _occurrences(text: str, trigger: str) -> Iterator[tuple[int, int]]:
    """Yield where a trigger stands in a text, as (start, stop), without overlap and from left to right."""
    wanted, _ = _fold(trigger.strip())
    folded, origin = _fold(text)
    # For each character, after a neutral one in front: does it belong to a word? An accent does with its letter.
    in_word = [False]
    for character in folded:
        in_word.append(character.isalnum() or (is_accent(character) and in_word[-1]))
    start = folded.find(wanted) if wanted else -1
    while start >= 0:
        stop = start + len(wanted)
        # One character may fold to several (ß to ss), of which a trigger cannot cover a part.
        is_whole = (start == 0 or origin[start - 1] < origin[start]) and origin[stop - 1] < origin[stop]
        is_ended = stop == len(folded) or not (folded[stop].isalnum() or is_accent(folded[stop]))
        if is_whole and is_ended and not in_word[start]:
            yield origin[start], origin[stop]
            start = folded.find(wanted, stop)
        else:
            start = folded.find(wanted, start + 1)


def is_accent(character: str) -> bool:
    """Return whether a character belongs to the one before it, as an accent written apart does."""
    return unicodedata.category(character).startswith("M") if character else False


def _fold(text: str) -> tuple[str, list[int]]:
    """Return text as it is compared, and for each of its characters, and for its end, the place in the original."""
    folded: list[str] = []
    origin: list[int] = []
    for place, character in enumerate(text):
        if not character.isspace():
            # Folding does more than lower-casing (of ß, say); decomposed, an accented letter has one spelling.
            new = unicodedata.normalize("NFD", character.casefold())
        else:
            new = "" if folded and folded[-1] == " " else " "
        folded += new
        origin += [place] * len(new)
    return "".join(folded), [*origin, len(text)]


def _expect_trigger(folder: Path, captions: Mapping[str, str], trigger: str) -> None:
    """Refuse pictures without caption and captions without trigger, all in one message."""
    bare = [name for name, text in sorted(captions.items()) if not text]
    lacking = [name for name, text in sorted(captions.items()) if text and not contains_trigger(text, trigger)]
    facts = [f"the trigger {trigger!r} is not in the caption of {show_some(lacking)}"] if lacking else []
    facts += [f"there is no caption for {show_some(bare)}"] if bare else []
    if facts:
        raise InputError(
            f"{show_path(folder)}: {', and '.join(facts)}; write captions with the trigger, or pass --insert-trigger "
            "to put it in front"
        )
