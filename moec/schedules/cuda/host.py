"""The host side of a function: one PrimFunc that launches its kernels in order.

Called as symbol(*inputs, *parameters, *outputs, workspace, threads) with CUDA tensors. It
lays its intermediates out in the caller's workspace at offsets that are linear in T and
passes plain device pointers on. It allocates nothing, never synchronises, and launches on
the current stream, so a call can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel, PerToken
from ..entry import Entry, Wiring

ALIGN = 256  # of an intermediate: a multiple of what TMA (128) and a cache sector ask for


@dataclass(frozen=True)
class Launch:
    """A kernel and the name of the value behind every one of its buffers."""

    kernel: Kernel
    values: tuple[str, ...]


def build_host(
    symbol: str,
    inputs: Mapping[str, Buf],
    parameters: Mapping[str, Buf],
    outputs: Mapping[str, Buf],
    launches: Sequence[Launch],
) -> Entry:
    """Values that are neither arguments nor results live in the workspace."""
    arguments = {**inputs, **parameters, **outputs}
    fixed = per_token = 0
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "moec.host": True})
        handles = {n: T.arg(f"{n}_handle", T.handle()) for n in arguments}
        workspace_handle = T.arg("workspace_handle", T.handle())
        threads = T.arg("threads", T.int64())
        tokens, size = T.int64(), T.int64()
        pointers: dict[str, Any] = {}
        for name, buf in arguments.items():
            shape = [
                tokens * d.count if isinstance(d, PerToken) else tirx.const(d, "int64")
                for d in buf.shape
            ]
            pointers[name] = T.match_buffer(handles[name], shape, buf.dtype, align=16).data
        workspace = T.match_buffer(workspace_handle, (size,), "uint8", align=ALIGN)
        offset: Any = tirx.const(0, "int64")
        for launch in launches:
            for name, buf in zip(launch.values, launch.kernel.args, strict=True):
                if name in pointers:
                    continue
                pointers[name] = T.address_of(workspace[offset])
                own_fixed, own_per_token = buf.bytes()
                end = offset + (own_fixed + own_per_token * tokens + (ALIGN - 1))
                offset = T.bind(tirx.floordiv(end, ALIGN) * ALIGN)
                fixed, per_token = fixed + own_fixed + ALIGN, per_token + own_per_token
        for launch in launches:
            places = [pointers[name] for name in launch.values]
            T.evaluate(T.call_cpacked(launch.kernel.symbol, *places, tokens, threads))
    return Entry(
        symbol,
        tuple(inputs),
        tuple(parameters),
        tuple(outputs),
        (fixed, per_token),
        tuple(launch.kernel.symbol for launch in launches),
        ib.get(),
    )


def entry(
    symbol: str,
    lines: Wiring,
    inputs: Mapping[str, Buf],
    parameters: Mapping[str, Buf],
    outputs: Mapping[str, Buf],
) -> Entry:
    """The host function of a straight line of kernel calls."""
    placed = dict(zip(lines.results, outputs, strict=True))

    def name(key: Any) -> str:
        if isinstance(key, str):
            return key
        return placed.get(key) or "v{}_{}".format(*key)

    launches = [
        Launch(
            call.kernel,
            (
                *(name(key) for key in call.operands),
                *(name((call.number, i)) for i in range(len(call.results))),
            ),
        )
        for call in lines.calls
    ]
    return build_host(symbol, inputs, parameters, outputs, launches)
