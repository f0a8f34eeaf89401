"""WordNet's synsets: sets of words that mean the same, each with a gloss, read from its data files."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

WORDNET = Path("/usr/share/wordnet")
"""Where Debian's package `wordnet-base` puts its data files."""

DATA = ("data.noun", "data.verb", "data.adj", "data.adv")

_MARKER = re.compile(r"\((?:p|a|ip)\)$")  # where in a sentence an adjective may stand: wndb(5WN)
_EXAMPLES = '; "'


@dataclass(frozen=True, kw_only=True, slots=True)
class Synset:
    """A meaning.

    Attributes:
        words: that have it, the most usual first.
        file: number of the lexicographer file, WordNet's coarse subject: lexnames(5WN).
        pos: `n`, `v`, `a`, `s` (an adjective's satellite) or `r` (an adverb).
        gloss: its definition, then mostly examples in quotes.
    """

    words: tuple[str, ...]
    file: int
    pos: str
    gloss: str

    @property
    def definition(self) -> str:
        """The gloss without its examples."""
        return self.gloss.partition(_EXAMPLES)[0]


def parse_synset(line: str) -> Synset:
    """Read a line of a data file: wndb(5WN).

    Raises:
        ValueError: it is not of that format.
    """
    head, bar, gloss = line.partition(" | ")
    fields = head.split(" ")
    try:
        file, pos, count = int(fields[1]), fields[2], int(fields[3], 16)
    except (IndexError, ValueError):
        raise ValueError(f"not a synset in WordNet's format: {line[:60]!r}") from None
    words = fields[4 : 4 + 2 * count : 2]
    if not bar or not count or len(words) != count:
        raise ValueError(f"not a synset in WordNet's format: {line[:60]!r}")
    gloss = " ".join(gloss.split()).rstrip("; ")  # some end as if an example followed
    return Synset(words=tuple(map(_read_word, words)), file=file, pos=pos, gloss=gloss)


def parse_synsets(lines: Iterable[str]) -> list[Synset]:
    """Read a data file's lines; those of the licence notice, which begin with a space, are passed over."""
    return [parse_synset(line) for line in lines if line.strip() and not line.startswith(" ")]


def parse_notice(lines: Iterable[str]) -> str:
    """Return the licence notice with which every data file begins, without its line numbers."""
    kept = []
    for line in lines:
        if not line.startswith(" "):
            break
        kept.append(re.sub(r"^ +\d+ ?", "", line).rstrip())
    return "\n".join(kept).strip() + "\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class WordNet:
    """The database as far as it is used here.

    Attributes:
        synsets: all of them, in the files' order.
        notice: the licence, which must go wherever texts of WordNet go.
        digest: hex SHA-256 over the data files.
    """

    synsets: tuple[Synset, ...]
    notice: str
    digest: str


def read_wordnet(folder: Path = WORDNET) -> WordNet:
    """Read the four data files.

    Raises:
        FileNotFoundError: they are not there.
    """
    synsets: list[Synset] = []
    digest, notice = hashlib.sha256(), ""
    for name in DATA:
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; install wordnet-base, or pass --wordnet with its folder")
        content = path.read_bytes()
        digest.update(content)
        lines = content.decode("ascii").splitlines()
        notice = notice or parse_notice(lines)
        synsets += parse_synsets(lines)
    return WordNet(synsets=tuple(synsets), notice=notice, digest=digest.hexdigest())


def _read_word(word: str) -> str:
    return _MARKER.sub("", word).replace("_", " ")
