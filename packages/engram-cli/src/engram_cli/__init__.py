"""engram_cli: the `engram` command."""

__version__ = "0.1.0"

__all__ = ["__version__"]
