"""Backbones of other packages: listed without importing, loaded on demand, every failure named."""

import importlib.metadata
from importlib.metadata import EntryPoint
from types import MappingProxyType, SimpleNamespace

import pytest

from engram_core import Backbone, BackboneLoadError, BackboneNotFoundError, list_backbones, load_backbone


class ToyBackbone:
    name = "toy"
    kind = "concept-table"
    title = "a toy"
    streams = MappingProxyType({"clip_l": "last_hidden_state"})
    default_model = "toy/model"

    def load_tokenizers(self, model, streams=None):
        return {}


TOY = ToyBackbone()
MISNAMED = TOY
HALF = SimpleNamespace(name="half", kind="concept-table")


class FakeEntry:
    """As much of an entry point as is used."""

    def __init__(self, name, load, package="engram-toys", version="1.2"):
        self.name, self._load = name, load
        self.value = f"engram_toys.{name}:BACKBONE"
        self.dist = SimpleNamespace(name=package, version=version) if package else None
        self.loads = 0

    def load(self):
        self.loads += 1
        return self._load()


def fail():
    raise RuntimeError("the toy box is empty")


def missing():
    raise ModuleNotFoundError("No module named 'toys'")


@pytest.fixture
def installed(monkeypatch):
    entries = [
        FakeEntry("toy", lambda: TOY),
        FakeEntry("zebra", lambda: MISNAMED),
        FakeEntry("half", lambda: HALF),
        FakeEntry("broken", fail),
        FakeEntry("absent", missing),
        FakeEntry("stray", lambda: TOY, package=None),
    ]

    def entry_points(group):
        assert group == "engram.backbones"
        return entries

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    return {entry.name: entry for entry in entries}


def test_all_are_listed_by_name_and_none_is_imported(installed):
    found = list_backbones()
    assert list(found) == ["absent", "broken", "half", "stray", "toy", "zebra"]
    assert (found["toy"].package, found["toy"].version) == ("engram-toys", "1.2")
    assert (found["stray"].package, found["stray"].version) == ("unknown package", "")
    assert sum(entry.loads for entry in installed.values()) == 0


def test_loading_imports_that_one_alone(installed):
    backbone = load_backbone("toy")
    assert backbone is TOY
    assert isinstance(backbone, Backbone)
    assert {name for name, entry in installed.items() if entry.loads} == {"toy"}


def test_a_typo_is_answered_with_the_nearest_name(installed):
    with pytest.raises(BackboneNotFoundError, match=r"'toi' is not installed; did you mean 'toy'\? installed:"):
        load_backbone("toi")


def test_a_stranger_is_answered_with_all_names(installed):
    with pytest.raises(BackboneNotFoundError) as caught:
        load_backbone("sd15")
    assert str(caught.value) == ("backbone 'sd15' is not installed; installed: absent, broken, half, stray, toy, zebra")
    assert isinstance(caught.value, LookupError)


def test_nothing_installed(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert list_backbones() == {}
    with pytest.raises(BackboneNotFoundError, match="backbone 'toy' is not installed; installed: none"):
        load_backbone("toy")


@pytest.mark.parametrize(
    ("name", "reason"),
    [("broken", "RuntimeError: the toy box is empty"), ("absent", "ModuleNotFoundError: No module named 'toys'")],
)
def test_an_import_that_fails_is_told_with_its_reason(installed, name, reason):
    with pytest.raises(BackboneLoadError) as caught:
        load_backbone(name)
    where = f"backbone {name!r} of engram-toys 1.2 (engram_toys.{name}:BACKBONE)"
    assert str(caught.value) == f"{where}: cannot be imported: {reason}"
    assert isinstance(caught.value, ImportError)
    assert caught.value.__cause__ is not None


def test_what_is_no_backbone_is_told(installed):
    with pytest.raises(BackboneLoadError, match="is not a backbone; it needs name, kind, title, streams"):
        load_backbone("half")


def test_both_names_must_agree(installed):
    with pytest.raises(BackboneLoadError, match=r"backbone 'zebra' of .*: calls itself 'toy'; both names must agree"):
        load_backbone("zebra")


def test_real_entry_points_work(monkeypatch):
    entry = EntryPoint(name="toy", value="json:nothing_of_that_name", group="engram.backbones")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    assert list_backbones()["toy"].package == "unknown package"
    with pytest.raises(BackboneLoadError, match=r"\(json:nothing_of_that_name\): cannot be imported: AttributeError"):
        load_backbone("toy")
