"""The short way of calls with torch tensors: a compiled function takes them as they are.

tvm_ffi's binding reads a torch tensor through torch's C interface (torch 2.10 and later), in a
tenth of the time that Python takes to ask for its dtype, shape, strides, device and address. The
compiled function compares all of these with what it was compiled for. Here is asked only what
that interface does not tell. A call that is refused goes the long way, which explains it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

from .abi import Object
from .call import Call, Forms, Prepared
from .libraries import runtime

# What torch and tvm_ffi raise for tensors that a compiled function does not take.
_REFUSED = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class DirectCall(Call):
    """A call with the short way; a subclass says which tensors it takes, and what a run needs."""

    alignment = 0  # of addresses in bytes; 0: the size of an element
    _torch: Any = None  # torch as it was when what follows was made of it
    _ffi: Any = None  # tvm_ffi, if it reads this torch's tensors

    def _kind_of(self, torch: Any) -> Any:
        """The kind of torch's tensors on this device."""
        raise NotImplementedError

    def _go(self, ready: Prepared, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        """Give a prepared variant its workspace and call the function."""
        raise NotImplementedError

    def _meet(self, torch: Any) -> None:
        self._kind = self._kind_of(torch)
        self._ffi = _reader(torch)
        self._plain, self._int32, self._like = torch.Tensor, torch.int32, torch.empty_like
        inputs, outputs = ports = self._inputs, self._outputs
        self._forms = Forms(self._choose, ports, self._kind.dtypes)
        self._multiples = tuple(self.alignment or port.size for port in (*inputs, *outputs[:1]))
        self._integers = tuple(i for i, port in enumerate(inputs) if port.dtype == "int32")
        first = inputs[0]
        self._alike = tuple((p.dtype, p.tail) == (first.dtype, first.tail) for p in outputs)
        self._torch = torch

    def _short(
        self, torch: Any, args: Sequence[Any], out: Any, schedule: str | None
    ) -> list[Any] | None:
        """The whole call, or None when it is for the long way."""
        if self._torch is not torch:
            self._meet(torch)
        if self._ffi is None:
            return None
        try:
            fit = self._fit(args, out, schedule)
            if fit is None:
                return None
            index, tokens, results = fit
            ready = self._ready(index)
            ready.resize(tokens)
            native = ready.native
            if native is None:
                native = ready.native = self._native(ready)
            function, parameters, rest = native
            self._go(ready, function, (*args, *parameters, *results, *rest))
        except _REFUSED:
            return None
        return results

    def _fit(
        self, args: Sequence[Any], out: Any, schedule: str | None
    ) -> tuple[int, int, list[Any]] | None:
        """The index of a variant, T, and where its results go; None: for the long way.

        That judges subclasses, which may mean anything by their attributes, tensors for
        autograd, negated views, int64 ids, and tensors of no memory.
        """
        plain, multiples, places, number = self._plain, self._multiples, [], 0
        for tensor in args if out is None else (*args, out):
            if type(tensor) is not plain or tensor.requires_grad or tensor.is_neg():
                return None
            place = tensor.data_ptr()
            if not place or place % multiples[number]:
                return None
            places.append(place)
            number += 1
        for number in self._integers:
            if args[number].dtype is not self._int32:
                return None
        first = args[0]
        tokens = first.shape[0]
        index, _, forms = self._forms.at(tokens, schedule)
        if out is not None:
            return (index, tokens, [out]) if self._apart(places[:-1], places[-1], tokens) else None
        return index, tokens, [
            # What need not be said costs no time: torch reads a shape in 0.7 us.
            self._like(first) if self._alike[i] else first.new_empty(shape, dtype=dtype)
            for i, (dtype, shape, _) in enumerate(forms)
        ]  # fmt: skip

    def _native(self, ready: Prepared) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """The function, its parameters, and its workspace and threads, as tvm_ffi takes them."""
        tensors = [ctypes.c_void_p(ctypes.addressof(t)) for t in ready.frame.tensors]
        parameters = tensors[len(ready.inputs) : -1 - len(ready.outputs)]
        threads = [value.bits for value in ready.frame.values[len(tensors) :]]
        # A name that no other thread uses: what is prepared belongs to one.
        function = _wrap(self._ffi, f"moec.direct.{id(ready)}", ready.frame.function)
        return function, tuple(parameters), (tensors[-1], *threads)


def _reader(torch: Any) -> Any:
    """tvm_ffi, or None where it cannot read this torch's tensors."""
    # Without the interface, importing tvm_ffi would compile one.
    if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
        return None
    try:
        import tvm_ffi
    except ImportError:
        return None
    return tvm_ffi


def _wrap(tvm_ffi: Any, name: str, function: Object) -> Any:
    """tvm_ffi's object for a function; it makes one of what has a name only."""
    ffi = runtime()
    ffi.name(name, function)
    try:
        return tvm_ffi.get_global_func(name)
    finally:
        ffi.call(ffi.function("ffi.FunctionRemoveGlobal"), name)
