"""engram_video: memories for video generators in diffusers, backbone `wan22`.

So far: the backbone's stream and tokenizer. Training and generation are not part of this version.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
