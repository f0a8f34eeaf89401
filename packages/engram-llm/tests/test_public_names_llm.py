"""The package offers its functions by name, and loads PyTorch for none but those."""

import subprocess
import sys

import pytest

import engram_llm


def test_every_public_name_is_what_it_says():
    for name in engram_llm.__all__:
        value = getattr(engram_llm, name)
        assert name == "__version__" or value.__name__ == name
    assert dir(engram_llm) == sorted(engram_llm.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load'"):
        engram_llm.load  # noqa: B018


def test_settings_and_backbone_come_without_pytorch():
    code = (
        "import sys, engram_llm\n"
        "from engram_llm import EvaluateSettings, GenerateSettings, TrainSettings\n"
        "from engram_llm.qwen3 import QWEN3\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys()))\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
