"""Memory that kernels write packed weights to: NumPy arrays at an aligned address."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np

ALIGNMENT = 64  # bytes: a cache line, and the widest vector


def aligned(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """An uninitialised array that starts at a multiple of ALIGNMENT."""
    kind = np.dtype(dtype)
    size = prod(shape) * kind.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(kind).reshape(shape)
