"""Gives every layer its parameters in the memory of a CUDA device, copied when first used."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from ..artifact import Block
from . import cuda
from .binding import Binding


class GpuBinding:
    """The parameters of an artifact's layers on one device; safe to use from several threads."""

    def __init__(self, host: Binding, device: int) -> None:
        self._host, self._device = host, device
        self._bound: dict[int, Mapping[str, cuda.Memory]] = {}
        self._lock = threading.Lock()

    def parameters(self, block: Block) -> Mapping[str, cuda.Memory]:
        """Parameters of a layer by name; raises what Binding raises, and ResourceError."""
        if block.layer not in self._bound:
            with self._lock:
                if block.layer not in self._bound:
                    self._bound[block.layer] = self._copy(block)
        return self._bound[block.layer]

    def _copy(self, block: Block) -> Mapping[str, cuda.Memory]:
        dtypes = self._host.dtypes(block)
        with cuda.current(self._device):
            copied = {
                name: cuda.Memory(array, dtypes[name])
                for name, array in self._host.parameters(block).items()
            }
        self._host.forget(block)
        return copied
