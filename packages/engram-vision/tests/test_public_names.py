"""The package offers its functions by name, whatever was imported before, and loads PyTorch for none but those."""

import subprocess
import sys

import pytest

import engram_vision

FUNCTIONS = ["generate", "list_engrams", "load_engram", "train", "unload_engrams"]


def test_every_public_name_is_what_it_says():
    for name in engram_vision.__all__:
        value = getattr(engram_vision, name)
        assert name == "__version__" or value.__name__ == name
    assert dir(engram_vision) == sorted(engram_vision.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        engram_vision.generat  # noqa: B018


def test_functions_are_functions_when_the_modules_of_others_came_first():
    # A module of a function's name would take its place in the package as soon as anything imports it.
    for name in FUNCTIONS:
        assert callable(getattr(engram_vision, name))
        assert f"engram_vision.{name}" not in sys.modules


def test_settings_come_without_pytorch():
    code = (
        "import sys, engram_vision\n"
        "from engram_vision import SD15GenerateSettings, SD15TrainSettings\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
