"""`engram train --concepts`: a list reaches the backbone group by group, and what is wrong in it is told at once."""

import shlex
from pathlib import Path

import pytest
from cli_toys import Talker, ToyTraining

LIST = """
[[concept]]
trigger = "Zorbit Quell"
data = "zorbit"

[[concept]]
trigger = "Fenny Wumble"
name = "Fenny"
data = "fenny"
steps = 30
"""


@pytest.fixture
def train(engram, world):
    """Return a function that trains the concepts of a list."""

    def run(*flags, text=LIST, output=("-o", "made")):
        (world.folder / "lists").mkdir(exist_ok=True)
        (world.folder / "lists/concepts.toml").write_text(text, encoding="utf-8")
        return engram("train", "--backbone", "toy", "--concepts", "lists/concepts.toml", *output, *flags)

    return run


def settings_of(toy):
    return [each for group, _, _ in toy.calls for each in group]


def test_each_concept_has_its_own_settings(train, toy, world):
    done = train("--vector-rate", "0.25")
    assert done.status == 0, done.err
    ((group, resume, overwrite),) = toy.calls
    assert (len(group), resume, overwrite) == (2, False, False)
    one, other = group
    assert (one.trigger, one.data, one.output) == (
        "Zorbit Quell",
        Path("lists/zorbit"),
        Path("made/zorbit-quell.safetensors"),
    )
    assert (other.data, other.output) == (Path("lists/fenny"), Path("made/fenny.safetensors"))
    assert (one.steps, other.steps) == (10, 30)
    assert one.vector_rate == other.vector_rate == 0.25
    assert (world.folder / "made").is_dir()
    assert "2 concepts, 2.5 kB" in done.out
    assert "concepts an hour" in done.out
    assert "engram merge made/*.safetensors -o all.safetensors" in done.out


def test_flags_are_stronger_than_the_list_and_the_list_than_files(train, toy, world):
    (world.folder / "engram.toml").write_text("steps = 20\nbeats = 5\n", encoding="utf-8")
    assert train().status == 0
    assert [each.steps for each in settings_of(toy)] == [20, 30]
    assert [each.beats for each in settings_of(toy)] == [5, 5]
    toy.calls.clear()
    assert train("--steps", 7, "--set", "beats=3").status == 0
    assert [(each.steps, each.beats) for each in settings_of(toy)] == [(7, 3), (7, 3)]


def test_the_folder_may_stand_in_a_file(train, toy, world):
    (world.folder / "engram.toml").write_text('output = "elsewhere"\n', encoding="utf-8")
    assert train(output=()).status == 0
    assert settings_of(toy)[0].output == Path("elsewhere/zorbit-quell.safetensors")


@pytest.mark.parametrize("option", ["--at-once", "--workers"])
@pytest.mark.usefixtures("toy")
def test_what_is_for_lists_alone_is_refused_without_one(engram, option):
    done = engram("train", "--backbone", "toy", option, "2")
    assert done.status == 2
    assert done.err.splitlines()[-1].endswith(
        f"{option} 2 is for a list of concepts; pass --concepts FILE, or leave {option} out"
    )


def test_groups_are_as_large_as_asked_for(train, toy):
    assert train("--at-once", 1).status == 0
    assert [len(group) for group, _, _ in toy.calls] == [1, 1]


@pytest.mark.usefixtures("toy")
def test_json_describes_each(train):
    content = train("--json").json
    assert content["folder"] == "made"
    assert [each["output"] for each in content["concepts"]] == [
        "made/zorbit-quell.safetensors",
        "made/fenny.safetensors",
    ]
    assert content["seconds"] >= 0


def test_a_name_without_letters_gives_a_file_all_the_same(train, toy):
    assert train(text='[[concept]]\ntrigger = "?!"\ndata = "x"\n').status == 0
    assert settings_of(toy)[0].output == Path("made/concept-1.safetensors")


def test_an_interrupted_list_says_how_to_go_on(train, toy):
    done = train(text=LIST.replace("Zorbit Quell", "stop"))
    assert done.status == 130
    words = shlex.split(done.err.strip().splitlines()[-1].split("go on with: ")[1])
    assert words[:2] == ["engram", "train"]
    assert {"--concepts", "lists/concepts.toml", "--resume"} <= set(words)


def test_finished_concepts_are_left_alone(train, toy, world):
    (world.folder / "made").mkdir()
    (world.folder / "made/fenny.safetensors").write_bytes(b"there")
    done = train("--resume")
    assert done.status == 0, done.err
    assert [each.trigger for each in settings_of(toy)] == ["Zorbit Quell"]
    assert "1 of 2 concepts are there already" in done.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no table [[concept]]"),
        ("[concept]\ntrigger = 'a b'\n", "has no table [[concept]]"),
        ("concept = [1]\n", "has no table [[concept]]"),
        ("steps = 3\n" + LIST, "holds 'steps'"),
        ("[[concept]\n", "is not TOML"),
        ("[[concept]]\ntrigger = 'a b'\n", "concept 1: needs trigger = 'PHRASE' and data = 'FOLDER'"),
        (LIST + "stepps = 3\n", "concept 2: there is no setting 'stepps'; did you mean 'steps'?"),
        (LIST + "output = 'x'\n", "concept 2: output stands in a list of concepts"),
        (LIST.replace("Fenny Wumble", "Zorbit Quell").replace('name = "Fenny"\n', ""), "two write the same file"),
    ],
)
def test_what_is_wrong_in_a_list_is_told(train, toy, text, message):
    done = train(text=text)
    assert done.status in (1, 2)
    assert message in done.err
    assert not toy.calls


@pytest.mark.parametrize("flags", [("--trigger", "a b"), ("--data", "x"), ("--set", "trigger=a b")])
def test_what_is_a_concepts_own_is_not_said_of_all(train, toy, flags):
    done = train(*flags)
    assert done.status == 2
    assert "is a concept's own; write it in lists/concepts.toml" in done.err
    assert not toy.calls


def test_a_missing_list_or_folder_is_told(engram, train, toy):
    done = engram("train", "--backbone", "toy", "--concepts", "nowhere.toml", "-o", "made")
    assert done.status == 2
    assert "nowhere.toml: cannot be read: No such file" in done.err
    assert "missing: --output" in train(output=()).err
    assert not toy.calls


def test_a_backbone_may_train_one_at_a_time_only(engram, install, world):
    class Lone(Talker):
        train_settings = ToyTraining
        train = default_train_settings = Talker.generate

    install(Lone("lone", "a lone one"))
    (world.folder / "concepts.toml").write_text(LIST, encoding="utf-8")
    done = engram("train", "--backbone", "lone", "--concepts", "concepts.toml", "-o", "made")
    assert done.status == 2
    assert "trains one concept at a time" in done.err
