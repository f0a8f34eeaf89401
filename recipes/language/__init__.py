"""TinyEngram's published experiments with language models, as commands here: docs/experiments-language.md."""
