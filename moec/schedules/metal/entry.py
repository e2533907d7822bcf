"""The entry of a function for Metal: native host code that launches the kernels in order.

It differs from the host's entry in one thing: a Metal buffer is an opaque handle, so that an
intermediate is not a pointer into the workspace but the workspace with a position in it, and
every kernel gets a position and a length with every buffer. The convention of callers is the
same: symbol(*inputs, *parameters, *outputs, workspace, threads).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import ITEM_BYTES, Buf, PerToken
from ..entry import ALIGN, Entry, Wiring


def build_entry(
    symbol: str,
    lines: Wiring,
    inputs: Mapping[str, Buf],
    parameters: Mapping[str, Buf],
    outputs: Mapping[str, Buf],
) -> Entry:
    """Compile a straight line of kernel calls into a PrimFunc."""
    placed = dict(zip(lines.results, outputs, strict=True))
    arguments = {**inputs, **parameters, **outputs}
    fixed = per_token = 0
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol})
        handles = {n: T.arg(f"{n}_handle", T.handle()) for n in arguments}
        workspace_handle = T.arg("workspace_handle", T.handle())
        T.arg("threads", T.int64())
        tokens, size = T.int64(), T.int64()
        zero: Any = tirx.const(0, "int64")
        places: dict[Any, tuple[Any, Any]] = {}  # what holds a value, and where in it (bytes)
        for name, buf in arguments.items():
            align = ITEM_BYTES[buf.dtype]
            data = T.match_buffer(handles[name], _shape(buf, tokens), buf.dtype, align=align).data
            places[name] = (data, zero)
        workspace = T.match_buffer(workspace_handle, (size,), "uint8", align=1).data
        offset = zero
        for call in lines.calls:
            for index, buf in enumerate(call.results):
                key = (call.number, index)
                if key in placed:
                    places[key] = places[placed[key]]
                    continue
                places[key] = (workspace, offset)
                own_fixed, own_per_token = buf.bytes()
                end = offset + (own_fixed + own_per_token * tokens + (ALIGN - 1))
                offset = T.bind(tirx.floordiv(end, ALIGN) * ALIGN)
                fixed, per_token = fixed + own_fixed + ALIGN, per_token + own_per_token
        for call in lines.calls:
            keys = [*call.operands, *((call.number, i) for i in range(len(call.results)))]
            bufs = call.kernel.args
            arrays = [_array(places[k][0], b, tokens) for k, b in zip(keys, bufs, strict=True)]
            starts = [
                tirx.floordiv(places[k][1], ITEM_BYTES[b.dtype])
                for k, b in zip(keys, bufs, strict=True)
            ]
            counts = [_count(b, tokens) for b in bufs]
            constants = [tirx.const(c, "int32") for c in call.kernel.constants]
            T.evaluate(
                T.call_cpacked(call.kernel.symbol, *arrays, *starts, *counts, tokens, *constants)
            )
    return Entry(
        symbol,
        tuple(inputs),
        tuple(parameters),
        tuple(outputs),
        (fixed, per_token),
        tuple(call.kernel.symbol for call in lines.calls),
        ib.get(),
    )


def _shape(buf: Buf, tokens: Any) -> list[Any]:
    return [
        tokens * d.count if isinstance(d, PerToken) else tirx.const(d, "int64") for d in buf.shape
    ]


def _count(buf: Buf, tokens: Any) -> Any:
    """The number of elements."""
    fixed, per_token = (n // ITEM_BYTES[buf.dtype] for n in buf.bytes())
    return (
        tirx.const(fixed, "int64") + tokens * per_token if per_token else tirx.const(fixed, "int64")
    )


def _array(data: Any, buf: Buf, tokens: Any) -> Any:
    shape = T.tvm_stack_make_shape(*_shape(buf, tokens))
    return T.tvm_stack_make_array(data, shape, 0, len(buf.shape), tirx.const(0, buf.dtype), 0)
