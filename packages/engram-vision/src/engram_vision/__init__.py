"""Engram memories for image generators built on diffusers."""

__version__ = "0.1.0"
