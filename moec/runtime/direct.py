"""The short way of calls with torch tensors: a compiled function takes them as they are.

tvm_ffi's binding reads a torch tensor through torch's C interface (torch 2.10 and later), in a
tenth of the time that Python takes to ask for its dtype, shape, strides, device and address. The
compiled function compares all of these with what it was compiled for. Here is asked only what
that interface does not tell. A call that is refused goes the long way, which explains it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .abi import Object
from .call import Forms, Port, Prepared
from .libraries import runtime

# What torch and tvm_ffi raise for tensors that a compiled function does not take.
REFUSED = (AttributeError, IndexError, RuntimeError, TypeError, ValueError)


class Direct:
    """How one compiled function is called with tensors of a torch module.

    `apart` tells from the addresses of inputs, that of an output and T whether they overlap.
    Addresses must be multiples of `alignment`, without it of the size of an element. Raises
    ImportError where torch has no such interface, or tvm_ffi does not load.
    """

    def __init__(
        self,
        torch: Any,
        choose: Callable[[int, str | None], int],
        ports: tuple[list[Port], list[Port]],
        dtypes: Mapping[str, Any],
        apart: Callable[[list[int], int, int], bool],
        alignment: int = 0,
    ) -> None:
        # Without it, importing tvm_ffi would compile one.
        if not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"):
            raise ImportError("this torch has no C interface for its tensors")
        import tvm_ffi

        self._ffi = tvm_ffi
        self._plain = torch.Tensor
        self._int32 = torch.int32
        self._empty_like = torch.empty_like
        self._forms = Forms(choose, ports, dtypes)
        self._apart = apart
        inputs, outputs = ports
        self._multiples = tuple(alignment or port.size for port in (*inputs, *outputs[:1]))
        self._ids = tuple(i for i, port in enumerate(inputs) if port.dtype == "int32")
        first = inputs[0]
        self._alike = tuple((p.dtype, p.tail) == (first.dtype, first.tail) for p in outputs)

    def fit(
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
        for number in self._ids:
            if args[number].dtype is not self._int32:
                return None
        first = args[0]
        tokens = first.shape[0]
        index, _, forms = self._forms.at(tokens, schedule)
        if out is not None:
            return (index, tokens, [out]) if self._apart(places[:-1], places[-1], tokens) else None
        return index, tokens, [
            # What need not be said costs no time: torch reads a shape in 0.7 us.
            self._empty_like(first) if self._alike[i] else first.new_empty(shape, dtype=dtype)
            for i, (dtype, shape, _) in enumerate(forms)
        ]  # fmt: skip

    def run(self, ready: Prepared, args: Sequence[Any], results: Sequence[Any]) -> None:
        """Call a prepared variant, whose workspace is set."""
        native = ready.native
        if native is None:
            native = ready.native = self._native(ready)
        function, parameters, rest = native
        function(*args, *parameters, *results, *rest)

    def _native(self, ready: Prepared) -> tuple[Any, tuple[Any, ...], tuple[Any, ...]]:
        """The function, its parameters, and its workspace and threads, as tvm_ffi takes them."""
        tensors = [ctypes.c_void_p(ctypes.addressof(t)) for t in ready.frame.tensors]
        parameters = tensors[len(ready.inputs) : -1 - len(ready.outputs)]
        threads = [value.bits for value in ready.frame.values[len(tensors) :]]
        # A name that no other thread uses: what is prepared belongs to one.
        function = self._wrap(f"moec.direct.{id(ready)}", ready.frame.function)
        return function, tuple(parameters), (tensors[-1], *threads)

    def _wrap(self, name: str, function: Object) -> Any:
        """tvm_ffi's object for a function; it makes one of what has a name only."""
        ffi = runtime()
        ffi.name(name, function)
        try:
            return self._ffi.get_global_func(name)
        finally:
            ffi.call(ffi.function("ffi.FunctionRemoveGlobal"), name)
