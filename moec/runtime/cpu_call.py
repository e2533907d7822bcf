"""One function of one block on the CPU: the checks of `call`, by a short way where that is enough.

Plain NumPy arrays that fit take a short way, which asks the same questions without building
views, and torch tensors that of `direct`; whatever is unusual about a call sends it the long way,
which also explains refusals. A decoding step of a small layer takes some microseconds, and the
long way as many; so here checks are written out in loops instead of calling functions.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .call import Forms, Prepared
from .direct import DirectCall
from .pool import use_threads_of, use_workers, workspace
from .tensors import NUMPY_DTYPES, address, torch_kind


class CpuCall(DirectCall):
    """A compiled function of one block on the CPU; safe to call from several threads."""

    @functools.cached_property
    def _numpy(self) -> Forms:
        return Forms(self._choose, (self._inputs, self._outputs), NUMPY_DTYPES)

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors; raises what Call raises."""
        done = None
        if type(args[0]) is np.ndarray:
            done = self._arrays(args, out, schedule)
        elif (torch := sys.modules.get("torch")) is not None and type(args[0]) is torch.Tensor:
            done = self._short(torch, args, out, schedule)
        return super().__call__(args, out, schedule) if done is None else done

    def _arrays(self, args: Sequence[Any], out: Any, schedule: str | None) -> list[Any] | None:
        """The whole call on NumPy arrays, or None when it is for the long way."""
        shape = args[0].shape
        tokens = shape[0] if shape else 0
        if not tokens:
            return None
        index, forms, results = self._numpy.at(tokens, schedule)
        places: list[int] = []
        tensors = args
        if out is not None:
            if type(out) is not np.ndarray or not out.flags.writeable:
                return None
            tensors, forms = (*args, out), forms + results
        number = 0
        for dtype, wanted, size in forms:
            array = tensors[number]
            if (
                type(array) is not np.ndarray
                or array.dtype is not dtype
                or array.shape != wanted
                or not array.flags.c_contiguous
            ):
                return None
            place = address(array)
            if place % size:
                return None
            places.append(place)
            number += 1
        if out is not None:
            return self._into(out, tokens, places, index)
        made = []
        for dtype, wanted, _ in results:
            array = np.empty(wanted, dtype)
            made.append(array)
            places.append(address(array))
        self._start(index, tokens, places)
        return made

    def _meet(self, torch: Any) -> None:
        use_threads_of(torch)
        super()._meet(torch)

    def _kind_of(self, torch: Any) -> Any:
        return torch_kind(torch)

    def _go(self, ready: Prepared, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        ready.space.data = workspace(ready.size)
        use_workers(self._workers)
        function(*arguments)

    def _into(self, out: Any, tokens: int, places: list[int], index: int) -> list[Any] | None:
        """Run into the caller's output, the last of the places, if it overlaps no input."""
        if not self._apart(places[:-1], places[-1], tokens):
            return None
        self._start(index, tokens, places)
        return [out]
