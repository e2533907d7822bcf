"""One function of one block on the CPU: NumPy arrays and torch tensors go the short way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import pool
from .native import Thread, reads_arrays
from .short import ShortCall
from .tensors import NUMPY_DTYPES, torch_kind


class CpuCall(ShortCall):
    """A compiled function of one block on the CPU; safe to call from several threads."""

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors; raises what Call raises."""
        kind, done = type(args[0]), None
        if kind is np.ndarray:
            done = self._arrays(args, out, schedule) if reads_arrays() else None
        elif kind is self._plain or self._takes(kind):
            done = self._short(args, out, schedule)
        return super().__call__(args, out, schedule) if done is None else done

    def _arrays(self, args: Sequence[Any], out: Any, schedule: str | None) -> list[Any] | None:
        """The whole call on NumPy arrays, or None when it is for the long way."""
        native = self._frames.last
        if native is None or native.schedule != schedule:
            native = self._turn(args[0], schedule)
        while native is not None:
            if out is None:
                results = []
                for shape, dtype in native.forms:
                    results.append(np.empty(shape, NUMPY_DTYPES[dtype]))
            else:
                results = [out]
            code = native.call(native.place, None, *args, *results)
            if not code:
                return results
            native = self._mend(code, native, args[0], schedule)
        return None

    def _place(self) -> Thread:
        return pool.thread()

    def _meet(self, torch: Any) -> None:
        pool.use_threads_of(torch)
        super()._meet(torch)

    def _kind_of(self, torch: Any) -> Any:
        return torch_kind(torch)
