"""Glosses: the definitions of WordNet as texts, and the tiny language model trained on them.

From the repository's root, `uv run python -m recipes.glosses` makes everything that ships as `--model tiny` of `qwen3`.
"""
