"""`engram demo`: its figures, and that a broken promise is a failure."""

import json
from pathlib import Path

DEMO = ("demo", "--backbone", "toy")


def test_it_shows_the_figures_and_where_the_page_is(engram, toy):
    done = engram(*DEMO)
    assert done.status == 0, done.err
    assert toy.calls == [(Path("engram-demo"), 0, False)]
    assert done.out.splitlines() == [
        "what                           measured",
        "triggers that fire             12 of 12",
        "bytes equal without a trigger  yes",
        "page engram-demo/index.html",
    ]
    assert done.err == ""


def test_flags_reach_the_backbone(engram, toy):
    assert engram(*DEMO, "-o", "here", "--seed", 3, "--force").status == 0
    assert toy.calls == [(Path("here"), 3, True)]


def test_every_broken_promise_is_an_error(engram, toy):
    toy.failures = ("without a trigger 3 of 8 pictures differ", "the merge is not commutative")
    for words in (DEMO, (*DEMO, "--json")):
        done = engram(*words)
        assert done.status == 1
        assert done.err.splitlines() == [f"error: {failure}" for failure in toy.failures]
    assert json.loads(done.out)["failures"] == list(toy.failures)


def test_as_json(engram, toy):
    assert json.loads(engram(*DEMO, "--json").out) == {
        "page": "engram-demo/index.html",
        "figures": {"triggers that fire": "12 of 12", "bytes equal without a trigger": "yes"},
        "passed": True,
        "failures": [],
        "seconds": 3.5,
    }


def test_a_backbone_without_a_demonstration_says_so(engram, toy):
    done = engram("demo", "--backbone", "mute")
    assert done.status == 1
    assert "backbone 'mute' (a mute) cannot run a demonstration in this version; of the installed ones toy" in done.err


def test_without_any_backbone_it_says_what_to_install(engram, install):
    install()
    done = engram("demo")
    assert done.status == 1
    assert done.err == (
        "error: backbone 'sd15' is not installed; installed: none; install engram-vision from this repository, "
        "not from the public index, where packages named engram-* belong to others\n"
    )
