"""Compiled weight packing: canonical matrices into panels, bias vectors into panel order."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel
from .emit import Emit, f32, i64, storage
from .isa import Isa
from .kernel import build, chunk, loop
from .shorten import shorten
from .tiles import Panels

_BLOCK = 16  # words of K handled at a time: the block of the panel stays in the L1 cache


def _source_row(panels: Panels, panel: Any, column: Any) -> tuple[Any, Any]:
    """(row of the canonical matrix behind a panel column, whether there is one)."""
    step, outputs = panels.step, panels.outputs
    if not panels.gated:
        row = panel * step + column
        return row, row < i64(outputs)
    is_up = column >= i64(step)
    local = panel * step + tirx.Select(is_up, column - i64(step), column)
    return tirx.Select(is_up, local + i64(outputs), local), local < i64(outputs)


def pack_matrix(symbol: str, isa: Isa, panels: Panels, per_expert: bool) -> Kernel:
    """src [N, K] -> dst [P, K/group, panel] words, columns and K padded with zeros.

    Panels that have a compact form get it. `per_expert` packs one expert into its slice;
    otherwise dst is the whole [1, P, ...].
    """
    lead = () if per_expert else (1,)
    args = (
        Buf("src", (panels.rows, panels.cols), storage(panels.dtype), True),
        Buf("dst", (*lead, *panels.shape[1:]), panels.word),
    )
    zero = tirx.const(0, storage(panels.dtype))
    header = panels.shape[2] - panels.depth

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        blocks = -(-panels.depth // _BLOCK)
        with chunk(i64(panels.count), threads) as (begin, end), loop(end, begin) as p:
            with loop(blocks) as block, loop(panels.panel) as c:
                row, exists = _source_row(panels, p, c)
                row, exists = em.bind(row), em.bind(exists)
                last = tirx.Min(block * _BLOCK + _BLOCK, i64(panels.depth))
                with loop(em.bind(last), em.bind(block * _BLOCK)) as k:

                    def value(at: Any) -> Any:
                        inside = tirx.And(exists, at < i64(panels.cols))
                        return T.if_then_else(inside, tirx.BufferLoad(b.src, [row, at]), zero)

                    at = [*(i64(0) for _ in lead), p, k + i64(header), c]
                    T.buffer_store(b.dst, _word(em, panels, value, k), at)
            if panels.compact:
                panel = [*(i64(0) for _ in lead), p, i64(0)]
                shorten(
                    em,
                    lambda word: tirx.BufferLoad(b.dst, [*panel, word]),
                    lambda word, new: T.buffer_store(b.dst, new, [*panel, word]),
                    panels.depth,
                )

    return build(symbol, isa, args, body)


def _word(em: Emit, panels: Panels, value: Any, k: Any) -> Any:
    if panels.group == 1:
        return value(k)
    low = tirx.Cast("uint32", value(k * 2))
    high = tirx.LShift(tirx.Cast("uint32", value(k * 2 + 1)), tirx.const(16, "uint32"))
    return tirx.Cast("int32", tirx.BitwiseOr(low, high))


def pack_bias(symbol: str, isa: Isa, panels: Panels, per_expert: bool) -> Kernel:
    """src [E, N] float32 (or [N], of a matrix that is not `per_expert`) -> dst [E, P, panel]."""
    flat = not per_expert
    shape = (panels.rows,) if flat else (panels.groups, panels.rows)
    args = (Buf("src", shape, "float32", True), Buf("dst", panels.bias_shape, "float32"))

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with loop(panels.groups) as e, loop(panels.count) as p, loop(panels.panel) as c:
            row, exists = _source_row(panels, p, c)
            row = em.bind(row)
            value = tirx.BufferLoad(b.src, [row] if flat else [e, row])
            T.buffer_store(b.dst, T.if_then_else(exists, value, f32(0.0)), [e, p, c])

    return build(symbol, isa, args, body)
