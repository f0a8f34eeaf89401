"""`engram generate` where texts come out: on the terminal as they are generated, and side by side."""

import io

import pytest
from cli_toys import Talker
from rich.console import Console

from engram_cli import texts, watchers


@pytest.fixture
def talker(install):
    talker = Talker()
    install(talker)
    return talker


@pytest.fixture
def memory(world):
    return world.build_memory("biomedicine", backbone="talker").name


def test_texts_are_shown(engram, talker):
    done = engram("generate", "--backbone", "talker", "-p", "Once upon", "-p", "The dog")
    assert done.status == 0, done.err
    assert done.out == "Once upon\n less\n[bold]and\ufffd[31m so on\n\nThe dog\n less\n[bold]and\ufffd[31m so on\n\n"
    assert done.err == ""


def test_both_stand_side_by_side(engram, talker, memory, monkeypatch):
    monkeypatch.setattr(texts, "out", Console(width=100, highlight=False, markup=False, emoji=False, no_color=True))
    done = engram("generate", "-a", memory, "-p", "Once upon", "--compare", "-o", "texts.jsonl")
    assert done.status == 0, done.err
    lines = [line.rstrip() for line in done.out.splitlines()]
    assert lines[0] == "Once upon"
    row = next(line for line in lines if " less" in line)
    assert row.index("less") < row.index("more")
    assert "engram: biomedicine.safetensors at 0.5" in done.out
    assert any(line.split("\u2503")[1].strip() == "base" for line in lines if line.startswith("\u2503"))
    assert lines[-1] == "wrote texts.jsonl: 2 texts"
    assert "\x1b" not in done.out


def test_json_holds_texts_and_adapters(engram, talker, memory):
    report = engram("generate", "-a", memory, "-p", "Once upon", "--compare", "--json").json
    base, other = report["texts"]
    assert base == {
        "prompt": "Once upon",
        "seed": 0,
        "variant": "base",
        "text": " less\n[bold]and\x1b[31m so on",
        "tokens": 3,
        "stopped": "end",
        "adapters": [],
    }
    assert other["variant"] == "engram"
    assert other["adapters"] == [{"file": memory, "identity": "ab" * 32, "strength": 0.5}]
    assert (report["output"], report["seconds"]) == (None, 1.5)


@pytest.fixture
def screen():
    return io.StringIO()


@pytest.fixture
def console(screen):
    return Console(file=screen, force_terminal=True, width=80, color_system=None, highlight=False, markup=False)


def test_texts_are_written_as_they_come(console, screen):
    with watchers.draw_bar(console) as bar:
        watcher = watchers.LiveWatcher(bar, texts=True)
        watcher.begin("loading", None)
        watcher.end()
        assert not watcher.has_shown_texts
        watcher.text("base: Once", " upon")
        written = screen.getvalue()
        assert written.endswith("base: Once\n upon")
        watcher.text("base: Once", " a\x1b[2J time\n")
        watcher.text("base: Once", "")
        watcher.text("engram: Once", "[red] more")
        watcher.text("engram: Once", "")
    assert watcher.has_shown_texts
    assert screen.getvalue().removeprefix(written) == " a\ufffd[2J time\n\n\nengram: Once\n[red] more\n\n"


@pytest.mark.parametrize("make", [watchers.LogWatcher, watchers.NotingWatcher])
def test_logs_leave_texts_to_the_end(make, capsys):
    watcher = make()
    watcher.text("base: Once", " upon")
    assert capsys.readouterr() == ("", "")
    assert not watcher.has_shown_texts


def test_a_bar_alone_leaves_texts_to_the_end(console, screen):
    with watchers.draw_bar(console) as bar:
        before = screen.getvalue()
        watcher = watchers.LiveWatcher(bar)
        watcher.text("base: Once", " upon")
        assert screen.getvalue() == before
        assert not watcher.has_shown_texts


def test_shown_texts_are_not_shown_again(engram, talker, monkeypatch):
    monkeypatch.setattr(watchers.NotingWatcher, "has_shown_texts", True)
    assert engram("generate", "--backbone", "talker", "-p", "Once upon").out == ""
