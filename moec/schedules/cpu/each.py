"""The `loop` experts: one expert at a time, its tokens collected by a scan of topk_ids.

The baseline that always works: no sort, no layout of its own, two parallel regions for each
expert that has tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from .cover import Rows, scratch
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk, loop, scalar, when
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


def expert_loop(
    symbol: str,
    isa: Isa,
    first: Projection,
    second: Projection,
    spec: ActivationSpec,
    out: Operand,
    top_k: int,
    weighted_input: bool,
    rows_out: bool,
    block_words: int,
) -> Kernel:
    """rows, topk_ids, topk_weights, both weights -> y [T, H] float32.

    `members` [S] (the pairs of the current expert) and `h` [S] are scratch; `h_words` is the
    same memory as `h`, as the second matmul reads it. With `rows_out` y is [S], the rows
    themselves in the order of their pairs.
    """
    args = (
        staged("rows", first.operand, top_k if weighted_input else 1),
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        Buf("topk_weights", (PerToken(), top_k), "float32", True),
        *first.args("gate_up"),
        *second.args("down"),
        accumulator("y", second.panels.rows, isa.panel, top_k if rows_out else 1),
        Buf("members", (PerToken(top_k),), "int32"),
        hidden("h", out, top_k),
    )
    blocks = k_blocks(second.panels, block_words)

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        words, dtype = second.operand.words
        h_words = T.decl_buffer((tokens * top_k, i64(words)), dtype, data=b.h.data, align=64)

        def member(row: Any) -> Any:
            return tirx.Cast("int64", tirx.BufferLoad(b.members, [row]))

        def source(row: Any) -> Any:
            return member(row) if weighted_input else tirx.floordiv(member(row), i64(top_k))

        activated = store_activated(em, spec, first.panels, out, b.h)
        by_weight = not (weighted_input or rows_out)
        summed = weighted_sum(em, b, 1 if rows_out else top_k, by_weight, member)

        with chunk(i64(second.panels.count), threads) as (begin, end):
            zero_columns(em, b.y, tokens * top_k if rows_out else tokens, begin, end)
        with loop(first.panels.groups) as e:
            count = scalar("int64", i64(0))
            with loop(tokens) as t, loop(top_k) as k:
                mine = tirx.EQ(tirx.BufferLoad(b.topk_ids, [t, k]), tirx.Cast("int32", e))
                with when(mine):
                    at = em.bind(tirx.BufferLoad(count, [0]))
                    pair = tirx.Cast("int32", t * i64(top_k) + k)
                    T.buffer_store(b.members, pair, [at])
                    T.buffer_store(count, at + 1, [0])
            total = em.bind(tirx.BufferLoad(count, [0]))
            with when(total > i64(0)):
                zero = i64(0)
                with chunk(i64(first.panels.count), threads) as span:
                    rows, sums = Rows(zero, total, source), scratch(em)
                    multiply(em, first, b, "gate_up", e, span, b.rows, rows, sums, activated)
                with chunk(i64(second.panels.count), threads) as span:
                    rows, sums = Rows(zero, total, lambda row: row), scratch(em)
                    multiply(em, second, b, "down", e, span, h_words, rows, sums, summed, blocks)

    return build(symbol, isa, args, body)
