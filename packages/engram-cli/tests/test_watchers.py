"""How long work goes on: a bar in a terminal, and lines that do not flood a log."""

import io

import pytest
from rich.console import Console

from engram_cli.messages import format_duration
from engram_cli.watchers import LiveWatcher, LogWatcher, NotingWatcher, draw_bar, format_figures, watching


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def log(capsys):
    """A watcher that writes lines, its clock, and a function that returns the lines written since."""
    clock = Clock()
    return LogWatcher(clock), clock, lambda: capsys.readouterr().err.splitlines()


def test_lines_come_at_begin_and_end_and_every_ten_seconds(log):
    watcher, clock, lines = log
    watcher.begin("training", 100)
    assert lines() == ["training: 0/100"]
    for step in range(1, 101):
        clock.now += 0.5
        watcher.advance(step, {"loss": 1 / step})
    assert lines() == [
        "training: 20/100, loss 0.05, 2/s, 40 s left",
        "training: 40/100, loss 0.025, 2/s, 30 s left",
        "training: 60/100, loss 0.01667, 2/s, 20 s left",
        "training: 80/100, loss 0.0125, 2/s, 10 s left",
        "training: 100/100, loss 0.01, 2/s",
    ]
    watcher.end()
    assert lines() == []  # it is there already


def test_work_that_is_taken_up_again_is_not_announced_again(log):
    watcher, clock, lines = log
    for step in range(0, 10, 2):
        watcher.begin("training", 10, step)
        clock.now += 0.5
        watcher.advance(step + 2)
        watcher.begin("validating", 4)
        watcher.advance(4)
    watcher.end()
    shown = lines()
    assert shown[:3] == ["training: 0/10", "validating: 0/4", "validating: 4/4"]
    assert sum(line.startswith("training") for line in shown) == 2
    assert "training: 10/10, 4/s" in shown


def test_the_speed_is_that_of_the_last_half_minute(log):
    watcher, clock, lines = log
    watcher.begin("training", 1000, 500)
    clock.now += 100
    watcher.advance(501)
    assert lines()[-1] == "training: 501/1000, 1 min 40 s each, 13 h 51 min left"
    for step in range(502, 562):
        clock.now += 1
        watcher.advance(step)
    assert lines()[-1] == "training: 561/1000, 1/s, 7 min 19 s left"


def test_figures_stay_until_newer_ones_come(log):
    watcher, clock, lines = log
    watcher.begin("training", 100)
    watcher.advance(1, {"loss": 0.5, "validation_loss": 0.25, "steps_per_second": 4})
    watcher.advance(2, {"loss": 0.75})
    clock.now += 10
    watcher.advance(3)
    assert lines()[-1] == "training: 3/100, loss 0.75, validation loss 0.25, 4 steps/s, 5 min 23 s left"


def test_work_of_unknown_length(log):
    watcher, clock, lines = log
    watcher.advance(3)  # nothing has begun
    watcher.begin("encoding")
    clock.now += 11
    watcher.advance(22)
    watcher.end()
    assert lines() == ["encoding", "encoding: 22, 2/s"]


def test_notes_are_shown_by_all(capsys):
    NotingWatcher().note("look")
    LogWatcher().note("here")
    assert capsys.readouterr().err.splitlines() == ["note: look", "note: here"]


def test_json_writes_no_lines(capsys):
    with watching(as_json=True) as watcher:
        watcher.begin("training", 3)
        watcher.advance(3)
        watcher.note("look")
    with watching(as_json=False) as watcher:
        watcher.begin("training", 3)
        watcher.advance(3)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == ["note: look", "training: 0/3", "training: 3/3"]


def test_a_terminal_shows_a_bar_with_figures_and_keeps_nothing():
    stream, clock = io.StringIO(), Clock()
    console = Console(file=stream, force_terminal=True, width=100, color_system=None)
    with draw_bar(console) as bar:
        watcher = LiveWatcher(bar, clock)
        watcher.advance(1)  # nothing has begun
        watcher.begin("training [bold]", 10)
        clock.now += 1
        watcher.advance(4, {"loss": 0.25, "gpu_memory_mb": 2500})
        bar.refresh()
        shown = stream.getvalue()
        assert "training [bold]" in shown
        assert "4/10" in shown
        assert "4/s  1.5 s left" in shown
        assert "loss 0.25  gpu memory 2.5 GB" in shown
        watcher.begin("previewing")
        stream.seek(0)
        stream.truncate()
        bar.refresh()
        assert "previewing" in stream.getvalue()
        assert "loss" not in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # taken away


def test_figures_read_well():
    figures = {"loss": 0.123456, "learning_rate": 9.8e-5, "memory_mb": 3210.4, "steps_per_second": 2.123}
    assert format_figures(figures) == ["loss 0.1235", "learning rate 9.8e-05", "memory 3.2 GB", "2.12 steps/s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.44, "9.4 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (3599, "59 min 59 s"),
        (7260, "2 h 01 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert format_duration(seconds) == text
