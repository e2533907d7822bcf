"""Memory for packed weights: NumPy arrays at an aligned address, on huge pages where that is fast.

Decoding touches so many pages that 4 KB ones cost it a fifth of its speed.
"""

from __future__ import annotations

import contextlib
import mmap
from math import prod
from pathlib import Path
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


def anonymous(shape: tuple[int, ...], dtype: str) -> np.ndarray[Any, np.dtype[Any]]:
    """A zeroed array in memory of its own, on huge pages where the system grants them.

    Raises OSError, ValueError or MemoryError when there is not enough address space.
    """
    kind = np.dtype(dtype)
    # mmap.mmap(-1, n) alone would be shared memory, which gets no huge pages by default.
    private = (
        {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    )
    memory = mmap.mmap(-1, max(prod(shape) * kind.itemsize, 1), **private)
    _ask_for_huge_pages(memory)
    return np.frombuffer(memory, np.uint8, prod(shape) * kind.itemsize).view(kind).reshape(shape)


def mapped(path: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """The bytes of a file, read-only; nothing is read before it is touched.

    On a Linux whose filesystem has large folios (measured: ext4 of 6.18) what is read then goes
    into huge pages of the page cache, which all processes share; so does what is written in
    large pieces (tensorfile.BLOCK).
    """
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
    _ask_for_huge_pages(memory)
    return np.frombuffer(memory, np.uint8)


def _ask_for_huge_pages(memory: mmap.mmap) -> None:
    if hasattr(mmap, "MADV_HUGEPAGE"):
        # A kernel without them says EINVAL; ordinary pages are slower, not wrong.
        with contextlib.suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
