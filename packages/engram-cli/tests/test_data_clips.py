"""`engram data clips`: what the backbone is asked for, and what is said of it."""

import shlex
from pathlib import Path

import pytest
from cli_toys import Filmer, Mute, ToyClips

TRIGGER = ("--trigger", "Zorbit Quell")


@pytest.fixture
def filmer(install):
    filmer = Filmer()
    install(filmer, Mute())
    return filmer


CLIPS = ("data", "clips", "--backbone", "filmer", "--data", "pictures", "-o", "made")


def test_clips_are_made_with_what_the_options_say(engram, filmer):
    done = engram(*CLIPS, *TRIGGER, "--described-as", "a monster", "--force")
    assert done.status == 0, done.err
    settings = ToyClips(
        data=Path("pictures"), trigger="Zorbit Quell", output=Path("made"), described_as="a monster", frames=81
    )
    assert filmer.calls == [(settings, True)]
    assert done.out.splitlines() == ["made: 2 clips, 1 made now; took 1 min 23 s", f"look at {Path('made/sheet.png')}"]


def test_clips_as_json(engram, filmer):
    assert engram(*CLIPS, *TRIGGER, "--model", "tiny", "--json").json == {
        "folder": "made",
        "clips": [str(Path("made/a.mp4")), str(Path("made/b.mp4"))],
        "made": 1,
        "sheet": str(Path("made/sheet.png")),
        "seconds": 83.0,
    }
    ((settings, _),) = filmer.calls
    assert settings.frames == 9


@pytest.mark.parametrize("more", [(), ("--force",)])
def test_a_stopped_builder_says_how_to_go_on(engram, filmer, more):
    done = engram(*CLIPS, "--trigger", "stop", *more)
    assert done.status == 130
    start, told = "error: interrupted; go on with: engram ", done.err.splitlines()[-1]
    assert told.startswith(start)
    filmer.calls.clear()
    assert engram(*shlex.split(told.removeprefix(start))).status == 130
    ((settings, overwrite),) = filmer.calls
    assert (settings.data, settings.output, overwrite) == (Path("pictures"), Path("made"), bool(more))


def test_a_backbone_that_makes_no_clips_says_so(engram, filmer):
    done = engram("data", "clips", "--backbone", "mute", "--data", "pictures", *TRIGGER, "-o", "made")
    assert done.status == 1
    assert "filmer can" in done.err
