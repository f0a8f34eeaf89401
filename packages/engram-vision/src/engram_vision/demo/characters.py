"""The demo's characters: what they look like, and where their reference pictures lie."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from engram_vision.shipped import characters_folder

__all__ = ["DemoCharacter", "describe_subject", "read_characters"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DemoCharacter:
    """A demo character.

    Attributes:
        name: its name, which is its trigger.
        folder: its reference pictures with captions.
        description: its looks in words that the model knows.
        attributes: what the judge has to see.
        shown: the scenes of its reference pictures; the others are new.
    """

    name: str
    folder: Path
    description: str
    attributes: Mapping[str, str]
    shown: Sequence[str]

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.folder.name

    def is_seen(self, named: Mapping[str, str]) -> bool:
        """Tell whether what the judge names is this character, every attribute right."""
        return named["kind"] == "monster" and all(named[name] == value for name, value in self.attributes.items())


def read_characters() -> tuple[list[DemoCharacter], dict[str, str]]:
    """Return the characters, and each scene's phrase."""
    folder = characters_folder()
    values = json.loads((folder / "characters.json").read_text(encoding="utf-8"))
    subjects = [
        DemoCharacter(
            name=one["name"],
            folder=folder / one["folder"],
            description=one["description"],
            attributes=one["attributes"],
            shown=tuple(one["scenes"]),
        )
        for one in values["characters"]
    ]
    return subjects, values["scenes"]


def describe_subject(named: Mapping[str, str]) -> str:
    """Return what the judge names in a few words."""
    if named["kind"] != "monster":
        return named["kind"]
    headgear = "" if named["headgear"] == "none" else f", {named['headgear']}"
    return f"{named['color']} {named['pattern']} {named['shape']} monster, {named['eyes']} eyed{headgear}".replace(
        "one eyed", "one eye"
    ).replace("two eyed", "two eyes")
