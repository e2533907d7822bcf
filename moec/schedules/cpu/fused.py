"""The `fused` experts: rows sorted by expert, each weight byte read once for all its rows.

Threads split the panels (output columns) of every expert, so the work is balanced whatever
the routing, and the weighted sum over experts needs no atomics: a thread owns its columns,
and adds the experts of a token in ascending order. The result of a token depends neither on
the number of threads nor on the other tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from .cover import Rows, scratch
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk, loop
from .matmul import (
    Projection,
    accumulator,
    hidden,
    k_blocks,
    multiply,
    staged,
    store_activated,
    weighted_sum,
    zero_columns,
)
from .tiles import Operand


def _at(buffer: Any, index: Any) -> Any:
    return tirx.Cast("int64", tirx.BufferLoad(buffer, [index]))


def _sorting(experts: int, top_k: int) -> tuple[Buf, Buf]:
    return (
        Buf("row_order", (PerToken(top_k),), "int32"),
        Buf("expert_offsets", (experts + 1,), "int32"),
    )


def gate_up(
    symbol: str,
    isa: Isa,
    proj: Projection,
    spec: ActivationSpec,
    out: Operand,
    top_k: int,
    weighted_input: bool,
) -> Kernel:
    """First grouped matmul with the gather of its rows and the activation fused in.

    rows [T or S], row_order [S], expert_offsets [E+1], weights -> h [S] in sorted order.
    With `weighted_input` there is one staged row for each (token, expert) pair.
    """
    experts = proj.panels.groups
    args = (
        staged("rows", proj.operand, top_k if weighted_input else 1),
        *_sorting(experts, top_k),
        *proj.args("gate_up"),
        hidden("h", out, top_k),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        def source(row: Any) -> Any:
            pair = _at(b.row_order, row)
            return pair if weighted_input else tirx.floordiv(pair, i64(top_k))

        finish = store_activated(em, spec, proj.panels, out, b.h)
        with chunk(i64(proj.panels.count), threads) as span:
            sums = scratch(em)
            with loop(experts) as e:
                rows = _rows(em, b, e, source)
                multiply(em, proj, b, "gate_up", e, span, b.rows, rows, sums, finish)

    return build(symbol, isa, args, body)


def down(
    symbol: str,
    isa: Isa,
    proj: Projection,
    top_k: int,
    weighted: bool,
    each: bool,
    block_words: int,
) -> Kernel:
    """Second grouped matmul with the routing weight and the sum over experts fused in.

    h [S], row_order, expert_offsets, (topk_weights), weights -> y [T, H] float32, where
    y[t] = sum over the experts of t, in ascending order, of w * (down_e h + bias_e).
    With `each` y is [S], the rows themselves in the order of their pairs.
    """
    experts = proj.panels.groups
    blocks = k_blocks(proj.panels, block_words)
    weights = (Buf("topk_weights", (PerToken(), top_k), "float32", True),) if weighted else ()
    args = (
        staged("h", proj.operand, top_k),
        *_sorting(experts, top_k),
        *weights,
        *proj.args("down"),
        accumulator("y", proj.panels.rows, isa.panel, top_k if each else 1),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        own = 1 if each else top_k
        finish = weighted_sum(em, b, own, weighted, lambda row: _at(b.row_order, row))
        with chunk(i64(proj.panels.count), threads) as (begin, end):
            zero_columns(em, b.y, tokens * top_k if each else tokens, begin, end)
            sums = scratch(em)
            with loop(experts) as e:
                rows = _rows(em, b, e, lambda row: row)
                span = begin, end
                multiply(em, proj, b, "down", e, span, b.h, rows, sums, finish, blocks)

    return build(symbol, isa, args, body)


def _rows(em: Emit, b: SimpleNamespace, e: Any, source: Callable[[Any], Any]) -> Rows:
    """The sorted rows of one expert."""
    first, last = _at(b.expert_offsets, e), _at(b.expert_offsets, e + 1)
    return Rows(em.bind(first), em.bind(last), source)
