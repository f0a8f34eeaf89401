"""The small world: drawn subjects in drawn scenes, with captions, and the tiny checkpoints trained on it.

`uv run --group recipes python -m recipes.small_world --help` (from the repository's root) makes everything that ships as `--model tiny`.
"""
