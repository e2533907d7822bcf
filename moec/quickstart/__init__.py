"""The main job as a demonstration: a checkpoint, compiled, loaded, checked and timed."""

from .main import main

__all__ = ["main"]
