"""`moec selftest`: every schedule of a target on this machine, checked and timed."""

from .main import main

__all__ = ["main"]
