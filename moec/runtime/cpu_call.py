"""One function of one block on the CPU: the checks of `call`, by a short way where that is enough.

Plain NumPy arrays and torch tensors that fit take the short way, which asks the same questions
without building views; whatever is unusual about a call sends it the long way, which also
explains refusals. A decoding step of a small layer takes some microseconds, and the long way as
many; so here checks are written out in loops instead of calling functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..artifact import Function
from ..spec import ExpertsSpec
from .call import Call
from .libraries import Library
from .tensors import NUMPY_DTYPES, address, torch_kind


class CpuCall(Call):
    """A compiled function of one block on the CPU; safe to call from several threads."""

    def __init__(
        self,
        name: str,
        function: Function,
        library: Library,
        parameters: Callable[[], Mapping[str, Any]],
        spec: ExpertsSpec,
        threads: tuple[int, int],
    ) -> None:
        super().__init__(name, function, library, parameters, spec, threads)
        ports = self._inputs, self._outputs
        # (dtype, further dimensions, bytes of an element) of the inputs and of the outputs.
        self._numpy = tuple([(NUMPY_DTYPES[p.dtype], p.tail, p.size) for p in own] for own in ports)
        self._names = tuple([(p.dtype, p.tail, p.size) for p in own] for own in ports)
        self._torch: tuple[Any, Any, Any] | None = None  # the module, its kind, forms as above

    def __call__(
        self, args: Sequence[Any], out: Any = None, schedule: str | None = None
    ) -> list[Any]:
        """Run the function on tensors; raises what Call raises."""
        done = None
        if type(args[0]) is np.ndarray:
            done = self._arrays(args, out, schedule)
        elif (torch := sys.modules.get("torch")) is not None and type(args[0]) is torch.Tensor:
            done = self._tensors(torch, args, out, schedule)
        return super().__call__(args, out, schedule) if done is None else done

    def _arrays(self, args: Sequence[Any], out: Any, schedule: str | None) -> list[Any] | None:
        """The whole call on NumPy arrays, or None when it is for the long way."""
        shape = args[0].shape
        tokens = shape[0] if shape else 0
        if not tokens:
            return None
        forms, results = self._numpy
        places: list[int] = []
        tensors = args
        if out is not None:
            if type(out) is not np.ndarray or not out.flags.writeable:
                return None
            tensors, forms = (*args, out), forms + results
        number = 0
        for dtype, tail, size in forms:
            array = tensors[number]
            if (
                type(array) is not np.ndarray
                or array.dtype is not dtype
                or array.shape != (tokens, *tail)
                or not array.flags.c_contiguous
            ):
                return None
            place = address(array)
            if place % size:
                return None
            places.append(place)
            number += 1
        if out is not None:
            return self._into(out, tokens, places, schedule)
        made = []
        for dtype, tail, _ in results:
            array = np.empty((tokens, *tail), dtype)
            made.append(array)
            places.append(address(array))
        self._start(self._choose(tokens, schedule), tokens, places)
        return made

    def _tensors(
        self, torch: Any, args: Sequence[Any], out: Any, schedule: str | None
    ) -> list[Any] | None:
        """The whole call on torch tensors, or None when it is for the long way."""
        if self._torch is None or self._torch[0] is not torch:
            kind = torch_kind(torch)
            named = [[(kind.dtypes[n], tail, size) for n, tail, size in f] for f in self._names]
            self._torch = torch, kind, named
        _, kind, (forms, results) = self._torch
        first = args[0]
        tokens = first.shape[0] if first.dim() else 0
        if not tokens:
            return None
        places: list[int] = []
        tensors = args
        if out is not None:
            tensors, forms = (*args, out), forms + results
        number = 0
        try:
            for dtype, tail, size in forms:
                tensor = tensors[number]
                if (
                    type(tensor) is not torch.Tensor
                    or tensor.dtype is not dtype
                    or tensor.shape != (tokens, *tail)
                    or not tensor.is_cpu
                    or tensor.layout is not kind.strided
                    or tensor.requires_grad
                    or not tensor.is_contiguous()
                    or tensor.is_neg()
                ):
                    return None
                place = tensor.data_ptr()
                if place % size:
                    return None
                places.append(place)
                number += 1
        except RuntimeError:  # nested tensors do not even say whether they fit
            return None
        if out is not None:
            return self._into(out, tokens, places, schedule)
        made = []
        for dtype, tail, _ in results:
            # Takes half the time of torch.empty, where the dtype need not be named.
            same = dtype is first.dtype
            tensor = first.new_empty(tokens, *tail, **({} if same else {"dtype": dtype}))
            made.append(tensor)
            places.append(tensor.data_ptr())
        self._start(self._choose(tokens, schedule), tokens, places)
        return made

    def _into(
        self, out: Any, tokens: int, places: list[int], schedule: str | None
    ) -> list[Any] | None:
        """Run into the caller's output, the last of the places, if it overlaps no input."""
        if not self._apart(places[:-1], places[-1], tokens):
            return None
        self._start(self._choose(tokens, schedule), tokens, places)
        return [out]
