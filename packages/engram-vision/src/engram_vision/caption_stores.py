"""Files that hold captions, of which the captions alone are changed, and not a byte besides. Imports no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engram_core import InputError
from engram_core.container import open_target, write_all
from engram_core.errors import quote
from engram_vision.images import show_path

__all__ = [
    "LARGEST_METADATA",
    "MAX_CAPTION",
    "SIDECAR",
    "Add",
    "CaptionFile",
    "Entry",
    "Items",
    "Metadata",
    "Sidecars",
    "Store",
    "check_caption",
    "scan_object",
    "show_some",
    "skip_blank",
]

MAX_CAPTION = 10_000
"""Most characters of a caption. Text encoders read a few hundred; a longer one is another file by mistake."""

SIDECAR = ".txt"
"""What the names of caption files beside pictures end in."""

_LARGEST_SIDECAR = 1 << 16  # bytes: more than the longest caption has
LARGEST_METADATA = 1 << 28  # bytes: some hundred thousand captions
_MARK = b"\xef\xbb\xbf"  # Windows programs put it in front of UTF-8
_SHOWN = 3  # files that a message names
_BLANK = re.compile(r"[ \t\n\r]*")  # what JSON calls white space


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """What a folder holds.

    Attributes:
        name: of one of them, for messages.
        plural: of several.
        suffixes: what the names of their files end in, in lower case.
    """

    name: str
    plural: str
    suffixes: tuple[str, ...]


class Store(Protocol):
    """Captions in some form; the texts are as they stand, white space included."""

    texts: dict[str, str | None]
    extras: dict[str, Mapping[str, Any]]

    def write(self, changes: Mapping[str, str]) -> list[Path]:
        """Replace captions, or add them, by the names of pictures; return the files that were written."""
        ...


class CaptionFile:
    """A text file as it was read.

    Attributes:
        path: the file.
        text: what it holds, without the mark that Windows programs put in front.
    """

    def __init__(self, path: Path, most: int, *, exists: bool = True) -> None:
        """Read a file of at most so many bytes, or begin one that does not exist.

        Raises:
            InputError: it is larger, or not UTF-8.
            OSError: it cannot be read.
        """
        self.path = path
        self._data = _read_bytes(path, most) if exists else None
        self.text = _decode(self._data or b"", path)

    def replace(self, text: str) -> None:
        """Write a new text; a mark in front of the old one stays.

        Raises:
            InputError: the file was changed by others since it was read.
            AdapterWriteError: it cannot be written.
        """
        try:
            present = self.path.read_bytes() if self.path.exists() else None
        except OSError as error:
            raise InputError(f"{show_path(self.path)}: cannot be read: {error.strerror}; check it") from None
        if present != self._data:
            raise InputError(f"{show_path(self.path)}: was changed by something else meanwhile; run the command again")
        data = (_MARK if (self._data or b"").startswith(_MARK) else b"") + text.encode("utf-8")
        with open_target(self.path, overwrite=True) as stream:
            write_all(stream, memoryview(data))
        self._data, self.text = data, text


class Sidecars:
    """Captions in files of their own."""

    def __init__(
        self, root: Path, media: Sequence[str], sidecars: Sequence[Path], items: Items, *, incomplete: bool
    ) -> None:
        """Read caption files.

        Args:
            root: where pictures, clips and captions are.
            media: names of the pictures and clips.
            sidecars: the caption files.
            items: what the folder holds.
            incomplete: each picture must have a caption file to itself, whether it exists or not.

        Raises:
            InputError: a caption belongs to no picture, or to several, or is unfit for training.
        """
        owners_of: dict[str, list[str]] = {}
        for name in media:
            owners_of.setdefault(Path(name).stem, []).append(name)
        if incomplete:
            for stem, owners in owners_of.items():
                if len(owners) > 1:
                    raise InputError(
                        f"{show_path(root)}: {show_some(owners)} would share the caption file {stem}{SIDECAR}; "
                        "rename all but one"
                    )
        self._root = root
        self._files: dict[str, CaptionFile] = {}
        self.extras: dict[str, Mapping[str, Any]] = {}
        self.texts: dict[str, str | None] = dict.fromkeys(sorted(media))
        for path in sidecars:
            where = show_path(path)
            owners = owners_of.get(path.stem, [])
            if not owners:
                raise InputError(
                    f"{where}: there is no {items.name} for this caption; put one of the same name beside it"
                )
            if len(owners) > 1:
                raise InputError(
                    f"{where}: is the caption of several {items.plural}, {show_some(owners)}; rename all but one"
                )
            if owners[0] in self._files:
                raise InputError(f"{where}: is a second caption of {owners[0]}; keep one")
            file = self._files[owners[0]] = CaptionFile(path, _LARGEST_SIDECAR)
            self.texts[owners[0]] = check_caption(file.text, where)

    def write(self, changes: Mapping[str, str]) -> list[Path]:
        """Replace captions, or add them, each in a file of its own."""
        written = []
        for name, text in changes.items():
            if name not in self._files:
                path = (self._root / name).with_suffix(SIDECAR)
                self._files[name] = CaptionFile(path, _LARGEST_SIDECAR, exists=False)
            file = self._files[name]
            file.replace(_put_between(file.text, text) if file.text.strip() else f"{text}\n")
            self.texts[name] = file.text
            written.append(file.path)
        return written


class Metadata:
    """Captions in one file, cut into pieces so that each caption is a piece of its own, or an empty one."""

    def __init__(self, file: CaptionFile, entries: Iterable[Entry], end: int, add: Add) -> None:
        """Cut the file.

        Args:
            file: what is read.
            entries: the places of captions, in the order of the file.
            end: where further entries go, in the text.
            add: returns what stands before and after the caption of a new entry.
        """
        self._file, self._add = file, add
        self._escapes = file.text.isascii() and "\\u" in file.text
        self._pieces: list[str] = []
        self._places: dict[str, tuple[int, str]] = {}  # piece of a caption, and what goes before one that is new
        self.texts: dict[str, str | None] = {}
        self.extras: dict[str, Mapping[str, Any]] = {}
        at = 0
        for entry in entries:
            self._pieces += [file.text[at : entry.start], file.text[entry.start : entry.stop]]
            self._places[entry.name] = len(self._pieces) - 1, entry.lead
            self.texts[entry.name] = entry.caption
            self.extras[entry.name] = entry.extra
            at = entry.stop
        self._pieces.append(file.text[at:end])
        self._end = len(self._pieces)
        self._pieces.append(file.text[end:])

    def write(self, changes: Mapping[str, str]) -> list[Path]:
        """Replace captions, or add them, all at once."""
        if not changes:
            return []
        pieces, places, end = list(self._pieces), dict(self._places), self._end
        texts: dict[str, str | None] = dict(self.texts)
        for name, text in changes.items():
            if name not in places:
                before, after = self._add(name, pieces[end - 1])
                pieces[end:end] = [before, "", after]
                places[name] = end + 1, ""
                end += 3
            place, lead = places[name]
            texts[name] = _put_between(texts.get(name) or "", text)
            pieces[place] = lead + json.dumps(texts[name], ensure_ascii=self._escapes)
        self._file.replace("".join(pieces))
        # Only what was written counts, should the disk be full.
        self._pieces, self._places, self._end, self.texts = pieces, places, end, texts
        return [self._file.path]


class Entry:
    """Where an entry of a metadata file has its caption.

    Attributes:
        name: of the picture or clip.
        caption: None where it has none.
        extra: its other fields, but for the name.
        start, stop: of the caption's JSON value in the text; equal where the field is missing.
        lead: what goes in front of a new value.
    """

    __slots__ = ("caption", "extra", "lead", "name", "start", "stop")

    def __init__(self, name: str, text: str, at: int, value: Mapping[str, Any], field: str) -> None:
        """Find the caption in the object `value`, which begins at `at` in the text."""
        self.name, self.caption, self.lead = name, value.get(field), ""
        self.extra = {key: other for key, other in value.items() if key not in (field, "file_name")}
        spans, end = scan_object(text, at)
        if field in spans:
            self.start, self.stop = spans[field]
        else:
            self.start = self.stop = end
            self.lead = f"{', ' if spans else ''}{json.dumps(field)}: "


class Add(Protocol):
    """Tells what stands before and after a new caption, from the name of its picture and the text in front of it."""

    def __call__(self, name: str, before: str) -> tuple[str, str]:
        """Return both."""
        ...


def scan_object(text: str, at: int) -> tuple[dict[str, tuple[int, int]], int]:
    """Return where the values of a JSON object stand, by key, and the end of the last of them.

    Args:
        text: holds valid JSON from `at` on.
        at: where the object begins, or white space in front of it.
    """
    decoder = json.JSONDecoder()
    spans: dict[str, tuple[int, int]] = {}
    end = at = skip_blank(text, at) + 1
    at = skip_blank(text, at)
    while text[at] != "}":
        key, at = decoder.raw_decode(text, at)
        start = skip_blank(text, skip_blank(text, at) + 1)  # past the colon
        _, end = decoder.raw_decode(text, start)
        spans[key] = start, end
        at = skip_blank(text, end)
        if text[at] == ",":
            at = skip_blank(text, at + 1)
    return spans, end


def skip_blank(text: str, at: int) -> int:
    """Return where the white space of JSON that begins at `at` ends."""
    match = _BLANK.match(text, at)
    return at if match is None else match.end()


def _put_between(old: str, new: str) -> str:
    """Return a text with the white space of another at its ends."""
    if not old.strip():
        return new
    return old[: len(old) - len(old.lstrip())] + new + old[len(old.rstrip()) :]


def check_caption(text: str, where: str) -> str:
    """Return a caption that is fit to be tokenised."""
    if len(text.strip()) > MAX_CAPTION:
        raise InputError(
            f"{where}: the caption has {len(text.strip())} characters, at most {MAX_CAPTION} make sense; shorten it"
        )
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise InputError(
            f"{where}: character {error.start + 1} of the caption, {quote(text[error.start])}, is half a character; "
            "remove it"
        ) from None
    return text


def _read_bytes(file: Path, most: int) -> bytes:
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise InputError(
            f"{show_path(file)}: has more than {most} bytes, too many for captions of at most {MAX_CAPTION} "
            "characters; shorten it"
        )
    return data


def _decode(data: bytes, file: Path) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{show_path(file)}: byte {error.start}, 0x{data[error.start]:02x}, is not UTF-8; save it as UTF-8"
        ) from None


def show_some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    shown = ", ".join(name if name.isprintable() else quote(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
