"""The small world: drawn subjects in drawn scenes, with captions, and the tiny checkpoints trained on it.

From the repository's root, `uv run python -m recipes.small_world` makes everything that ships as `--model tiny`.
"""
