"""A folder of pictures with captions as training data. Importing this imports no torch.

What is said of pictures holds for clips too (`engram_video.dataset`): only the names that their files end in differ.

Captions are of one kind, for all pictures of a folder:

- `metadata.jsonl` (the image folders of Hugging Face `datasets`): each line an object with `file_name`, relative to the
  folder, and `text`. Only here may pictures lie in subfolders.
- `.txt` files beside the pictures, with the same names but for the suffix.
- `metadata.json` of TinyEngram (github.com/AutoArk/TinyEngram): an object that maps a picture's name to an object with
  `training_prompt`. As in its scripts, the pictures are in the subfolder `preprocessed` where there is one, and that
  subfolder may also be given itself.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from engram_core import InputError
from engram_core.errors import quote
from engram_vision.images import SUFFIXES, Note, ignore_note, load_picture, show_path

__all__ = [
    "MAX_CAPTION",
    "PLACEHOLDER",
    "CaptionedFile",
    "CaptionedImage",
    "Items",
    "caption_with",
    "contains_trigger",
    "put_trigger_first",
    "read_captions",
    "read_dataset",
    "show_some",
]

MAX_CAPTION = 10_000
"""Most characters of a caption. Text encoders read a few hundred; a longer one is another file by mistake."""

PLACEHOLDER = "{trigger}"
"""What stands for the trigger in a caption."""

_JSON_LINES = "metadata.jsonl"
_TINYENGRAM = "metadata.json"
_PREPROCESSED = "preprocessed"
_SIDECAR = ".txt"
_LARGEST_SIDECAR = 1 << 16  # bytes: more than the longest caption has
_LARGEST_METADATA = 1 << 28  # bytes: some hundred thousand captions
_SHOWN = 3  # files that a message names


@dataclass(frozen=True, slots=True, kw_only=True)
class Items:
    """What a folder holds.

    Attributes:
        name: of one of them, for messages; an `s` makes the plural.
        suffixes: what the names of their files end in, in lower case.
    """

    name: str
    suffixes: tuple[str, ...]


_PICTURES = Items(name="picture", suffixes=SUFFIXES)


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
    phrase = " ".join(trigger.split())
    if not phrase:
        raise InputError(f"the trigger is {trigger!r}; give the phrase that shall recall the subject")
    try:
        root, captions = _read_captions(folder, items, note)
    except OSError as error:
        place = show_path(Path(error.filename or folder))
        raise InputError(f"{place}: cannot be read: {error.strerror or error}; check its permissions") from None
    texts = {name: caption.text.replace(PLACEHOLDER, phrase).strip() for name, caption in captions.items()}
    if insert_trigger:
        texts = {name: put_trigger_first(text, phrase) for name, text in texts.items()}
    else:
        _expect_trigger(folder, texts, phrase)
    files = [CaptionedFile(path=root / name, caption=texts[name], extra=captions[name].extra) for name in sorted(texts)]
    if len(files) == 1:
        note(f"{show_path(files[0].path)}: is the only {items.name}; with several the subject is learned more reliably")
    return files


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
        in_word.append(character.isalnum() or (_is_accent(character) and in_word[-1]))
    start = folded.find(wanted) if wanted else -1
    while start >= 0:
        stop = start + len(wanted)
        # One character may fold to several (ß to ss), of which a trigger cannot cover a part.
        is_whole = (start == 0 or origin[start - 1] < origin[start]) and origin[stop - 1] < origin[stop]
        is_ended = stop == len(folded) or not (folded[stop].isalnum() or _is_accent(folded[stop]))
        if is_whole and is_ended and not in_word[start]:
            yield origin[start], origin[stop]
            start = folded.find(wanted, stop)
        else:
            start = folded.find(wanted, start + 1)


def _is_accent(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


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


@dataclass(frozen=True, slots=True)
class _Caption:
    text: str
    extra: Mapping[str, Any]


def _read_captions(folder: Path, items: Items, note: Note) -> tuple[Path, dict[str, _Caption]]:
    """Return where the pictures are, and for the name of each its caption, empty where there is none.

    Raises:
        InputError: as `read_dataset` says.
        OSError: something cannot be read.
    """
    where = show_path(folder)
    if not folder.is_dir():
        fact = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{where}: {fact}; give the folder that holds the {items.name}s")
    root, tinyengram = _find_tinyengram(folder)
    if root != folder:
        note(f"{where}: the {items.name}s in {_PREPROCESSED} are used, as in TinyEngram, and no others")
    entries = sorted(path for path in root.iterdir() if not path.name.startswith("."))
    if not entries:
        raise InputError(f"{show_path(root)}: is empty; put the {items.name}s and their captions into it")
    files = [path for path in entries if path.is_file()]
    pictures = [path for path in files if path.suffix.lower() in items.suffixes]
    sidecars = [path for path in files if path.suffix.lower() == _SIDECAR]
    lines = [path for path in dict.fromkeys((folder / _JSON_LINES, root / _JSON_LINES)) if path.is_file()]
    stems = {path.stem for path in pictures}
    paired = [path.name for path in sidecars if path.stem in stems]
    kinds = [show_path(path) for path in (*lines, tinyengram) if path] + ([show_some(paired)] if paired else [])
    if len(kinds) > 1:
        raise InputError(f"{where}: has captions of several kinds: {'; '.join(kinds)}; keep those that are right")
    if lines:
        captions = _collect(_read_json_lines(lines[0]), root, items)
    elif tinyengram:
        captions = _collect(_read_tinyengram(tinyengram, items), root, items)
    else:
        captions = _read_sidecars(sidecars, pictures, items)
    captions = {path.name: _Caption("", {}) for path in pictures} | captions
    if not captions:
        raise InputError(
            f"{show_path(root)}: holds no {items.name}s ({', '.join(items.suffixes)}); put them there, "
            f"or name those in subfolders in {_JSON_LINES}"
        )
    return root, captions


def _find_tinyengram(folder: Path) -> tuple[Path, Path | None]:
    """Return where the pictures are, and TinyEngram's metadata, if there is any."""
    own, inner = folder / _TINYENGRAM, folder / _PREPROCESSED
    if own.is_file():
        return (inner if inner.is_dir() else folder), own
    full = folder.resolve()
    outer = full.parent / _TINYENGRAM
    return folder, (outer if full.name == _PREPROCESSED and outer.is_file() else None)


def _read_json_lines(file: Path) -> Iterator[tuple[str, str, _Caption]]:
    """Yield (place for messages, picture, caption)."""
    # Not `splitlines`, which would also split at what JSON allows inside a text.
    for number, line in enumerate(_read_text(file, _LARGEST_METADATA).split("\n"), start=1):
        if line.strip():
            where = f"{show_path(file)}, line {number}"
            row = _parse_json(line, where)
            name, text = _texts(row, ("file_name", "text"), where)
            extra = {key: value for key, value in row.items() if key not in ("file_name", "text")}
            yield where, name, _Caption(text, extra)


def _read_tinyengram(file: Path, items: Items) -> Iterator[tuple[str, str, _Caption]]:
    """Yield (place for messages, picture, caption)."""
    where = show_path(file)
    metadata = _parse_json(_read_text(file, _LARGEST_METADATA), where)
    if not isinstance(metadata, dict):
        raise InputError(
            f"{where}: holds {quote(metadata)}, expected TinyEngram's object from {items.name} names to objects "
            f"with training_prompt; write captions of your own into {_JSON_LINES}"
        )
    for name, item in metadata.items():
        (text,) = _texts(item, ("training_prompt",), f"{where}, {quote(name)}")
        yield where, name, _Caption(text, {})


def _read_sidecars(sidecars: Sequence[Path], pictures: Sequence[Path], items: Items) -> dict[str, _Caption]:
    """Return captions by picture."""
    captions: dict[str, _Caption] = {}
    owners_of: dict[str, list[str]] = {}
    for path in pictures:
        owners_of.setdefault(path.stem, []).append(path.name)
    for file in sidecars:
        where = show_path(file)
        owners = owners_of.get(file.stem, [])
        if not owners:
            raise InputError(f"{where}: there is no {items.name} for this caption; put one of the same name beside it")
        if len(owners) > 1:
            raise InputError(
                f"{where}: is the caption of several {items.name}s, {show_some(owners)}; rename all but one"
            )
        if owners[0] in captions:
            raise InputError(f"{where}: is a second caption of {owners[0]}; keep one")
        captions[owners[0]] = _Caption(_check_caption(_read_text(file, _LARGEST_SIDECAR), where), {})
    return captions


def _collect(found: Iterable[tuple[str, str, _Caption]], root: Path, items: Items) -> dict[str, _Caption]:
    """Return captions by picture from (place for messages, picture, caption)."""
    captions: dict[str, _Caption] = {}
    for where, file_name, caption in found:
        name = _check_name(file_name, root, items, where)
        if name in captions:
            raise InputError(f"{where}: names {quote(file_name)} a second time; keep one caption for a {items.name}")
        _check_caption(caption.text, where)
        captions[name] = caption
    return captions


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
    except OSError:  # a name so long that the system will not look for it
        return False


def _check_caption(text: str, where: str) -> str:
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


def _texts(value: Any, fields: Sequence[str], where: str) -> list[str]:
    """Return the texts in the fields of a JSON object, which may have others."""
    if not isinstance(value, dict):
        raise InputError(f"{where}: holds {quote(value)}, expected an object with {' and '.join(fields)}")
    missing = [field for field in fields if field not in value]
    if missing:
        raise InputError(f"{where}: lacks {' and '.join(missing)}; it has {quote(sorted(value))}")
    for field in fields:
        if not isinstance(value[field], str):
            raise InputError(f"{where}: {field} is {quote(value[field])}, expected text in quotes")
    return [value[field] for field in fields]


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


def _read_text(file: Path, most: int) -> str:
    with file.open("rb") as stream:
        data = stream.read(most + 1)
    if len(data) > most:
        raise InputError(
            f"{show_path(file)}: has more than {most} bytes, too many for captions of at most {MAX_CAPTION} "
            "characters; shorten it"
        )
    try:
        return data.decode("utf-8-sig")  # Windows programs put a mark in front
    except UnicodeDecodeError as error:
        raise InputError(
            f"{show_path(file)}: byte {error.start}, 0x{data[error.start]:02x}, is not UTF-8; save it as UTF-8"
        ) from None


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


def show_some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    shown = ", ".join(name if name.isprintable() else quote(name) for name in names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
