"""What `engram inspect` shows of text: the tokens that fire in prompts, and the lines of a file that would fire."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from rich.text import Text

from engram_cli.console import byte_progress, out, plain
from engram_cli.messages import show_json, show_note
from engram_core import Adapter, AdapterReadError, Firing, PromptAudit, StreamReading, StreamTokenizer, audit_lines

_STYLES = ("black on green", "black on cyan", "black on yellow", "black on magenta", "white on blue", "white on red")
_LONGEST_LINE = 1 << 16


def show_prompts(
    adapter: Adapter, tokenizers: Mapping[str, StreamTokenizer], prompts: Sequence[str], *, as_json: bool
) -> None:
    """Show for each prompt which tokens of which stream fire."""
    audit = PromptAudit(adapter, tokenizers)
    reports = [audit.examine(prompt) for prompt in prompts]
    if as_json:
        show_json(
            [
                {
                    "prompt": report.prompt,
                    "streams": {
                        stream: {
                            "tokens": show_tokens(tokenizers[stream], reading.ids),
                            "ids": list(reading.ids),
                            "read": reading.n_read,
                            "fires": [{"concept": name, "spans": spans} for name, spans in reading.fired],
                        }
                        for stream, reading in report.streams.items()
                    },
                    "silent": [
                        {"concept": item.concept, "stream": item.stream, "reason": item.reason}
                        for item in report.silent
                    ],
                }
                for report in reports
            ]
        )
        return
    width = max(map(len, adapter.streams))
    for report in reports:
        out.print(plain(report.prompt, "bold"), soft_wrap=True)
        for stream, reading in report.streams.items():
            out.print(Text(f"  {stream:<{width}}  ", "dim") + _paint(tokenizers[stream], reading), soft_wrap=True)
            for index, (name, spans) in enumerate(reading.fired):
                where = ", ".join(f"{start + 1}-{stop}" for start, stop in spans)
                line = Text.assemble(" " * (width + 4), plain(name, _STYLES[index % len(_STYLES)]))
                out.print(line + plain(f" fires at tokens {where}"), soft_wrap=True)
            if not reading.fired:
                out.print(Text(f"{'':{width + 4}}nothing fires", "dim"))
        for item in report.silent:
            show_note(f"{item.concept!r} stands in the prompt but does not fire in {item.stream}: {item.reason}")


def show_lines(adapter: Adapter, tokenizers: Mapping[str, StreamTokenizer], path: Path, *, as_json: bool) -> None:
    """Show every line of a file that would fire, and the span at fault; as JSON, one object a line."""
    n_firing, last = 0, 0
    with byte_progress(f"reading {path.name}") as progress:
        reader = _LineReader(path, progress)
        for firing in audit_lines(adapter, tokenizers, reader):
            n_firing += firing.line != last
            last = firing.line
            spans = [show_span(tokenizers[firing.stream], firing, span) for span in firing.spans]
            if as_json:
                item = {
                    "line": firing.line,
                    "concept": firing.concept,
                    "stream": firing.stream,
                    "spans": spans,
                    "text": firing.text,
                }
                print(json.dumps(item, ensure_ascii=False))  # noqa: T201 - one object a line
            else:
                out.print(
                    Text.assemble(
                        (f"{firing.line:>8}", "dim"),
                        "  ",
                        plain(firing.stream, "dim"),
                        "  ",
                        plain(firing.concept),
                        "  ",
                        plain(" | ".join(spans), "black on yellow"),
                        "  ",
                        plain(firing.text[:160], "dim"),
                    ),
                    soft_wrap=True,
                )
    if not as_json:
        style = "yellow" if n_firing else "green"
        out.print(plain(f"{n_firing} of {reader.n_lines} lines would fire", style))


def show_tokens(tokenizer: StreamTokenizer, ids: Sequence[int]) -> list[str]:
    """Return tokens as people read them: word borders as spaces."""
    return [
        token.replace("</w>", " ").replace("\u2581", " ").replace("\u0120", " ").replace("\u010a", "\u21b5")
        for token in tokenizer.show(ids)
    ]


def show_span(tokenizer: StreamTokenizer, firing: Firing, span: tuple[int, int]) -> str:
    """Return the text of some tokens of a line."""
    return "".join(show_tokens(tokenizer, firing.ids[slice(*span)])).strip()


def _paint(tokenizer: StreamTokenizer, reading: StreamReading) -> Text:
    """Return the tokens of a prompt, separated by spaces; what fires is coloured, or bracketed without colour."""
    styles: dict[int, str] = {}
    for index, (_, spans) in enumerate(reading.fired):
        for start, stop in spans:
            styles.update(dict.fromkeys(range(start, stop), _STYLES[index % len(_STYLES)]))
    line = Text()
    for index, token in enumerate(show_tokens(tokenizer, reading.ids)):
        style, before, after = (styles.get(place, "") for place in (index, index - 1, index + 1))
        bracket = bool(style) and not out.color_system
        if index:
            line.append(" ", style if style == before else "")
        if bracket and style != before:
            line.append("[")
        line.append_text(plain(token.strip() or "\u2423", style or ("" if index < reading.n_read else "strike dim")))
        if bracket and style != after:
            line.append("]")
    if reading.n_read < len(reading.ids):
        line.append(f"  ({len(reading.ids) - reading.n_read} tokens cut off)", "red")
    return line


class _LineReader:
    """Reads a text file line by line, counting lines and reporting bytes. Bytes that are not UTF-8 are replaced."""

    def __init__(self, path: Path, progress: Callable[[int, int], None]) -> None:
        self._path, self._progress = path, progress
        self.n_lines = 0

    def __iter__(self) -> Iterator[str]:
        try:
            stream = self._path.open("rb")
        except OSError as error:
            raise AdapterReadError(f"{self._path}: cannot be read: {error.strerror}") from None
        with stream:
            total = self._path.stat().st_size
            done = 0
            while line := stream.readline(_LONGEST_LINE):
                done += len(line)
                self.n_lines += 1
                if self.n_lines % 256 == 0:
                    self._progress(done, total)
                yield line.decode("utf-8", "replace").rstrip("\r\n")
