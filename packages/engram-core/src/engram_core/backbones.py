"""The backbones installed packages offer, found through entry points and loaded only when used."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from engram_core.adapter import Adapter
from engram_core.concept import Rule
from engram_core.errors import BackboneLoadError, BackboneNotFoundError
from engram_core.tokenizer import StreamTokenizer

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "engram.backbones"


@runtime_checkable
class Backbone(Protocol):
    """What a package offers for one model family.

    Register an object with these attributes under the entry-point group `engram.backbones`, in the name
    users pass to `--backbone`. Further abilities are further methods; see `docs/third-party.md`.

    Attributes:
        name: the name of the entry point.
        kind: `concept-table` or `hashed-memory`.
        title: the model family in words.
        streams: stream name to the site whose states are edited, e.g. `{"clip_l": "last_hidden_state"}`.
        default_model: hub id used when no model is named.
    """

    name: str
    kind: str
    title: str
    streams: Mapping[str, str]
    default_model: str

    def load_tokenizers(self, model: str, streams: Collection[str] | None = None) -> Mapping[str, StreamTokenizer]:
        """Return the tokenizers of a model (hub id or local folder) by stream; loads no weights.

        Args:
            model: hub id or local folder.
            streams: load only these; None means all.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertSettings:
    """What a user can say about a foreign checkpoint; None where the checkpoint should know.

    Attributes:
        model: hub id or folder of the base model, for its tokenizers.
        name: name of the concept.
        trigger: the phrase it was trained with.
        max_ngram: N of its registration.
        rule: how its vectors become residuals.
    """

    model: str | None = None
    name: str | None = None
    trigger: str | None = None
    max_ngram: int | None = None
    rule: Rule | None = None


@runtime_checkable
class ConvertingBackbone(Backbone, Protocol):
    """A backbone that can import checkpoints of other tools."""

    def convert(self, source: Path, settings: ConvertSettings) -> Adapter:
        """Return a foreign checkpoint as an adapter.

        Args:
            source: a file or folder.
            settings: what the user said about it.

        Raises:
            EngramError: the checkpoint cannot be read or does not fit.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledBackbone:
    """A backbone that some installed package registers; not loaded yet."""

    name: str
    package: str
    version: str
    entry_point: EntryPoint

    def load(self) -> Backbone:
        """Import the backbone.

        Raises:
            BackboneLoadError: the import fails or the object is not a backbone.
        """
        where = f"backbone {self.name!r} of {self.package} {self.version} ({self.entry_point.value})"
        try:
            backbone = self.entry_point.load()
        except Exception as error:  # a third party's import can raise anything
            raise BackboneLoadError(f"{where}: cannot be imported: {type(error).__name__}: {error}") from error
        if not isinstance(backbone, Backbone):
            raise BackboneLoadError(
                f"{where}: is not a backbone; it needs name, kind, title, streams, default_model and load_tokenizers"
            )
        if backbone.name != self.name:
            raise BackboneLoadError(f"{where}: calls itself {backbone.name!r}; both names must agree")
        return backbone


def list_backbones() -> dict[str, InstalledBackbone]:
    """Return the backbones of all installed packages, by name in order; imports none of them."""
    from importlib.metadata import entry_points  # slow to import, and seldom needed

    found = {}
    for entry in sorted(entry_points(group=ENTRY_POINT_GROUP), key=lambda entry: entry.name):
        dist = entry.dist
        found[entry.name] = InstalledBackbone(
            name=entry.name,
            package=dist.name if dist else "unknown package",
            version=dist.version if dist else "",
            entry_point=entry,
        )
    return found


def load_backbone(name: str) -> Backbone:
    """Import one backbone by name.

    Raises:
        BackboneNotFoundError: no installed package registers the name; suggests the nearest.
        BackboneLoadError: its package cannot be imported.
    """
    installed = list_backbones()
    if name not in installed:
        near = difflib.get_close_matches(name, installed, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(installed) or "none"
        raise BackboneNotFoundError(f"backbone {name!r} is not installed; {hint}installed: {known}")
    return installed[name].load()
