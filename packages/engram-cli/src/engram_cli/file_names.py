"""File names made from the names of concepts."""

from __future__ import annotations

import re


def file_name(name: str, otherwise: str) -> str:
    """Return the file name of an adapter that has this name; `otherwise` gives it where nothing of the name can."""
    slug = re.sub(r"[^\w]+", "-", name.lower()).strip("-")
    return f"{slug or otherwise}.safetensors"
