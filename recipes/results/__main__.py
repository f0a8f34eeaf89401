"""Fill the blocks of `docs/results.md` with what the benchmarks kept: `python -m recipes.results`.

The prose of the page is written by hand. Between its marks stand tables, sentences and plots that follow from the
figures alone; the plots go to `docs/results/`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from recipes.results.blocks import BLOCKS, Sources

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/results.md"
_MARKS = re.compile(r"(<!-- results: (?P<name>[^>]+?) -->).*?(<!-- end of results -->)", re.DOTALL)


def fill(text: str, sources: Sources) -> str:
    """Return the page with every block made anew.

    Args:
        text: the page.
        sources: of the figures.

    Raises:
        KeyError: a mark names no block.
    """

    def replace(match: re.Match[str]) -> str:
        return f"{match[1]}\n\n{BLOCKS[match['name']](sources)}\n\n{match[3]}"

    return _MARKS.sub(replace, text)


def main() -> None:
    """Fill the page."""
    sources = Sources(
        vision=ROOT / "packages/engram-vision/benchmarks/results.json",
        video=ROOT / "packages/engram-video/benchmarks/results.json",
        grids=ROOT / "build",
        plots=PAGE.with_suffix(""),
    )
    sources.plots.mkdir(exist_ok=True)
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), sources), encoding="utf-8")
    print(f"wrote {PAGE} and {sources.plots}", file=sys.stderr)  # noqa: T201 - a script for people at a terminal


if __name__ == "__main__":
    main()
