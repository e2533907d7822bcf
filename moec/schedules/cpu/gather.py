"""The `gather` experts: one row a (token, expert) pair with indexed weights, no sort.

Meant for decode: no histogram and no ordering before the first weight byte is read. A weight
shared by several tokens is read once for each of them.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from .cover import Rows, scratch
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk, loop, when
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


def _expert(em: Emit, ids: Any, t: Any, k: Any, experts: int) -> tuple[Any, Any]:
    """(expert of a pair as int64, whether it is one of the E experts)."""
    e = em.bind(tirx.BufferLoad(ids, [t, k]))
    valid = tirx.And(e >= tirx.const(0, "int32"), e < tirx.const(experts, "int32"))
    return em.bind(tirx.Cast("int64", e)), valid


def gate_up(
    symbol: str,
    isa: Isa,
    proj: Projection,
    spec: ActivationSpec,
    out: Operand,
    top_k: int,
    weighted_input: bool,
) -> Kernel:
    """rows [T or S], topk_ids [T, K], weights -> h [S]: row t*K+k for the pair (t, k)."""
    args = (
        staged("rows", proj.operand, top_k if weighted_input else 1),
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        *proj.args("gate_up"),
        hidden("h", out, top_k),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        def source(pair: Any) -> Any:
            return pair if weighted_input else tirx.floordiv(pair, i64(top_k))

        finish = store_activated(em, spec, proj.panels, out, b.h)
        with chunk(i64(proj.panels.count), threads) as span:
            sums = scratch(em)
            with loop(tokens) as t, loop(top_k) as k:
                e, valid = _expert(em, b.topk_ids, t, k, proj.panels.groups)
                pair = em.bind(t * i64(top_k) + k)
                rows = Rows(pair, pair + i64(1), source, most=1)
                with when(valid):
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
    """h [S], topk_ids, (topk_weights), weights -> y [T, H] float32, summed in the order of k.

    With `each` y is [S], the rows themselves.
    """
    blocks = k_blocks(proj.panels, block_words)
    weights = (Buf("topk_weights", (PerToken(), top_k), "float32", True),) if weighted else ()
    args = (
        staged("h", proj.operand, top_k),
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        *weights,
        *proj.args("down"),
        accumulator("y", proj.panels.rows, isa.panel, top_k if each else 1),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        finish = weighted_sum(em, b, 1 if each else top_k, weighted, lambda pair: pair)
        with chunk(i64(proj.panels.count), threads) as (begin, end):
            zero_columns(em, b.y, tokens * top_k if each else tokens, begin, end)
            sums = scratch(em)
            with loop(tokens) as t, loop(top_k) as k:
                e, valid = _expert(em, b.topk_ids, t, k, proj.panels.groups)
                pair = em.bind(t * i64(top_k) + k)
                rows = Rows(pair, pair + i64(1), lambda pair: pair, most=1)
                span = begin, end
                with when(valid):
                    multiply(em, proj, b, "down", e, span, b.h, rows, sums, finish, blocks)

    return build(symbol, isa, args, body)
