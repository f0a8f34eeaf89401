"""What `engram generate` shows of texts: each by itself, or the base model's and the adapters' side by side."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from engram_cli.console import out, plain
from engram_cli.messages import count, printable, printable_block, show, show_json
from engram_core import GeneratedText, TextReport


def show_texts(report: TextReport, *, shown: bool, as_json: bool) -> None:
    """Show what was generated.

    Args:
        report: the texts.
        shown: whether they were shown already while they were generated.
        as_json: print all of it for scripts.
    """
    if as_json:
        show_json(
            {
                "texts": [text.to_json() for text in report.texts],
                "output": None if report.output is None else str(report.output),
                "seconds": report.seconds,
            }
        )
        return
    several_seeds = len({text.seed for text in report.texts}) > 1
    if len({text.variant for text in report.texts}) > 1:
        for base, other in zip(report.texts[::2], report.texts[1::2], strict=True):
            out.print(_side_by_side(base, other, several_seeds))
    elif not shown:
        for text in report.texts:
            out.print(plain(_title(text, several_seeds), "bold"), soft_wrap=True)
            out.print(Text(printable_block(text.text)), soft_wrap=True)
            out.print()
    if report.output is not None:
        show(printable(f"wrote {report.output}: {count(len(report.texts), 'text')}"))


def _side_by_side(base: GeneratedText, other: GeneratedText, several_seeds: bool) -> Table:
    names = ", ".join(
        adapter.file if adapter.strength == 1 else f"{adapter.file} at {adapter.strength:g}"
        for adapter in other.adapters
    )
    table = Table(title=plain(_title(base, several_seeds)), title_justify="left", title_style="bold", expand=True)
    table.add_column("base", ratio=1)
    table.add_column(plain(f"engram: {names}"), ratio=1)
    table.add_row(*(Text(printable_block(text.text)) for text in (base, other)))
    return table


def _title(text: GeneratedText, several_seeds: bool) -> str:
    title = " ".join(text.prompt.split())
    return f"{title} (seed {text.seed})" if several_seeds else title
