"""A folder of clips with captions as training data. Importing this imports no torch.

Captions are those of pictures (`engram_vision.dataset`): `metadata.jsonl` with `file_name` and `text`, `.txt` files
beside the clips, or TinyEngram's `metadata.json`, of one kind for all clips of a folder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_core import InputError
from engram_video.clips import SUFFIXES, ClipInfo, probe_clip
from engram_vision.caption_stores import Items, show_some
from engram_vision.dataset import read_captions
from engram_vision.images import Note, ignore_note, show_path

__all__ = ["CaptionedClip", "read_clips"]

_CLIPS = Items(name="clip", plural="clips", suffixes=SUFFIXES)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionedClip:
    """A clip and what it shows.

    Attributes:
        path: the file; it was decoded in full once.
        caption: the text, with the trigger in it.
        info: frames, rate and size.
        extra: what else its line of `metadata.jsonl` says, e.g. the picture and the seed that it was made from.
    """

    path: Path
    caption: str
    info: ClipInfo
    extra: Mapping[str, Any]


def read_clips(
    folder: Path,
    trigger: str,
    *,
    insert_trigger: bool = False,
    frames: int = 1,
    size: tuple[int, int] | None = None,
    note: Note = ignore_note,
) -> list[CaptionedClip]:
    """Read and check the clips and captions of a folder.

    `{trigger}` in a caption is replaced by the trigger, and white space at both ends is dropped; else captions stay as
    they are. Hidden files and files of other kinds are ignored.

    Args:
        folder: clips with captions of one kind, see the module's documentation.
        trigger: the phrase that every caption must contain, see `engram_vision.dataset.contains_trigger`.
        insert_trigger: put the trigger in front of captions that lack it, and use it alone where a clip has no
            caption, instead of refusing them.
        frames: how many each clip must have at least.
        size: (width, height) to which training will cut them; None when that is not known yet.
        note: told what the user should know though it is no error, one line each, e.g. that a clip is smaller than
            `size` and so will be enlarged.

    Returns:
        At least one clip, in the order of the file names (by code point, so alike on every system).

    Raises:
        InputError: one line naming the file, the fact and the remedy.
    """
    files = read_captions(folder, trigger, _CLIPS, insert_trigger=insert_trigger, note=note)
    clips = [
        CaptionedClip(path=file.path, caption=file.caption, info=probe_clip(file.path), extra=file.extra)
        for file in files
    ]
    short = [f"{clip.path.name} ({clip.info.frames})" for clip in clips if clip.info.frames < frames]
    if short:
        raise InputError(
            f"{show_path(folder)}: fewer than {frames} frames are in {show_some(short)}; use longer clips or fewer "
            "frames"
        )
    for clip in clips:
        width, height = clip.info.width, clip.info.height
        if size is not None and (width < size[0] or height < size[1]):
            note(f"{show_path(clip.path)}: is {width}x{height}, smaller than {size[0]}x{size[1]}; it is enlarged")
    return clips
