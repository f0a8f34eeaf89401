"""The exception tree: every error engram raises on purpose, each also a built-in type.

Messages are one line: the fact, the values, the place, the remedy.
"""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engram_core.conflicts import Conflict


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 120
_SHORT.maxlevel = 3


def quote(value: object) -> str:
    """Return a value from a stranger's file for a message: printable, and short whatever the file holds."""
    return _SHORT.repr(value)


def one_line(error: object, limit: int = 200) -> str:
    """Return what a foreign error says for a message: on one line, at most `limit` characters of it."""
    return " ".join(str(error).split())[:limit]


def show_text(text: str) -> str:
    """Return a text for a message: as it is where all of it can be printed, else quoted."""
    return text if text.isprintable() else repr(text)


class EngramError(Exception):
    """Base of every error engram raises on purpose."""


class InputError(EngramError, ValueError):
    """An argument has the wrong type, shape or value."""


class MissingSettingsError(InputError):
    """Settings without a default were given nowhere.

    Attributes:
        names: the settings, in the order of their class.
    """

    def __init__(self, names: Sequence[str]) -> None:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        super().__init__(f"missing: {options}; give them on the command line or in engram.toml")
        self.names = tuple(names)

    def __reduce__(self) -> tuple[type[MissingSettingsError], tuple[tuple[str, ...]]]:
        # Exceptions are pickled by their message, which is not what this one is made from.
        return type(self), (self.names,)


class TriggerError(EngramError, ValueError):
    """A trigger cannot be registered with a tokenizer."""


class AdapterFormatError(EngramError, ValueError):
    """A file is not a valid adapter; the message names the file and the field."""


class AdapterReadError(EngramError, OSError):
    """A file cannot be read: missing, a folder, or not permitted."""


class AdapterWriteError(EngramError, OSError):
    """A file cannot be written: no space, not permitted, or no such folder."""


class TargetExistsError(AdapterWriteError, FileExistsError):
    """The target exists and overwriting was not asked for."""


class ConceptNotFoundError(EngramError, KeyError):
    """An adapter holds no concept of that name."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument; users should see the sentence.
        return str(self.args[0])


class IncompatibleAdaptersError(EngramError, ValueError):
    """Two adapters belong to different backbones, base models, tokenizers, widths or kinds."""


class ConflictError(EngramError, ValueError):
    """Adapters hold concepts that contradict each other.

    Attributes:
        conflicts: every conflict found, in canonical order.
    """

    def __init__(self, message: str, conflicts: Sequence[Conflict] = ()) -> None:  # the default serves pickle
        super().__init__(message)
        self.conflicts = tuple(conflicts)


class TrainingError(EngramError, ArithmeticError):
    """Training went wrong: the loss is not a number; the last good state is kept."""


class BackboneNotFoundError(EngramError, LookupError):
    """No installed package registers a backbone of that name."""


class BackboneLoadError(EngramError, ImportError):
    """A registered backbone could not be imported or is not a backbone."""
