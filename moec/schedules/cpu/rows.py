"""Small sums over the K pairs of a token: rows that lie together, and weights that pass x."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, f32, i64, round_up
from .isa import Isa
from .kernel import build, chunk, loop, scalar, when


def sum_rows(symbol: str, isa: Isa, width: int, top_k: int, weighted: bool) -> Kernel:
    """rows [S, stride] float32, (topk_weights) -> y [T, stride], summed in the order of k."""
    stride = round_up(width, isa.panel)
    weights = (Buf("topk_weights", (PerToken(), top_k), "float32", True),) if weighted else ()
    args = (
        Buf("rows", (PerToken(top_k), stride), "float32"),
        *weights,
        Buf("y", (PerToken(), stride), "float32"),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            for k in range(top_k):
                w = None
                if weighted:
                    w = tirx.Broadcast(tirx.BufferLoad(b.topk_weights, [t, i64(k)]), em.lanes)
                    w = em.bind(w)
                with loop(stride // em.lanes) as c:
                    at = c * em.lanes
                    row = em.load(b.rows, [t * top_k + k, at], "float32")
                    value = row if w is None else row * w
                    if k:
                        value = em.load(b.y, [t, at], "float32") + value
                    em.store(b.y, em.bind(value), [t, at], "float32")

    return build(symbol, isa, args, body)


def pass_weight(symbol: str, isa: Isa, top_k: int, first: int, count: int) -> Kernel:
    """topk_ids, topk_weights [T, K] -> [T, 1]: the weights with first <= id < first + count."""
    args = (
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        Buf("topk_weights", (PerToken(), top_k), "float32", True),
        Buf("y", (PerToken(), 1), "float32"),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            total = scalar("float32", f32(0.0))
            with loop(top_k) as k:
                e = em.bind(tirx.BufferLoad(b.topk_ids, [t, k]))
                low, high = tirx.const(first, "int32"), tirx.const(first + count, "int32")
                with when(tirx.And(e >= low, e < high)):
                    added = tirx.BufferLoad(total, [0]) + tirx.BufferLoad(b.topk_weights, [t, k])
                    T.buffer_store(total, added, [0])
            T.buffer_store(b.y, tirx.BufferLoad(total, [0]), [t, i64(0)])

    return build(symbol, isa, args, body)
