"""The reference pages leave no public name out."""

import importlib
import re
from pathlib import Path

import pytest

REFERENCE = Path(__file__).parents[1] / "reference"
PACKAGES = ("engram_core", "engram_vision", "engram_video", "engram_llm")
PAGES = {package: f"{package.removeprefix('engram_')}.md" for package in PACKAGES}


@pytest.mark.parametrize("package", PAGES)
def test_every_public_name_is_on_its_page(package: str) -> None:
    page = (REFERENCE / PAGES[package]).read_text("utf-8")
    shown = set(re.findall(r"^::: ([\w.]+)$", page, re.M))
    module = importlib.import_module(package)
    missing = {name for name in module.__all__ if not name.startswith("__")}
    for name in sorted(missing):
        thing = getattr(module, name)
        home = getattr(thing, "__module__", None)
        others = str(home).startswith("engram_") and not str(home).startswith(f"{package}.")
        if {f"{package}.{name}", home, f"{home}.{name}"} & shown or (others and f"`{name}`" in page):
            missing.discard(name)
    assert not missing, f"add {', '.join(sorted(missing))} to docs/reference/{PAGES[package]}"
