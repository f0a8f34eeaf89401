"""Captions of a folder of pictures or clips, read and written back in their form. Imports no torch.

The forms are those that training reads, of which a folder has one:

- `metadata.jsonl` (the image folders of Hugging Face `datasets`): each line an object with `file_name`, relative to the
  folder, and `text`. Only here may pictures and clips lie in subfolders.
- `.txt` files beside the pictures and clips, with the same names but for the suffix.
- `metadata.json` of TinyEngram (github.com/AutoArk/TinyEngram): an object that maps a name to an object with
  `training_prompt`. The pictures are in the subfolder `preprocessed` where there is one, and that subfolder may also be
  given itself.

Writing replaces captions and not a byte besides: other fields, the order, the way numbers are written and the layout
stay as they were.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Literal

from engram_core import InputError
from engram_core.errors import quote
from engram_vision.caption_stores import (
    LARGEST_METADATA,
    SIDECAR,
    CaptionFile,
    Entry,
    Items,
    Metadata,
    Sidecars,
    Store,
    check_caption,
    scan_object,
    show_some,
    skip_blank,
)
from engram_vision.images import SUFFIXES, Note, ignore_note, show_path

__all__ = ["CLIP_SUFFIXES", "CaptionFolder", "Form"]

CLIP_SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
"""Names that clips alone end in, in any case; one in `.gif` may be a picture as well."""

_ANY = Items(name="picture or clip", plural="pictures or clips", suffixes=(*SUFFIXES, *CLIP_SUFFIXES))

Form = Literal["metadata.jsonl", "metadata.json", "txt"]

_JSON_LINES = "metadata.jsonl"
_TINYENGRAM = "metadata.json"
_PREPROCESSED = "preprocessed"


class CaptionFolder:
    """The captions of a folder, which can be changed.

    Attributes:
        folder: as it was given.
        root: where the pictures and clips are; other than `folder` only in TinyEngram's layout.
        form: how the captions are kept.
    """

    def __init__(
        self, folder: Path, items: Items = _ANY, *, incomplete: bool = False, note: Note = ignore_note
    ) -> None:
        """Read the captions of a folder; pictures and clips are not opened.

        Args:
            folder: pictures or clips with captions of one form, or with none.
            items: what counts; pictures and clips unless told.
            incomplete: the captions shall be completed, so that an entry of a metadata file may lack its caption, and
                every picture and clip must have a place for one.
            note: told what the user should know though it is no error, one line each.

        Raises:
            InputError: one line naming the file, the fact and the remedy.
        """
        self.folder, self._items = folder, items
        try:
            self.root, self.form, self._store = _open(folder, items, incomplete, note)
        except OSError as error:
            place = show_path(Path(error.filename or folder))
            raise InputError(f"{place}: cannot be read: {error.strerror or error}; check its permissions") from None

    @property
    def captions(self) -> dict[str, str]:
        """Each picture's or clip's caption, without white space at its ends; empty where there is none.

        The names are relative to `root`, with `/` between folders, in the order of the metadata file and then of the
        names, by code point.
        """
        return {name: "" if text is None else text.strip() for name, text in self._store.texts.items()}

    @property
    def extras(self) -> dict[str, Mapping[str, Any]]:
        """What else its line of `metadata.jsonl` says of each picture or clip that has one, as JSON has it."""
        return dict(self._store.extras)

    def locate(self, name: str) -> Path:
        """Return the file of a picture or clip."""
        return self.root / name

    def write(self, captions: Mapping[str, str]) -> list[Path]:
        """Replace captions, or add them where there are none.

        White space at the ends of the old captions stays. Each file is replaced as a whole or not at all.

        Args:
            captions: new captions by name; those that are not named stay.

        Returns:
            The files that were written; none where nothing changes.

        Raises:
            InputError: there is no such picture, a caption is unfit for training, or a file was changed by others since
                it was read.
            AdapterWriteError: a file cannot be written; those already written stay so.
        """
        present = self.captions
        for name, text in captions.items():
            if name not in present:
                raise InputError(
                    f"{show_path(self.root)}: holds no {quote(name)}; name a {self._items.name} that it holds"
                )
            check_caption(text, show_path(self.locate(name)))
        return self._store.write(
            {name: text.strip() for name, text in captions.items() if text.strip() != present[name]}
        )


def _open(folder: Path, items: Items, incomplete: bool, note: Note) -> tuple[Path, Form, Store]:
    """Find out which form the captions have, and read them.

    Raises:
        InputError: as `CaptionFolder` says.
        OSError: something cannot be read.
    """
    where = show_path(folder)
    if not folder.is_dir():
        fact = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{where}: {fact}; give the folder that holds the {items.plural}")
    root, tinyengram = _find_tinyengram(folder)
    if root != folder:
        note(f"{where}: the {items.plural} in {_PREPROCESSED} are used, as in TinyEngram, and no others")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if not entries:
        raise InputError(f"{show_path(root)}: is empty; put the {items.plural} and their captions into it")
    files = [path for path in entries if path.is_file()]
    media = [path.name for path in files if path.suffix.lower() in items.suffixes]
    sidecars = [path for path in files if path.suffix.lower() == SIDECAR]
    lines = [path for path in dict.fromkeys((folder / _JSON_LINES, root / _JSON_LINES)) if path.is_file()]
    stems = {Path(name).stem for name in media}
    paired = [path.name for path in sidecars if path.stem in stems]
    kinds = [show_path(path) for path in (*lines, tinyengram) if path] + ([show_some(paired)] if paired else [])
    if len(kinds) > 1:
        raise InputError(f"{where}: has captions of several kinds: {'; '.join(kinds)}; keep those that are right")
    form: Form
    store: Store
    if lines:
        form, store = (
            "metadata.jsonl",
            _read_json_lines(CaptionFile(lines[0], LARGEST_METADATA), root, items, incomplete),
        )
    elif tinyengram:
        form, store = (
            "metadata.json",
            _read_tinyengram(CaptionFile(tinyengram, LARGEST_METADATA), root, items, incomplete),
        )
    else:
        form, store = "txt", Sidecars(root, media, sidecars, items, incomplete=incomplete)
    store.texts.update(dict.fromkeys(name for name in media if name not in store.texts))
    if not store.texts:
        raise InputError(
            f"{show_path(root)}: holds no {items.plural} ({', '.join(items.suffixes)}); put them there, "
            f"or name those in subfolders in {_JSON_LINES}"
        )
    return root, form, store


def _find_tinyengram(folder: Path) -> tuple[Path, Path | None]:
    """Return where the pictures are, and TinyEngram's metadata, if there is any."""
    own, inner = folder / _TINYENGRAM, folder / _PREPROCESSED
    if own.is_file():
        return (inner if inner.is_dir() else folder), own
    full = folder.resolve()
    outer = full.parent / _TINYENGRAM
    return folder, (outer if full.name == _PREPROCESSED and outer.is_file() else None)


def _read_json_lines(file: CaptionFile, root: Path, items: Items, incomplete: bool) -> Metadata:
    entries: dict[str, Entry] = {}
    at = 0
    # Not `splitlines`, which would also split at what JSON allows inside a text.
    for number, line in enumerate(file.text.split("\n"), start=1):
        if line.strip():
            where = f"{show_path(file.path)}, line {number}"
            value = _parse_json(line, where)
            if not isinstance(value, dict):
                raise InputError(f"{where}: holds {quote(value)}, expected an object with file_name and text")
            _check_fields(value, ("file_name", "text"), where, may_lack="text" if incomplete else None)
            entry = Entry(_check_name(value["file_name"], root, items, where), file.text, at, value, "text")
            _enter(entries, entry, items, value["file_name"], where)
        at += len(line) + 1
    newline = "\r\n" if "\r\n" in file.text else "\n"

    def add(name: str, before: str) -> tuple[str, str]:
        lead = "" if not before or before.endswith("\n") else newline
        return f'{lead}{{"file_name": {json.dumps(name, ensure_ascii=False)}, "text": ', f"}}{newline}"

    return Metadata(file, entries.values(), len(file.text), add)


def _read_tinyengram(file: CaptionFile, root: Path, items: Items, incomplete: bool) -> Metadata:
    where, field = show_path(file.path), "training_prompt"
    metadata = _parse_json(file.text, where)
    if not isinstance(metadata, dict):
        raise InputError(
            f"{where}: holds {quote(metadata)}, expected TinyEngram's object from {items.name} names to objects "
            f"with {field}; write captions of your own into {_JSON_LINES}"
        )
    spans, end = scan_object(file.text, 0)
    entries: dict[str, Entry] = {}
    for key, value in metadata.items():
        place = f"{where}, {quote(key)}"
        if not isinstance(value, dict):
            raise InputError(f"{place}: holds {quote(value)}, expected an object with {field}")
        _check_fields(value, (field,), place, may_lack=field if incomplete else None)
        entry = Entry(_check_name(key, root, items, where), file.text, spans[key][0], value, field)
        _enter(entries, entry, items, key, place)
    opening = file.text.index("{") + 1
    blank = file.text[opening : skip_blank(file.text, opening)]
    in_lines = "\n" in blank
    inner, outer = (blank + blank.rpartition("\n")[2], blank) if in_lines else ("", "")

    def add(name: str, before: str) -> tuple[str, str]:
        lead = "" if before.endswith("{") else "," if in_lines else ", "
        key = json.dumps(name, ensure_ascii=False)
        return f"{lead}{outer}{key}: {{{inner}{json.dumps(field)}: ", f"{outer}}}"

    return Metadata(file, entries.values(), end, add)


def _enter(entries: dict[str, Entry], entry: Entry, items: Items, file_name: str, where: str) -> None:
    if entry.name in entries:
        raise InputError(f"{where}: names {quote(file_name)} a second time; keep one caption for a {items.name}")
    if entry.caption is not None:
        check_caption(entry.caption, where)
    entries[entry.name] = entry


def _check_name(file_name: str, root: Path, items: Items, where: str) -> str:
    """Return the normal form of a picture's name, relative to `root` and with `/` between folders."""
    relative = PurePosixPath(file_name)
    path = root.joinpath(*relative.parts)
    fact = remedy = None
    if relative.is_absolute() or PureWindowsPath(file_name).anchor or ".." in relative.parts:
        fact, remedy = "leaves the folder", "give the name relative to it"
    elif "\\" in file_name:
        fact, remedy = "has a backslash", "write / between folders"
    elif not _is_file(path):
        fact, remedy = "is not there", f"put it into {show_path(root)}, or drop its caption"
    elif not path.resolve().is_relative_to(root.resolve()):
        fact, remedy = f"is a link out of the folder, to {show_path(path.resolve())}", "put a copy there"
    elif path.suffix.lower() not in items.suffixes:
        fact, remedy = f"is no {items.name} ({', '.join(items.suffixes)})", "drop its caption"
    if fact:
        raise InputError(f"{where}: names {quote(file_name)}, which {fact}; {remedy}")
    return relative.as_posix()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that the system will not look for
        return False


def _check_fields(value: Mapping[str, Any], fields: Sequence[str], where: str, *, may_lack: str | None) -> None:
    """Raise InputError unless an object has texts in its fields, of which one may be missing or null."""
    missing = [field for field in fields if field not in value and field != may_lack]
    if missing:
        raise InputError(f"{where}: lacks {' and '.join(missing)}; it has {quote(sorted(value))}")
    for field in fields:
        found = value.get(field)
        if not isinstance(found, str) and not (found is None and field == may_lack):
            raise InputError(f"{where}: {field} is {quote(found)}, expected text in quotes")


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: is not JSON: {error.msg} at {place}; correct it") from None
    except (ValueError, RecursionError) as error:
        reason = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{where}: cannot be used: {reason}; correct it") from None


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"it names {quote(twice)} twice")
    return result
