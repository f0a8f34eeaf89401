"""A stranger's text in Markdown, YAML and Python: shown, and never read as markup or code."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["clean_text", "make_table", "quote_text", "show_code", "show_text", "show_value"]

_LONGEST = 200  # characters of a free-form text

# Characters that begin no markup where they stand here, in the middle of a line.
_PLAIN = " .,-+'/"
_REFERENCES = {ord(sign): f"&#{ord(sign)};" for sign in string.punctuation if sign not in _PLAIN}
_INNER_UNDERSCORE = re.compile(r"(?<=[A-Za-z0-9])&#95;(?=[A-Za-z0-9])")  # emphasis needs one at the edge of a word


def make_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def show_value(value: Any) -> str:
    """Return a JSON value as text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)


def clean_text(text: str) -> str:
    """Return a text on one line, without characters that do not print."""
    signs = (" " if sign.isspace() else sign for sign in text)
    return "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in signs)


def show_text(text: str) -> str:
    """Return a stranger's text as Markdown that shows it; something else must begin the line."""
    text = clean_text(text)
    if len(text) > _LONGEST:
        text = text[: _LONGEST - 1] + "\N{HORIZONTAL ELLIPSIS}"
    return _INNER_UNDERSCORE.sub("_", text.translate(_REFERENCES))


def show_code(text: str) -> str:
    """Return a stranger's text as Markdown that shows it as code, in full: it is there to be copied.

    Between backticks character references would not be read, and a table would still be cut at each pipe.
    """
    return f"<code>{clean_text(text).translate(_REFERENCES)}</code>"


def quote_text(text: str) -> str:
    """Return a text as a string of YAML as well as of Python."""
    return json.dumps(clean_text(text), ensure_ascii=False)
