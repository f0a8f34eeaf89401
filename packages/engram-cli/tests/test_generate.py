"""`engram generate`: backbone and model come from the adapters, unless the user says otherwise."""

import json
from pathlib import Path

import pytest
from cli_toys import ToyGeneration

PROMPT = ("-p", "a photo of Aldric")


@pytest.fixture
def adapter(world):
    return world.build("aldric", "Aldric Vortex", backbone="toy", base_model="tiny").name


def test_backbone_and_model_come_from_the_first_adapter(engram, toy, world, adapter):
    world.build("brindle", "Brindle Fennimore", backbone="toy", base_model="other/model", seed=1)
    done = engram("generate", "-a", f"{adapter}@0.8", "--adapter", "brindle.safetensors", *PROMPT)
    assert done.status == 0, done.err
    ((settings, overwrite),) = toy.calls
    adapters = (f"{adapter}@0.8", "brindle.safetensors")
    assert settings == ToyGeneration(adapters=adapters, prompts=("a photo of Aldric",), model="tiny")
    assert not overwrite
    assert toy.models == ["tiny"]


def test_flags_reach_their_settings(engram, toy, adapter):
    flags = ("--seed", 1, "--seed", 2, "--strength", "aldric=0.5", "--strength", "2", "--compare", "--width", "64")
    done = engram("generate", "-a", adapter, *PROMPT, "-p", "b", "-o", "out", *flags, "--guidance", 3, "--force")
    assert done.status == 0, done.err
    ((settings, overwrite),) = toy.calls
    assert settings == ToyGeneration(
        adapters=(adapter,),
        prompts=("a photo of Aldric", "b"),
        output=Path("out"),
        seeds=(1, 2),
        strengths=("aldric=0.5", "2"),
        compare=True,
        width=64,
        guidance=3.0,
        model="tiny",
    )
    assert overwrite


@pytest.mark.parametrize(
    ("file", "flags", "model"),
    [
        ("[generate]\nmodel = 'from/file'", (), "from/file"),
        ("[generate]\nmodel = 'from/file'", ("--model", "from/flag"), "from/flag"),
        ("model = 'of/training'", (), "tiny"),
    ],
)
def test_the_file_beats_the_adapter_and_flags_beat_the_file(engram, toy, world, adapter, file, flags, model):
    toy.advice = {"model": "of/backbone", "guidance": 1.5}
    (world.folder / "engram.toml").write_text(file)
    done = engram("generate", "-a", adapter, *PROMPT, *flags)
    assert done.status == 0, done.err
    ((settings, _),) = toy.calls
    assert (settings.model, settings.guidance) == (model, 1.5)


def test_adapters_may_stand_in_the_file(engram, toy, world, adapter):
    (world.folder / "engram.toml").write_text(f"[generate]\nadapters = ['{adapter}']\nprompts = 'a'\n")
    assert engram("generate").status == 0
    assert toy.calls[0][0].adapters == (adapter,)
    assert engram("generate", "--set", f"adapters=['{adapter}']", "--set", "strengths=['2']", *PROMPT).status == 0
    assert toy.calls[1][0].strengths == ("2",)


def test_texts_that_look_like_numbers_are_texts(engram, toy, world, adapter):
    (world.folder / adapter).rename(world.folder / "3")
    assert engram("generate", "--set", "adapters=3", "--set", "model=1984", *PROMPT).status == 0
    assert toy.calls[0][0].adapters == ("3",)
    assert toy.models == ["1984"]


def test_an_at_sign_may_be_part_of_a_files_name(engram, toy, world, adapter):
    (world.folder / adapter).rename(world.folder / "me@home.safetensors")
    assert engram("generate", "-a", "me@home.safetensors", *PROMPT).status == 0
    assert engram("generate", "-a", "me@home.safetensors@0.5", *PROMPT).status == 0
    (world.folder / "me@home.safetensors").rename(world.folder / "me@2")
    assert engram("generate", "-a", "me@2", *PROMPT).status == 0
    for words, file in (("absent@x", "absent@x"), ("absent@0.5", "absent")):
        done = engram("generate", "-a", words, *PROMPT)
        assert done.status == 1
        assert done.err.startswith(f"error: {file}: ")
    done = engram("generate", "-a", "me@2@much", *PROMPT)
    assert done.status == 1
    assert "error: me@2@much: 'much' after @ is not a number; expected FILE@0.8" in done.err


def test_without_adapters_the_backbone_is_needed(engram, toy, world):
    done = engram("generate", *PROMPT)
    assert done.status == 2
    assert "Error: missing: --backbone; give them" in done.err
    assert engram("generate", *PROMPT, "--backbone", "toy").status == 0
    (world.folder / "engram.toml").write_text('backbone = "toy"\n')
    assert engram("generate", *PROMPT).status == 0
    assert [call[0].model for call in toy.calls] == ["toy/model", "toy/model"]


def test_adapters_of_different_backbones_are_refused(engram, toy, world, adapter):
    world.build("other", "Other One")
    done = engram("generate", "-a", adapter, "-a", "other.safetensors@0.5", *PROMPT)
    assert done.status == 1
    assert done.err == (
        "error: other.safetensors: is for backbone 'example', but aldric.safetensors is for 'toy'; "
        "use each on its own\n"
    )
    done = engram("generate", "-a", adapter, "--backbone", "mute", *PROMPT)
    assert done.status == 1
    assert "aldric.safetensors: is for backbone 'toy', but 'mute' was asked for" in done.err


def test_a_backbone_that_cannot_generate_says_so(engram, toy):
    done = engram("generate", "--backbone", "mute", *PROMPT)
    assert done.status == 1
    assert "backbone 'mute' (a mute) cannot generate in this version; of the installed ones toy can" in done.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "there is no prompt; give --prompt or --prompts-file"),
        ((*PROMPT, "--seed", "x"), "--seed"),
        ((*PROMPT, "--width", "wide"), "command line: width is 'wide', expected a whole number or 'none'"),
        ((*PROMPT, "--set", "model=3", "--set", "seeds=[1, 'x']"), "--set: seeds is [1, 'x'], expected a list"),
        ((*PROMPT, "--steps", "3"), "command line: there is no setting 'steps'"),
        ((*PROMPT, "--config", "gen.toml"), "gen.toml: has no table [generate]"),
        ((*PROMPT, "--config", "bad.toml"), "bad.toml: adapters is 3, expected a list, each item a text"),
    ],
)
def test_wrong_usage(engram, toy, world, words, told):
    (world.folder / "gen.toml").write_text("guidance = 2.0\n")
    (world.folder / "bad.toml").write_text("[generate]\nadapters = 3\n")
    done = engram("generate", "--backbone", "toy", *words)
    assert done.status == 2
    assert told in done.err
    assert not toy.calls


def test_the_report(engram, toy):
    words = ("generate", "--backbone", "toy", *PROMPT, "--seed", 1, "--seed", 2, "--compare")
    done = engram(*words)
    assert done.out.splitlines() == ["wrote images/1.png", "wrote images/2.png", "wrote images/grid.png"]
    assert done.err == "note: 'aldric' stands in the prompt but does not fire in text\n"
    done = engram(*words, "--json")
    file = {"path": "images/1.png", "prompt": "a photo of Aldric", "seed": 1, "identity": None}
    report = json.loads(done.out)
    assert report["files"][0] == file
    assert report["grid"] == "images/grid.png"
    assert report["seconds"] == 2.5
