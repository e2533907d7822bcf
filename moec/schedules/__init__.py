"""Schedules say how: the backends by kind of target, each imported when it is asked for."""

from __future__ import annotations

import importlib

from ..errors import TargetError
from .base import Backend, Chosen, Packed, Schedule, TokenRange, choose

# Kind of target -> the module whose BACKEND lowers for it.
_BACKENDS = {"cpu": ".cpu", "cuda": ".cuda", "metal": ".metal"}


def backend(kind: str) -> Backend:
    """The backend of a kind of target; TargetError when this version has none."""
    if kind not in _BACKENDS:
        raise TargetError(
            f"there is no backend for {kind!r}", need="one of " + ", ".join(_BACKENDS)
        )
    found: Backend = importlib.import_module(_BACKENDS[kind], __name__).BACKEND
    return found


__all__ = ["Backend", "Chosen", "Packed", "Schedule", "TokenRange", "backend", "choose"]
