"""Lowering: what a target's legalization functions write into, one for each block shape.

They add kernels and return `call_dps_packed` nodes that name them. A kernel's arguments are
the call's operands followed by its results (scratch buffers are results that nobody reads).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import relax

from .buffers import Buf, Kernel, PerToken

Legalize = Callable[[relax.BlockBuilder, relax.Call], Any]


class Lowering:
    """Collects kernels while LegalizeOps runs, and knows what produced a value.

    A backend's own class adds `table`. Equal kernels of several functions and schedules are
    built once: a kernel is known by its role and the static values that it was made from.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.kernels: dict[str, Kernel] = {}
        self._made: dict[tuple[Any, ...], str] = {}

    def table(self, config: Any) -> Mapping[str, Legalize]:
        """The legalize map of one schedule, by full op name; `config` is the schedule's."""
        raise NotImplementedError

    def names(self, config: Any) -> Mapping[str, str]:
        """What a schedule's parameters are packed as, where that is not their own name."""
        return {}

    def kernel(self, role: str, key: tuple[Any, ...], make: Callable[[str], Kernel]) -> Kernel:
        """The kernel of a role and its static parameters, built once and shared."""
        full = (role, *key)
        if full not in self._made:
            symbol = f"{self.prefix}_{role}"
            if symbol in self.kernels:
                symbol += f"_{sum(k[0] == role for k in self._made)}"
            self._made[full] = symbol
            self.kernels[symbol] = make(symbol)
        return self.kernels[self._made[full]]

    def call(
        self,
        builder: relax.BlockBuilder,
        kernel: Kernel,
        args: Sequence[Any],
        tokens: Any,
        logical: Any | None = None,
    ) -> list[Any]:
        """Emit a call of a kernel; returns the values of its results, scratch included.

        `logical` is the type of the op that is legalized (a tensor or a tuple): results keep
        it, because the ops that read them are still typed by the graph; the rows of the
        buffer behind a result may be longer (see `buffer`).
        """
        outs = kernel.args[len(args) :]
        types = [_type(out, tokens) for out in outs]
        if logical is not None:
            own = list(logical.fields) if isinstance(logical, relax.TupleType) else [logical]
            types[: len(own)] = own
        made = builder.emit(relax.op.call_dps_packed(kernel.symbol, relax.Tuple(list(args)), types))
        if len(types) == 1:
            return [made]
        return [builder.emit(relax.TupleGetItem(made, i)) for i in range(len(types))]

    def buffer(self, builder: relax.BlockBuilder, value: Any) -> Buf | None:
        """The physical buffer behind a value made by a kernel; None for a function's input."""
        found = origin(lambda v: builder.lookup_binding(v), value)
        if found is None:
            return None
        call, index = found
        kernel = self.kernels[symbol_of(call)]
        return kernel.args[len(operands_of(call)) + index]


def origin(lookup: Callable[[Any], Any], value: Any) -> tuple[relax.Call, int] | None:
    """The kernel call and the number of its result behind a value; None for an input."""
    index = 0
    while isinstance(value, relax.Var):
        bound = lookup(value)
        if bound is None:
            return None
        value = bound
        if isinstance(value, relax.TupleGetItem):
            inner, index = value.tuple_value, int(value.index)
            bound = lookup(inner) if isinstance(inner, relax.Var) else inner
            value = bound.fields[index] if isinstance(bound, relax.Tuple) else bound
    return value, index


def symbol_of(call: relax.Call) -> str:
    """The kernel that a call_dps_packed names."""
    return str(call.args[0].global_symbol)


def operands_of(call: relax.Call) -> list[Any]:
    """The operands of a call_dps_packed."""
    return list(call.args[1].fields)


def _type(out: Buf, tokens: Any) -> relax.TensorType:
    shape = [d.count * tokens if isinstance(d, PerToken) else d for d in out.shape]
    return relax.TensorType(shape, out.dtype)
