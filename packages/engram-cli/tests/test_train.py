"""`engram train`: what the user chose reaches the backbone, and what is wrong is told before anything runs."""

import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
from cli_toys import Mute, Toy, ToyTraining

NEEDED = ("--data", "pictures", "--trigger", "Aldric Vortex", "-o", "aldric.safetensors")
TOY = ("train", "--backbone", "toy")


def write(world, text, name="engram.toml"):
    (world.folder / name).write_text(text, encoding="utf-8")


def settings_of(toy, **changes):
    """The settings of the only call, and what they should be."""
    ((settings, _, _),) = toy.calls
    expected = {"data": Path("pictures"), "trigger": "Aldric Vortex", "output": Path("aldric.safetensors"), **changes}
    return settings, ToyTraining(**expected)


# What reaches the backbone


def test_only_what_was_given_counts(engram, toy):
    done = engram(*TOY, *NEEDED)
    assert done.status == 0, done.err
    settings, expected = settings_of(toy)
    assert settings == expected


def test_flags_reach_their_settings(engram, toy):
    flags = ("--steps", 20, "--vector-rate", "1e-2", "--flip", "--keep", "last", "--model", "tiny")
    done = engram(*TOY, *NEEDED, *flags, "--preview-prompt", "a", "--preview-prompt", "b")
    assert done.status == 0, done.err
    settings, expected = settings_of(
        toy, steps=20, vector_rate=0.01, flip=True, keep="last", model="tiny", preview_prompts=("a", "b")
    )
    assert settings == expected


@pytest.mark.parametrize(("text", "norm"), [("none", None), ("2", 2.0), ("0.5", 0.5)])
def test_numbers_that_may_be_none(engram, toy, text, norm):
    assert engram(*TOY, *NEEDED, "--max-grad-norm", text).status == 0
    assert toy.calls[0][0].max_grad_norm == norm


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("beats=12", {"beats": 12}),
        ("vector_rate=1e-2", {"vector_rate": 0.01}),
        ("flip=true", {"flip": True}),
        ('preview_prompts=["a", "b"]', {"preview_prompts": ("a", "b")}),
        ("preview_prompts=1984", {"preview_prompts": ("1984",)}),
        ("motif=a=b", {"motif": "a=b"}),
        ("motif=1984", {"motif": "1984"}),
        ('motif="quoted"', {"motif": "quoted"}),
        ("motif=1\nflip = true", {"motif": "1\nflip = true"}),
        ("max_grad_norm=none", {"max_grad_norm": None}),
    ],
)
def test_set_reaches_any_setting(engram, toy, text, changes):
    done = engram(*TOY, *NEEDED, "--set", text)
    assert done.status == 0, done.err
    settings, expected = settings_of(toy, **changes)
    assert settings == expected


def test_flags_beat_the_file_beats_the_backbone_beats_the_class(engram, toy, world):
    toy.advice = {"steps": 20, "vector_rate": 2.0, "keep": "last", "beats": 1}
    write(world, "steps = 30\nvector_rate = 3.0\nbeats = 2\nflip = true\n")
    done = engram(*TOY, *NEEDED, "--steps", 40, "--set", "beats=3", "--no-flip")
    assert done.status == 0, done.err
    settings, expected = settings_of(toy, steps=40, vector_rate=3.0, keep="last", beats=3, flip=False)
    assert settings == expected


@pytest.mark.parametrize(
    ("file", "flags", "model"),
    [
        ("", (), "toy/model"),
        ("model = 'from/file'", (), "from/file"),
        ("model = 'from/file'", ("--set", "model=from/set"), "from/set"),
        ("model = 'from/file'", ("--model", "tiny"), "tiny"),
    ],
)
def test_the_backbone_is_asked_for_defaults_of_the_chosen_model(engram, toy, world, file, flags, model):
    write(world, file)
    assert engram(*TOY, *NEEDED, *flags).status == 0
    assert toy.models == [model]


def test_resume_and_force_reach_the_backbone(engram, toy):
    for flags in [(), ("--resume",), ("--force",), ("--resume", "--force")]:
        assert engram(*TOY, *NEEDED, *flags).status == 0
    assert [call[1:] for call in toy.calls] == [(False, False), (True, False), (False, True), (True, True)]


BACKBONES = {
    "SD15": "engram_vision.sd15",
    "SDXL": "engram_vision.sdxl",
    "SD35": "engram_vision.sd35",
    "WAN22": "engram_video.wan22",
    "QWEN3": "engram_llm.qwen3",
}


@pytest.mark.parametrize("command", ["train", "generate", "eval", "clips"])
def test_every_setting_of_what_draws_has_a_flag_and_no_flag_is_without_one(command):
    import typer

    from engram_cli.main import build_app
    from engram_cli.options import NOT_SETTINGS

    commands = typer.main.get_command(build_app()).commands
    flags = {each.name for each in (commands | commands["data"].commands)[command].params} - NOT_SETTINGS - {"help"}
    attribute = {"eval": "evaluate_settings"}.get(command, f"{command}_settings")
    named = {}
    for name, place in BACKBONES.items():
        kind = getattr(getattr(pytest.importorskip(place), name), attribute, None)
        named[name] = {field.name for field in fields(kind)} if kind else set()
    texts = named.pop("QWEN3")  # some of what it has is rarely set, and left to --set
    drawn = set.union(*named.values())
    assert drawn <= flags <= drawn | texts


# The file


def test_all_can_stand_in_the_file(engram, toy, world):
    write(world, 'backbone = "toy"\ndata = "pictures"\ntrigger = "Aldric Vortex"\noutput = "aldric.safetensors"\n')
    done = engram("train")
    assert done.status == 0, done.err
    settings, expected = settings_of(toy)
    assert settings == expected


def test_a_table_for_each_command(engram, toy, world):
    write(world, '\ufeffbackbone = "mute"\n[train]\nbackbone = "toy"\nsteps = 30\n[generate]\nsteps = 99\n')
    assert engram("train", *NEEDED).status == 0
    assert toy.calls[0][0].steps == 30


def test_another_file_can_be_named_and_the_flag_beats_its_backbone(engram, toy, world):
    write(world, "nonsense")
    write(world, 'backbone = "mute"\nsteps = 30\n', "other.toml")
    assert engram(*TOY, *NEEDED, "--config", "other.toml").status == 0
    assert toy.calls[0][0].steps == 30


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("steps 3\n", "engram.toml: is not TOML: Expected '=' after a key in a key/value pair (at line 1, column 7)"),
        ("a = 1\n\nsteps = 3 3\n", "(at line 3, column 11)"),
        ("stepz = 3", "engram.toml: there is no setting 'stepz'; did you mean 'steps'?"),
        ("max-grad-norm = 3", "engram.toml: there is no setting 'max-grad-norm'; did you mean 'max_grad_norm'?"),
        ("steps = 'many'", "engram.toml: steps is 'many', expected a whole number"),
        ("trigger = 'x'\nsteps = 0", "steps is 0, expected at least 1"),
        ("[trian]\nsteps = 3", "engram.toml: there is no table [trian]; did you mean [train]?; the tables are [train]"),
        ("steps = 3\n[train]\nflip = true", "engram.toml: steps stands outside of [train]; move it there"),
        ("train = 3", "engram.toml: train is not a table; write its settings under [train]"),
        ("backbone = 3", "engram.toml: backbone is 3, expected a text"),
        ("trigger = 1984-01-01", "expected a text"),
    ],
)
def test_what_is_wrong_in_the_file_is_wrong_usage(engram, toy, world, text, told):
    write(world, text)
    done = engram(*TOY, *NEEDED[:2], *NEEDED[4:])
    assert done.status == 2
    assert told in done.err
    assert not toy.calls


def test_all_faults_of_file_and_flags_are_told_together(engram, toy, world):
    write(world, "stepz = 3\nflip = 1\n")
    done = engram(*TOY, *NEEDED, "--keep", "worst", "--set", "beats=many", "--batch-size", 3)
    assert done.status == 2
    assert done.err.splitlines()[-6:] == [
        "Error: 5 settings are wrong:",
        "engram.toml: there is no setting 'stepz'; did you mean 'steps'?",
        "engram.toml: flip is 1, expected true or false",
        "--set: beats is 'many', expected a whole number",
        "command line: there is no setting 'batch_size'",
        "command line: keep is 'worst', expected one of best, last",
    ]


def test_a_file_that_cannot_be_read_is_wrong_usage(engram, toy, world):
    assert "absent.toml: cannot be read: No such file" in engram(*TOY, *NEEDED, "--config", "absent.toml").err
    (world.folder / "engram.toml").write_bytes(b"trigger = '\xff'")
    done = engram(*TOY, *NEEDED)
    assert done.status == 2
    assert "engram.toml: is not UTF-8 text: invalid start byte at byte 11" in done.err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--steps", "many"), "--steps"),
        (("--set", "beats"), "'beats' is not NAME=VALUE"),
        (("--set", "=3"), "'=3' is not NAME=VALUE"),
        (("--set", "beats=3", "--set", "beats=4"), "beats is given twice"),
        (("--set", "steps=3", "--steps", "4"), "steps is given twice"),
        (("--set", "beat=3"), "--set: there is no setting 'beat'; did you mean 'beats'?"),
        (("--max-grad-norm", "much"), "command line: max_grad_norm is 'much', expected a number or 'none'"),
    ],
)
def test_wrong_flags_are_wrong_usage(engram, toy, flags, told):
    done = engram(*TOY, *NEEDED, *flags)
    assert done.status == 2
    assert told in done.err
    assert not toy.calls


# What is missing


def test_all_that_is_missing_is_named_in_one_usage_error(engram, toy):
    done = engram(*TOY, "--trigger", "Aldric")
    assert done.status == 2
    told = "Error: missing: --data, --output; give them on the command line or in engram.toml"
    assert done.err.splitlines()[-1] == told


def test_the_backbone_is_named_with_the_rest(engram, toy):
    done = engram("train", "--trigger", "Aldric")
    assert done.status == 2
    assert "Error: missing: --backbone, --data, --output; give them" in done.err
    toy.advice = {"steps": "wrong"}
    assert "Error: missing: --backbone; give them" in engram("train").err


def test_what_no_backbone_can_is_said(engram, toy, install):
    done = engram("train", "--backbone", "mute")
    assert done.status == 1
    assert done.err == (
        "error: engram train: backbone 'mute' (a mute) cannot train in this version; of the installed ones toy can\n"
    )
    install(Mute())
    assert "in this version; no installed one can" in engram("train", "--backbone", "mute").err
    done = engram("train")
    assert done.status == 1
    assert "no installed backbone can train; install engram-vision from this repository" in done.err
    install(Mute("sd15"))
    assert "engram doctor shows what is installed and works" in engram("train").err


def test_a_backbone_that_is_not_installed_says_where_to_get_it(engram, install):
    install()
    done = engram("train", "--backbone", "wan22")
    assert done.status == 1
    assert "backbone 'wan22' is not installed; installed: none; install engram-video from this repository" in done.err
    assert "packages named engram-* belong to others" in done.err
    assert engram("train", "--backbone", "wan2").err.endswith("is not installed; installed: none\n")


def test_a_broken_backbone_does_not_hide_the_others(engram, install):
    install(Mute("broken"), Toy())
    import importlib.metadata

    def fail():
        raise RuntimeError("broken")

    importlib.metadata.entry_points(group="engram.backbones")[0].load = fail
    assert "missing: --backbone, --data" in engram("train").err


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_in_a_terminal_it_asks(world, toy_site):
    done = talk(world, toy_site, ["train", "--data", "pictures", "--json"], ["toy", "", "Aldric", "a.safetensors"])
    assert done.status == 0, done.out
    assert re.search(r"^backbone \(one of (.*, )?toy(, .*)?\): toy$", done.out, re.M)
    assert done.out.count("trigger (Phrase that will recall the subject): ") == 2  # no answer is no answer
    assert "output (Adapter file to write): " in done.out
    assert '"output": "a.safetensors"' in done.out


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_an_interrupted_question_is_status_130(world, toy_site):
    done = talk(world, toy_site, ["train"], ["\x03"])
    assert done.status == 130
    assert done.out.splitlines()[-1] == "error: interrupted; no file was left half-written"


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals")
def test_a_wrong_answer_is_wrong_usage(world, toy_site):
    done = talk(world, toy_site, [*TOY, *NEEDED[:4], "--steps", "0"], ["a.safetensors"])
    assert done.status == 2
    assert "steps is 0, expected at least 1" in done.out


def talk(world, site, words, answers):
    """Run the command in a terminal of its own, answering each question; both streams come as one."""
    import fcntl
    import pty
    import termios

    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_cli", *words],
        cwd=world.folder,
        env={**os.environ, **site, "TERM": "dumb", "NO_COLOR": "1"},
        stdin=other,
        stdout=other,
        stderr=other,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(other, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(other)
    shown, left, last = "", list(answers), b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if not select.select([main], [], [], 5)[0]:
            # Python misses a Ctrl-C that comes just before it begins to wait; people press it again.
            if last == b"\x03":
                os.write(main, last)
            continue
        try:
            shown += os.read(main, 4096).decode()
        except OSError:  # the other side is closed
            break
        if left and shown.endswith(": "):
            answer = left.pop(0)
            last = answer.encode() if answer == "\x03" else f"{answer}\n".encode()
            os.write(main, last)
    else:
        process.kill()
    os.close(main)
    return SimpleNamespace(status=process.wait(timeout=20), out=shown.replace("\r\n", "\n"))


# How it ends


def test_the_report(engram, toy):
    done = engram(*TOY, *NEEDED)
    assert done.out.splitlines() == [
        "wrote aldric.safetensors: 7 entries in text, 1 entry in other, 1.2 kB",
        f"identity {'ab' * 32}",
        "kept step 9 of 10, loss 0.1235; took 1 min 23 s",
        "run folder aldric.run",
    ]
    assert done.err.splitlines() == [
        "training: 0/10",
        "note: a picture is small",
        *[line for line in done.err.splitlines() if line.startswith("training: 10/10, loss 0.25, memory 1.5 GB")],
    ]
    assert done.err.count("training") == 2


def test_the_report_as_json(engram, toy):
    import json

    done = engram(*TOY, *NEEDED, "--json")
    assert json.loads(done.out) == {
        "output": "aldric.safetensors",
        "identity": "ab" * 32,
        "bytes": 1234,
        "entries": {"text": 7, "other": 1},
        "steps": 10,
        "kept_step": 9,
        "loss": 0.123456,
        "run_dir": "aldric.run",
        "seconds": 83.2,
    }
    assert done.err == "note: a picture is small\n"


def test_what_the_backbone_refuses_is_one_line_and_status_1(engram, toy):
    words = (*TOY, "--data", "pictures", "--trigger", "fail", "-o", "x.safetensors")
    done = engram(*words)
    assert done.status == 1
    assert done.err.splitlines()[-1] == "error: pictures: has no captions; write some"
    assert "Traceback" not in done.err


def test_an_interrupted_run_says_how_to_go_on_with_the_same_settings(engram, toy, world):
    write(world, "vector_rate = 3.0\n")
    flags = (
        "--no-flip",
        "--steps",
        7,
        "--preview-prompt",
        "it's a",
        "--preview-prompt",
        "b",
        "--max-grad-norm",
        "none",
    )
    done = engram(*TOY, *NEEDED[:2], *NEEDED[4:], "--trigger", "stop", *flags, "--set", "motif=a b", "--force")
    assert done.status == 130
    line = done.err.splitlines()[-1]
    start = "error: interrupted; go on with: engram train "
    assert line.startswith(start)
    assert "--resume" in line
    assert "--force" not in line
    again = shlex.split(line.removeprefix(start))
    assert engram("train", *again).status == 130
    (first, *_), (second, resume, overwrite) = toy.calls
    assert second == first
    assert (resume, overwrite) == (True, False)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_is_one_line_and_status_130(world, toy_site):
    words = [*TOY, "--data", "pictures", "--trigger", "wait", "-o", "x.safetensors"]
    process = subprocess.Popen(
        [sys.executable, "-m", "engram_cli", *words],
        cwd=world.folder,
        env={**os.environ, **toy_site, "NO_COLOR": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr.readline() == "training: 0/10\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.splitlines()[-1] == (
        "error: interrupted; go on with: engram train --data pictures --trigger wait --output x.safetensors "
        "--backbone toy --resume"
    )
    assert "Traceback" not in err
