"""The command as a whole: help, imports, errors, doctor."""

import json
import subprocess
import sys

import pytest

COMMANDS = ["merge", "extract", "inspect", "convert", "push", "doctor", "train", "generate", "data", "eval", "demo"]


def modules_after(world, *arguments):
    """Return the modules loaded when a command ends."""
    code = (
        "import sys\nfrom engram_cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=world.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_help_lists_every_command(world):
    done = world.run("--help")
    assert done.status == 0
    for name in COMMANDS:
        assert f" {name} " in done.out


def test_an_unknown_command_is_wrong_usage_that_knows_all_others(engram):
    done = engram("trian")
    assert done.status == 2
    assert "trian" in done.err
    assert "train" in done.err.replace("trian", "")


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_has_an_example(engram, name):
    done = engram(name, "--help")
    assert done.status == 0
    assert "Example" in done.out
    assert f"engram {name}" in done.out


def test_version(world):
    assert world.run("--version").out.startswith("engram 0.")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["generate", "--help"],
        ["eval", "--help"],
        ["demo", "--help"],
        ["data", "--help"],
        ["data", "caption", "--help"],
        ["data", "normalize", "--help"],
    ],
)
def test_help_imports_neither_torch_nor_numpy(world, arguments):
    loaded = modules_after(world, *arguments)
    assert "typer" in loaded
    assert not {"torch", "numpy", "transformers", "engram_core", "rich"} & loaded


def test_inspect_imports_neither_torch_nor_rich(world):
    loaded = modules_after(world, "inspect", world.build("aldric", "Aldric Vortex"))
    assert "engram_core" in loaded
    # It must answer at once.
    assert not {"torch", "transformers", "diffusers", "rich", "tokenizers", "huggingface_hub"} & loaded
    assert "engram_core.hub" not in loaded


def test_inspecting_a_memory_imports_neither_torch_nor_rich(world):
    loaded = modules_after(world, "inspect", world.build_memory("biomedicine"))
    assert not {"torch", "transformers", "rich", "tokenizers", "huggingface_hub"} & loaded


def test_inspecting_a_prompt_imports_no_torch(world):
    options = ("--tokenizer", "text=tokenizer.json", "--prompt", "a photo of Aldric Vortex")
    loaded = modules_after(world, "inspect", world.build("aldric", "Aldric Vortex"), *options)
    assert "tokenizers" in loaded
    assert not {"torch", "transformers", "diffusers"} & loaded


def test_merge_imports_no_torch(world):
    assert not {"torch", "transformers"} & modules_after(world, "merge", world.build("aldric", "Aldric Vortex"))


def test_a_mistyped_backbone_is_noticed(world):
    done = world.run("train", "--backbone", "wan2")
    assert done.status == 1
    assert "did you mean 'wan22'?" in done.err or "installed: none" in done.err


@pytest.mark.parametrize("arguments", [("--debug", "inspect", "absent"), ("inspect", "absent", "--debug")])
def test_debug_shows_the_traceback(world, arguments):
    assert "Traceback" not in world.run("inspect", "absent").err
    done = world.run(*arguments)
    assert done.status == 1
    assert "Traceback" in done.err
    assert "AdapterReadError" in done.err


def test_doctor_finds_this_installation_sound(world):
    done = world.run("doctor", "--json")
    assert done.status == 0, done.out
    states = {row["what"]: row["status"] for row in done.json["checks"]}
    assert states["Python"] == states["engram-core"] == states["numpy"] == "ok"
    assert done.json["free_bytes"] > 0
    assert "engram-core" in world.run("doctor").out


def test_doctor_reports_a_backbone_that_cannot_be_imported(world):
    info = world.folder / "site" / "broken_backbone-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backbone\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[engram.backbones]\nbroken = no_such_module:BACKBONE\n")
    done = world.run("doctor", "--json", env={"PYTHONPATH": str(world.folder / "site")})
    assert done.status == 1
    row = next(row for row in done.json["checks"] if row["what"] == "backbone broken")
    assert row["status"] == "broken"
    assert "no_such_module" in row["state"]
    assert "broken-backbone 1.0" in row["state"]


def test_doctor_reports_another_project_of_our_name(world):
    info = world.folder / "site" / "engram_impostor-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: engram-impostor\nVersion: 1.0\n")
    (info / "RECORD").write_text("engram_core/__init__.py,,\n")
    done = world.run("doctor", "--json", env={"PYTHONPATH": str(world.folder / "site")})
    assert done.status == 1
    assert any(row["what"] == "engram-impostor" for row in done.json["checks"])


def test_json_output_is_json_alone(world):
    done = world.run("merge", world.build("aldric", "Aldric Vortex"), "--json")
    assert json.loads(done.out)["concepts"] == ["aldric"]
    assert done.err == ""
