"""Settings from several places: the stronger place wins, and every fault is told at once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_core import InputError, MissingSettingsError
from engram_core.settings import Layer, dump_settings, resolve_settings, setting_names


@dataclass(frozen=True, slots=True, kw_only=True)
class Toy:
    data: Path
    trigger: str
    steps: int = 10
    rate: float = 0.5
    clip: float | None = 1.0
    size: int | None = None
    note: str | None = None
    flip: bool = False
    keep: Literal["best", "last"] = "best"
    prompts: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = (0,)

    def faults(self):
        if self.steps < 1:
            yield f"steps is {self.steps}, expected at least 1"
        if self.rate <= 0:
            yield f"rate is {self.rate}, expected a number above 0"


NEEDED = Layer(source="test", values={"data": "pictures", "trigger": "Aldric"})


def resolve(*layers, **values):
    return resolve_settings(Toy, [NEEDED, *layers, Layer(source="flags", values=values)])


def test_defaults_fill_what_nobody_set():
    assert resolve() == Toy(data=Path("pictures"), trigger="Aldric")
    assert setting_names(Toy)[:3] == ["data", "trigger", "steps"]


def test_later_layers_win_and_none_means_not_set():
    weak = Layer(source="engram.toml", values={"steps": 20, "rate": 2.0})
    strong = Layer(source="command line", values={"steps": 30, "rate": None})
    settings = resolve(weak, strong)
    assert (settings.steps, settings.rate) == (30, 2.0)


@pytest.mark.parametrize(
    ("name", "given", "kept"),
    [
        ("rate", 2, 2.0),
        ("data", "~/x", Path("~/x").expanduser()),
        ("data", Path("x"), Path("x")),
        ("prompts", ["a", "b"], ("a", "b")),
        ("prompts", "a", ("a",)),
        ("folders", ["a"], (Path("a"),)),
        ("seeds", (1, 2), (1, 2)),
        ("keep", "last", "last"),
        ("size", 64, 64),
        ("size", "none", None),
        ("clip", "none", None),
        ("clip", 3, 3.0),
        ("note", "none", "none"),  # a text may be any text
    ],
)
def test_values_become_what_the_field_is(name, given, kept):
    value = getattr(resolve(**{name: given}), name)
    assert value == kept
    assert type(value) is type(kept)


@pytest.mark.parametrize(
    ("name", "given", "told"),
    [
        ("steps", "many", "flags: steps is 'many', expected a whole number"),
        ("steps", 1.5, "flags: steps is 1.5, expected a whole number"),
        ("steps", True, "flags: steps is True, expected a whole number"),
        ("steps", "none", "flags: steps is 'none', expected a whole number"),
        ("rate", "fast", "flags: rate is 'fast', expected a number"),
        ("clip", "no", "flags: clip is 'no', expected a number or 'none'"),
        ("size", 1.5, "flags: size is 1.5, expected a whole number or 'none'"),
        ("flip", "yes", "flags: flip is 'yes', expected true or false"),
        ("trigger", 1984, "flags: trigger is 1984, expected a text"),
        ("data", "", "flags: data is '', expected a path"),
        ("keep", "worst", "flags: keep is 'worst', expected one of best, last"),
        ("prompts", ["a", 1], "flags: prompts is ['a', 1], expected a list, each item a text"),
        ("stepz", 1, "flags: there is no setting 'stepz'; did you mean 'steps'?"),
        ("Xylophone", 1, "flags: there is no setting 'Xylophone'"),
        ("steps", 0, "steps is 0, expected at least 1"),
    ],
)
def test_a_fault_is_told_with_place_value_and_what_is_expected(name, given, told):
    with pytest.raises(InputError) as caught:
        resolve(**{name: given})
    assert str(caught.value) == told


def test_all_faults_are_told_together():
    file = Layer(source="engram.toml", values={"batch-size": 3, "rate": "fast"})
    with pytest.raises(InputError) as caught:
        resolve(file, keep="worst")
    assert str(caught.value).split("\n") == [
        "3 settings are wrong:",
        "engram.toml: there is no setting 'batch-size'",
        "engram.toml: rate is 'fast', expected a number",
        "flags: keep is 'worst', expected one of best, last",
    ]
    with pytest.raises(InputError, match=r"^2 settings are wrong:\nsteps is 0, .*\nrate is 0\.0, "):
        resolve(steps=0, rate=0)


def test_what_is_missing_is_named_once_all_else_is_right():
    with pytest.raises(MissingSettingsError) as caught:
        resolve_settings(Toy, [])
    assert caught.value.names == ("data", "trigger")
    with pytest.raises(InputError, match="expected a whole number"):
        resolve_settings(Toy, [Layer(source="flags", values={"steps": "many"})])


def test_dumped_settings_are_plain():
    settings = resolve(folders=["a"], prompts=["b"])
    assert dump_settings(settings) == {
        "data": "pictures",
        "trigger": "Aldric",
        "steps": 10,
        "rate": 0.5,
        "clip": 1.0,
        "flip": False,
        "keep": "best",
        "prompts": ["b"],
        "folders": ["a"],
        "seeds": [0],
    }


@given(
    st.builds(
        Toy,
        data=st.just(Path("pictures")),
        trigger=st.text(),
        steps=st.integers(min_value=1),
        rate=st.floats(min_value=0.1, allow_nan=False),
        clip=st.none() | st.floats(allow_nan=False),
        size=st.none() | st.integers(),
        note=st.none() | st.text(),
        flip=st.booleans(),
        keep=st.sampled_from(["best", "last"]),
        prompts=st.lists(st.text()).map(tuple),
        folders=st.lists(st.sampled_from([Path("a"), Path("b/c")])).map(tuple),
        seeds=st.lists(st.integers()).map(tuple),
    )
)
def test_dumped_settings_resolve_to_the_same(settings):
    assert resolve_settings(Toy, [Layer(source="file", values=dump_settings(settings))]) == settings
