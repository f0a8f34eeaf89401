"""engram_llm: hashed n-gram memories for decoder language models in transformers, backbone `qwen3`.

So far: the backbone's tokenizer; the addresses are `engram_core.NgramHash`. The module itself, training and
generation are not part of this version.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
