"""engram_vision: memories for image generators in diffusers, backbones `sd15` and `sd35`.

So far: the backbones' streams and tokenizers, and import of TinyEngram checkpoints. Training and generation
are not part of this version.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
