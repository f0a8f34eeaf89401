"""The package offers its functions by name, whatever was imported before, and loads PyTorch for none but those."""

import subprocess
import sys

import pytest

import engram_video

FUNCTIONS = ["build_clips", "evaluate", "generate", "list_engrams", "load_engram", "train", "unload_engrams"]


def test_every_public_name_is_what_it_says():
    for name in engram_video.__all__:
        value = getattr(engram_video, name)
        assert name == "__version__" or value.__name__ == name
    assert dir(engram_video) == sorted(engram_video.__all__)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        engram_video.generat  # noqa: B018


def test_functions_are_functions_when_the_modules_of_others_came_first():
    # A module of a function's name would take its place in the package as soon as anything imports it.
    for name in FUNCTIONS:
        assert callable(getattr(engram_video, name))
        assert f"engram_video.{name}" not in sys.modules


def test_settings_come_without_pytorch():
    code = (
        "import sys, engram_video\n"
        "from engram_video import Wan22EvaluateSettings, Wan22TrainSettings\n"
        "print(sorted({'torch', 'diffusers', 'transformers'} & sys.modules.keys()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
