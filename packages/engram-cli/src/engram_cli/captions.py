"""What `engram data` shows of captions: before and after, with the words that were replaced marked; a summary."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engram_cli.messages import count, format_duration, printable, show, show_json, show_note

if TYPE_CHECKING:
    from engram_vision.captioning import CaptionReport, CaptionSettings
    from engram_vision.captions import NormalizedCaption, NormalizeReport, Status

_STATUSES: tuple[Status, ...] = ("changed", "already", "none", "several")
_WORDS = {
    "changed": "changed",
    "already": "with the trigger already",
    "none": "without a subject",
    "several": "with several subjects",
}
_SHOWN = 3  # names in a message

Marks = Sequence[tuple[int, int]]


def show_changes(folder: Path, trigger: str, report: NormalizeReport, *, write: bool, as_json: bool) -> None:
    """Show what became of captions.

    Args:
        folder: as the user named it.
        trigger: the phrase.
        report: what became of them.
        write: whether they were to be written.
        as_json: print all of it for scripts.
    """
    numbers = {status: len(report.names(status)) for status in _STATUSES}
    if as_json:
        show_json(
            {
                "folder": str(folder),
                "form": report.form,
                "trigger": trigger,
                **numbers,
                "captions": [_plain_values(name, caption) for name, caption in report.captions.items()],
                "written": [str(path) for path in report.written],
            }
        )
        return
    listed = {name: caption for name, caption in report.captions.items() if caption.status != "already"}
    if listed and sys.stdout.isatty():
        _show_table(listed)
    else:
        _show_lines(listed)
    show(", ".join(f"{number} {_WORDS[status]}" for status, number in numbers.items()))
    if report.written:
        show(printable(f"wrote {_name_some([str(path) for path in report.written])}"))
    elif numbers["changed"] and not write:
        show_note("nothing was written; --write does")


def describe_left(folder: Path, report: NormalizeReport) -> str:
    """Return which captions are left without the trigger, and what to do; empty where none is."""
    several, none = report.names("several"), report.names("none")
    mute = [name for name in none if report.captions[name].before]
    bare = [name for name in none if name not in mute]
    facts = [f"several subjects are mentioned in the caption of {_name_some(several)}"] if several else []
    facts += [f"no subject is mentioned in the caption of {_name_some(mute)}"] if mute else []
    facts += [f"there is no caption for {_name_some(bare)}"] if bare else []
    remedies = ["--subject names the right one"] if several or mute else []
    remedies += ["--first takes the first"] if several else []
    remedies += ["engram data caption writes captions"] if bare else []
    return f"{folder}: {', and '.join(facts)}; {', '.join(remedies)}" if facts else ""


def show_caption(name: str, text: str) -> None:
    """Show a caption that was made."""
    show(printable(f"{name}: {text}"))


def show_captioned(settings: CaptionSettings, report: CaptionReport, *, as_json: bool) -> None:
    """Show what became of a folder; the captions themselves were shown before, but for `as_json`."""
    if as_json:
        show_json(
            {
                "folder": str(settings.folder),
                "form": report.form,
                "captioner": settings.captioner,
                "captions": [{"file": name, "caption": text} for name, text in report.captions.items()],
                "kept": list(report.kept),
                "silent": list(report.silent),
                "written": [str(path) for path in report.written],
                "seconds": report.seconds,
            }
        )
        return
    if report.silent:
        show_note(f"the captioner said nothing of {_name_some(report.silent)}; try another --prompt")
    what = f"{count(len(report.captions), 'caption')} made, {len(report.kept)} kept"
    show(f"{what}; took {format_duration(report.seconds)}")
    if report.captions and not report.written:
        show_note("nothing was written; --write does")


def _plain_values(name: str, caption: NormalizedCaption) -> dict[str, Any]:
    return {
        "file": name,
        "status": caption.status,
        "before": caption.before,
        "after": caption.after,
        "mentions": [caption.before[start:stop] for start, stop in caption.mentions],
    }


def _marks(caption: NormalizedCaption) -> tuple[Marks, Marks]:
    """Return what to mark before and after: what was replaced and by what, or all that might have been."""
    if caption.inserted is None:
        return caption.mentions, ()
    return caption.mentions[:1], (caption.inserted,)


def _describe(caption: NormalizedCaption) -> str:
    return _WORDS[caption.status] if caption.before else "without a caption"


def _show_lines(captions: dict[str, NormalizedCaption]) -> None:
    for name, caption in captions.items():
        before, after = _marks(caption)
        show(printable(f"{name}: {_describe(caption)}"))
        if caption.before:
            show(f"  - {_bracket(caption.before, before)}")
        if caption.status == "changed":
            show(f"  + {_bracket(caption.after, after)}")


def _show_table(captions: dict[str, NormalizedCaption]) -> None:
    from rich.table import Table

    from engram_cli.console import out, plain

    def paint(text: str, marks: Marks, style: str) -> Any:
        if out.color_system is None or "NO_COLOR" in os.environ:
            return plain(_bracket(text, marks))
        line = plain(_on_one_line(text))
        for start, stop in marks:
            line.stylize(style, start, stop)
        return line

    table = Table(expand=True)
    table.add_column("file", overflow="fold")
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for name, caption in captions.items():
        before, after = _marks(caption)
        is_changed = caption.status == "changed"
        table.add_row(
            plain(name),
            paint(caption.before, before, "black on yellow"),
            paint(caption.after, after, "black on green") if is_changed else plain(_describe(caption), "yellow"),
        )
    out.print(table)


def _bracket(text: str, marks: Marks) -> str:
    """Return a text on one line, with brackets around what is marked."""
    pieces, end = [], 0
    for start, stop in marks:
        pieces += [text[end:start], "[", text[start:stop], "]"]
        end = stop
    return _on_one_line("".join([*pieces, text[end:]]))


def _on_one_line(text: str) -> str:
    """Return a text of equal length that is safe on one line."""
    return printable("".join(" " if sign.isspace() else sign for sign in text))


def _name_some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
