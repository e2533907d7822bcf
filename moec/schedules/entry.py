"""Turn a legalized function into one compiled entry: native code that calls the kernels.

An entry is called as symbol(*inputs, *parameters, *outputs, workspace, threads). It lays its
intermediates out in the caller's workspace, at offsets that are linear in T, and calls the
kernels in order. No allocation, no lookup by name, no Python: a call costs what the kernels
cost, several threads may call it at once, and its launches can be captured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import relax, tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from .buffers import ITEM_BYTES, Buf, Kernel, PerToken
from .program import operands_of, origin, symbol_of

ALIGN = 64


@dataclass(frozen=True)
class Entry:
    """A compiled function of a block.

    `inputs`, `parameters` and `outputs` are names in the order of the arguments; `workspace`
    is (fixed, per token) in bytes; `kernels` lists the symbols called, in order.
    """

    symbol: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]
    workspace: tuple[int, int]
    kernels: tuple[str, ...]
    func: tirx.PrimFunc


@dataclass(frozen=True)
class KernelCall:
    """One kernel call: where its operands come from; its results are keyed (number, index)."""

    number: int
    kernel: Kernel
    operands: tuple[Any, ...]  # names of arguments, or (call number, result index)

    @property
    def results(self) -> Sequence[Buf]:
        """The buffers that the kernel writes, scratch included."""
        return self.kernel.args[len(self.operands) :]


@dataclass(frozen=True)
class Wiring:
    """A function as a straight line of kernel calls; `results` are keys of call results."""

    calls: tuple[KernelCall, ...]
    results: tuple[tuple[int, int], ...]


def build_entry(
    symbol: str,
    lines: Wiring,
    inputs: Mapping[str, Buf],
    parameters: Mapping[str, Buf],
    outputs: Mapping[str, Buf],
) -> Entry:
    """Compile a straight line of kernel calls into a PrimFunc."""
    calls, results = lines.calls, lines.results
    placed = dict(zip(results, outputs, strict=True))  # (call, index) -> output name
    arguments = {**inputs, **parameters, **outputs}
    fixed = per_token = 0
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol})
        handles = {n: T.arg(f"{n}_handle", T.handle()) for n in arguments}
        workspace_handle = T.arg("workspace_handle", T.handle())
        threads = T.arg("threads", T.int64())
        tokens, size = T.int64(), T.int64()
        pointers: dict[Any, Any] = {}
        for name, buf in arguments.items():
            shape = _shape(buf, tokens)
            align = ITEM_BYTES[buf.dtype] if buf.foreign else ALIGN
            pointers[name] = T.match_buffer(handles[name], shape, buf.dtype, align=align).data
        workspace = T.match_buffer(workspace_handle, (size,), "uint8", align=ALIGN)
        offset: Any = tirx.const(0, "int64")
        for call in calls:
            for index, buf in enumerate(call.results):
                key = (call.number, index)
                if key in placed:
                    pointers[key] = pointers[placed[key]]
                    continue
                pointers[key] = T.address_of(workspace[offset])
                own_fixed, own_per_token = buf.bytes()
                end = offset + (own_fixed + own_per_token * tokens + (ALIGN - 1))
                offset = T.bind(tirx.floordiv(end, ALIGN) * ALIGN)
                fixed, per_token = fixed + own_fixed + ALIGN, per_token + own_per_token
        for call in calls:
            keys = [*call.operands, *((call.number, i) for i in range(len(call.results)))]
            arrays = [
                _array(pointers[key], buf, tokens)
                for key, buf in zip(keys, call.kernel.args, strict=True)
            ]
            T.evaluate(T.call_cpacked(call.kernel.symbol, *arrays, tokens, threads))
    return Entry(
        symbol,
        tuple(inputs),
        tuple(parameters),
        tuple(outputs),
        (fixed, per_token),
        tuple(call.kernel.symbol for call in calls),
        ib.get(),
    )


def wiring(
    function: relax.Function, kernels: Mapping[str, Kernel], names: Mapping[str, str]
) -> Wiring:
    """The kernel calls of a legalized function in order, and which results are its results.

    `names` has what parameters are packed as, where that is not their own name.
    A call whose results nobody reads is left out: legalization may fold it into a later one.
    """
    bindings = [b for block in function.body.blocks for b in block.bindings]
    bound = {b.var: b.value for b in bindings}
    numbers: dict[Any, int] = {}

    def lookup(var: Any) -> Any:
        return bound.get(var)

    def key(value: Any) -> Any:
        found = origin(lookup, value)
        if found is None:
            return names.get(value.name, str(value.name))
        call, index = found
        return numbers[call], index

    fields = _results(function, bound)
    live = _live(fields, lookup)
    calls: list[KernelCall] = []
    for binding in bindings:
        value = binding.value
        if value not in live:
            continue
        operands = tuple(key(arg) for arg in operands_of(value))
        numbers[value] = len(calls)
        calls.append(KernelCall(len(calls), kernels[symbol_of(value)], operands))
    return Wiring(tuple(calls), tuple(key(field) for field in fields))


def _results(function: relax.Function, bound: Mapping[Any, Any]) -> list[Any]:
    """What a function returns, a tuple field by field."""
    value = function.body.body
    while isinstance(value, relax.Var) and isinstance(bound.get(value), (relax.Var, relax.Tuple)):
        value = bound[value]
    return list(value.fields) if isinstance(value, relax.Tuple) else [value]


def _live(values: Iterable[Any], lookup: Callable[[Any], Any]) -> set[Any]:
    """The kernel calls that values come from, directly or through others."""
    live: set[Any] = set()
    waiting = list(values)
    while waiting:
        found = origin(lookup, waiting.pop())
        if found is not None and found[0] not in live:
            live.add(found[0])
            waiting += operands_of(found[0])
    return live


def _shape(buf: Buf, tokens: Any) -> list[Any]:
    return [
        tokens * d.count if isinstance(d, PerToken) else tirx.const(d, "int64") for d in buf.shape
    ]


def _array(pointer: Any, buf: Buf, tokens: Any) -> Any:
    """A DLTensor on the stack, with the shape and dtype that the kernel declares."""
    shape = T.tvm_stack_make_shape(*_shape(buf, tokens))
    zero = tirx.const(0, buf.dtype)
    return T.tvm_stack_make_array(pointer, shape, 0, len(buf.shape), zero, 0)
