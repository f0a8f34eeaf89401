"""Hashed n-gram memories for decoder language models built on transformers."""

__version__ = "0.1.0"
