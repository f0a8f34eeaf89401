"""`engram eval`: backbone and model come from the adapters; figures side by side."""

from pathlib import Path

import pytest
from cli_toys import Mute, Talker, ToyEvaluation


@pytest.fixture
def talker(install):
    talker = Talker()
    install(talker, Mute())
    return talker


@pytest.fixture
def memory(world):
    return world.build_memory("biomedicine", backbone="talker", base_model="tiny").name


def test_backbone_and_model_come_from_the_first_adapter(engram, talker, memory):
    words = ("--text", "a.txt", "--text", "b.jsonl", "--tasks", "mmlu, pubmedqa", "--tasks", "x", "--window", 64)
    done = engram("eval", "-a", memory, *words, "--no-base", "-o", "figures.json", "--force")
    assert done.status == 0, done.err
    assert talker.calls == [
        (
            ToyEvaluation(
                adapters=(memory,),
                texts=(Path("a.txt"), Path("b.jsonl")),
                tasks=("mmlu", "pubmedqa", "x"),
                model="tiny",
                base=False,
                window=64,
                output=Path("figures.json"),
            ),
            True,
        )
    ]


def test_the_file_has_a_table_for_it(engram, talker, world, memory):
    (world.folder / "engram.toml").write_text(f"[eval]\nadapters = ['{memory}']\ntexts = 'a.txt'\nwindow = 8\n")
    assert engram("eval").status == 0
    ((settings, _),) = talker.calls
    assert (settings.window, settings.texts) == (8, (Path("a.txt"),))


def test_figures_stand_side_by_side(engram, talker, memory):
    done = engram("eval", "-a", memory, "--text", "a.txt", "--tasks", "one,two,three", "-o", "figures.json")
    assert done.out.splitlines() == [
        "on     figure                base          engram  difference",
        "a.txt  perplexity          9.5000          7.2500     -2.2500  better",
        "one    acc         0.5000 ±0.0300  0.4500 ±0.0400     -0.0500  within error",
        "two    acc         0.5000 ±0.0300  0.4000 ±0.0400     -0.1000  worse",
        "three  acc         0.5000 ±0.0300  0.6000 ±0.0400     +0.1000  better",
        "a.txt: 1 document, 20 tokens, 80 bytes, 4 windows",
        "wrote figures.json",
        "took 1 min 23 s",
    ]


def test_paths_are_shortened_where_that_tells_them_apart(engram, talker):
    words = ("eval", "--backbone", "talker", "--text", "some/folder/a.txt", "--text", "b.txt")
    lines = engram(*words).out.splitlines()
    assert lines[1].startswith("a.txt ")
    assert lines[3].startswith("some/folder/a.txt: 1 document")
    assert engram(*words, "--text", "b/a.txt").out.splitlines()[1].startswith("some/folder/a.txt ")


def test_json_holds_all_of_it(engram, talker, memory):
    report = engram("eval", "-a", memory, "--text", "a.txt", "--json").json
    assert report["measures"] == [
        {
            "subject": "a.txt",
            "metric": "perplexity",
            "values": {"base": 9.5, "engram": 7.25},
            "difference": -2.25,
            "errors": {},
            "higher_is_better": False,
        }
    ]
    assert report["adapters"] == [{"file": memory, "identity": "ab" * 32, "strength": 1.0}]
    assert report["details"]["texts"]["a.txt"]["tokens"] == 20
    assert (report["output"], report["seconds"]) == (None, 83.0)


def test_what_should_not_have_changed_ends_with_status_1(engram, talker, memory):
    done = engram("eval", "-a", memory, "--tasks", "one,bad control,bad clip")
    assert done.status == 1
    assert len(done.out.splitlines()) == 5
    assert done.err.splitlines()[-2:] == ["error: bad control failed", "error: bad clip failed"]
    done = engram("eval", "-a", memory, "--tasks", "bad control", "--json")
    assert (done.status, done.json["details"]["failures"]) == (1, ["bad control failed"])


def test_a_backbone_that_cannot_evaluate_says_so(engram, talker, world):
    done = engram("eval", "--backbone", "mute", "--text", "a.txt")
    assert done.status == 1
    assert "backbone 'mute' (a mute) cannot evaluate an adapter in this version" in done.err
    assert "of the installed ones talker can" in done.err
    world.build("aldric", "Aldric Vortex", backbone="mute")
    done = engram("eval", "-a", "aldric.safetensors", "--text", "a.txt")
    assert (done.status, "cannot evaluate an adapter" in done.err) == (1, True)


def test_without_a_backbone_it_is_asked_for(engram, talker, install):
    done = engram("eval", "--text", "a.txt")
    assert done.status == 2
    assert "Error: missing: --backbone" in done.err
    install(Mute())
    done = engram("eval", "--text", "a.txt")
    assert done.status == 1
    assert "no installed backbone can evaluate an adapter" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--window", "x"), "--window"),
        (("--set", "windows=3"), "there is no setting 'windows'; did you mean 'window'?"),
        (("--stride", "3"), "command line: there is no setting 'stride'"),
    ],
)
def test_wrong_usage(engram, talker, memory, words, told):
    done = engram("eval", "-a", memory, *words)
    assert done.status == 2
    assert told in done.err
    assert not talker.calls
