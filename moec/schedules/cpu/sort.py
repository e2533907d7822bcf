"""Stable counting sort of the (token, expert) pairs by expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, loop


def sort(symbol: str, isa: Isa, experts: int, top_k: int) -> Kernel:
    """topk_ids [T, K] -> row_order [S], expert_offsets [E+1]; `cursors` [E+2] is scratch.

    Pairs of one expert keep their order, so the result is the same on every run. Ids outside
    [0, E) sort behind expert_offsets[E], where no expert reads.
    """
    args = (
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        Buf("row_order", (PerToken(top_k),), "int32"),
        Buf("expert_offsets", (experts + 1,), "int32"),
        Buf("cursors", (experts + 2,), "int32"),
    )
    one = tirx.const(1, "int32")

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        def bucket(t: Any, k: Any) -> Any:
            e = em.bind(tirx.BufferLoad(b.topk_ids, [t, k]))
            limit = tirx.const(experts, "int32")
            valid = tirx.And(e >= tirx.const(0, "int32"), e < limit)
            return em.bind(tirx.Cast("int64", tirx.Select(valid, e, limit)))

        with loop(experts + 2) as e:
            T.buffer_store(b.cursors, tirx.const(0, "int32"), [e])
        with loop(tokens) as t, loop(top_k) as k:
            e = bucket(t, k)
            T.buffer_store(b.cursors, tirx.BufferLoad(b.cursors, [e + 1]) + one, [e + 1])
        with loop(experts + 1) as e:
            here = em.bind(tirx.BufferLoad(b.cursors, [e]))
            T.buffer_store(b.expert_offsets, here, [e])
            T.buffer_store(b.cursors, tirx.BufferLoad(b.cursors, [e + 1]) + here, [e + 1])
        with loop(tokens) as t, loop(top_k) as k:
            e = bucket(t, k)
            at = em.bind(tirx.BufferLoad(b.cursors, [e]))
            pair = tirx.Cast("int32", t * i64(top_k) + k)
            T.buffer_store(b.row_order, pair, [tirx.Cast("int64", at)])
            T.buffer_store(b.cursors, at + one, [e])

    return build(symbol, isa, args, body)
