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
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk, loop, scalar, when
from .matmul import (
    Projection,
    accumulate,
    accumulator,
    hidden,
    k_blocks,
    run_tile,
    staged,
    store_activated,
    zero_columns,
)
from .tiles import Acc, Operand, row_blocks


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
        h_words = T.decl_buffer(
            (tokens * top_k, i64(words)), dtype, data=b.h.data, align=64
        )

        def member(at: Any) -> Any:
            return em.bind(tirx.Cast("int64", tirx.BufferLoad(b.members, [at])))

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
                with chunk(i64(first.panels.count), threads) as (begin, end):
                    with loop(end, begin) as p:
                        epilogue = store_activated(em, spec, first.panels, out, b.h, p)

                        def up_block(row: Any, rows: int) -> None:
                            places = [row + i for i in range(rows)]
                            source = [member(at) for at in places]
                            if not weighted_input:
                                source = [em.bind(tirx.floordiv(s, i64(top_k))) for s in source]
                            run_tile(
                                em, first, b, "gate_up", e, p, b.rows, source, epilogue, places
                            )

                        row_blocks(em, i64(0), total, up_block)
                with chunk(i64(second.panels.count), threads) as (begin, end):
                    with loop(end, begin) as p:

                        def finish(pairs: Any, acc: Acc) -> None:
                            for pair, values in zip(pairs, acc, strict=True):
                                t = em.bind(tirx.floordiv(pair, i64(top_k)))
                                w: Any = None
                                if rows_out:
                                    accumulate(em, b.y, pair, p, values, None)
                                    continue
                                if not weighted_input:
                                    k = tirx.floormod(pair, i64(top_k))
                                    w = tirx.BufferLoad(b.topk_weights, [t, k])
                                    w = em.bind(tirx.Broadcast(w, em.lanes))
                                accumulate(em, b.y, t, p, values, w)

                        for block in blocks:

                            def down_block(
                                row: Any, rows: int, block: tuple[int, int] = block
                            ) -> None:
                                places = [row + i for i in range(rows)]
                                pairs = [member(at) for at in places]
                                run_tile(
                                    em, second, b, "down", e, p, h_words, places, finish,
                                    pairs, block,
                                )  # fmt: skip

                            row_blocks(em, i64(0), total, down_block)

    return build(symbol, isa, args, body)
