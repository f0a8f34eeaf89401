"""Engram memories for video generators built on diffusers."""

__version__ = "0.1.0"
