"""One expert at a time: a host function that launches two matmuls for every expert in turn.

The baseline that the schedules which treat all experts in one launch are compared with. Grids
depend on T only, so a call can be captured like any other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel


def expert_loop(
    symbol: str,
    operands: Sequence[Buf],
    results: Sequence[Buf],
    steps: Sequence[tuple[Kernel, Sequence[int]]],
    experts: int,
) -> Kernel:
    """A kernel by its signature (operands, then results), a loop over experts inside.

    Each step is a kernel and, for its buffers in order, their places among operands and
    results; it gets the number of the expert where others get `threads`.
    """
    args = (*operands, *results)
    with IRBuilder() as ib, T.prim_func(s_tir=True):
        T.func_name(symbol)
        T.func_attr({"global_symbol": symbol, "moec.host": True})
        places = [T.arg(f"{a.name}_{i}", T.handle(a.dtype)) for i, a in enumerate(args)]
        tokens: Any = T.arg("tokens", T.int64())
        T.arg("threads", T.int64())
        with T.serial(tirx.const(0, "int64"), tirx.const(experts, "int64")) as e:
            for kernel, order in steps:
                own = [places[i] for i in order]
                T.evaluate(T.call_cpacked(kernel.symbol, *own, tokens, e))
    return Kernel(symbol, args, ib.get(), needs=tuple(k.symbol for k, _ in steps))
