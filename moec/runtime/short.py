"""The short way of a call: the tensors are handed to C as they are, which asks what `call` asks.

It is for tensors in the form that the compiled function wants, with the T of the call before: all
that a decoding step is. Another T turns the frame to it, and whatever C refuses goes the long way,
which explains it. torch's tensors are read through torch's C interface (torch 2.10 and later);
asked here is only what that does not tell.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from . import pool
from .call import Call, Prepared
from .native import REFUSED, UNREADY, Device, Native, Thread, exchange
from .tensors import NUMPY_DTYPES

# What torch raises for tensors that its interface does not take, or that no others are like.
_REFUSED = (AttributeError, BufferError, IndexError, RuntimeError, TypeError, ValueError)


class ShortCall(Call):
    """A call with the short way; a subclass says which tensors it takes, and what a run needs."""

    alignment = 0  # of addresses in bytes; 0: the size of an element
    _met: Any = None  # torch as it was when what follows was made of it
    _plain: Any = None  # its tensors, where it tells C of them
    _exchange: int | None = None  # by this interface

    def _kind_of(self, torch: Any) -> Any:
        """The kind of torch's tensors on this device."""
        raise NotImplementedError

    def _place(self) -> Thread | Device | None:
        """Where a call of the calling thread runs; None where C cannot do it."""
        raise NotImplementedError

    def _takes(self, kind: type[Any]) -> bool:
        """Whether tensors of this type are for `_short`."""
        torch = sys.modules.get("torch")
        if torch is not self._met and hasattr(torch, "Tensor"):
            self._meet(torch)
        return kind is self._plain

    def _meet(self, torch: Any) -> None:
        self._kind = self._kind_of(torch)
        self._exchange = exchange(torch)
        self._like, self._grad = torch.empty_like, torch.is_grad_enabled
        first = self._inputs[0]
        # What need not be said costs no time: torch reads a shape in 0.7 us.
        self._alike = len(self._outputs) == 1 and all(
            (port.dtype, port.tail) == (first.dtype, first.tail) for port in self._outputs
        )
        self._met = torch
        # Last: another thread takes the short way from here on.
        self._plain = torch.Tensor if self._exchange else None

    def _short(self, args: Sequence[Any], out: Any, schedule: str | None) -> list[Any] | None:
        """The whole call with tensors of the torch that was met; None: it is for the long way.

        That judges subclasses, which may mean anything by their attributes, tensors for
        autograd and negated views.
        """
        plain, graph, first = self._plain, self._grad(), args[0]
        # No function for this: calling one costs as much as what is asked.
        for tensor in args if out is None else (*args, out):
            if type(tensor) is not plain or tensor.is_neg() or (graph and tensor.requires_grad):
                return None
        native = self._frames.last
        try:
            if native is None or native.schedule != schedule:
                native = self._turn(first, schedule)
            while native is not None:
                if out is not None:
                    results = [out]
                else:
                    results = [self._like(first)] if self._alike else self._more(first, native)
                code = native.call(native.place, self._exchange, *args, *results)
                if not code:
                    return results
                native = self._mend(code, native, first, schedule)
        except _REFUSED:
            pass
        return None

    def _more(self, first: Any, native: Native) -> list[Any]:
        """Results that are not all like the first input."""
        dtypes = self._kind.dtypes
        return [first.new_empty(shape, dtype=dtypes[dtype]) for shape, dtype in native.forms]

    def _turn(self, first: Any, schedule: str | None) -> Native | None:
        """What a call with this first input runs; None: the long way."""
        tokens = first.shape[0] if first.shape else 0
        if not tokens:
            return None
        ready = self._ready(self._choose(tokens, schedule))
        native = ready.native or self._native(ready)
        if native is None:
            return None
        ready.native = native
        ready.resize(tokens)
        native.turn(tokens, schedule, ready.size)
        native.forms = tuple([((tokens, *port.tail), port.dtype) for port in self._outputs])
        self._frames.last = native
        return native

    def _native(self, ready: Prepared) -> Native | None:
        """A prepared call for C, if the library has functions for it."""
        entries, own = self._library.entries, self._inputs + self._outputs
        call, place = entries.calls.get(len(own)) if entries else None, self._place()
        if call is None or place is None:
            return None
        ports = [
            (tensor, NUMPY_DTYPES[port.dtype], port.row, self.alignment or port.size)
            for tensor, port in zip(ready.moving, own, strict=True)
        ]
        return Native(ready, call, ports, place, self._workers)

    def _mend(self, code: int, native: Native, first: Any, schedule: str | None) -> Native | None:
        """What to try again, after a call that did not run; None: the long way."""
        ready = native.ready
        if code == UNREADY:
            pool.workspace(ready.size)
            pool.use_workers(self._workers)
            return native
        tokens = first.shape[0] if first.shape else 0
        # The long way sets a T too.
        if code != REFUSED or native.tokens == ready.tokens == tokens:
            return None
        return self._turn(first, schedule)
