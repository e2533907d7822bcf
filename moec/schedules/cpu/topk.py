"""Repeated vectorised argmax: the top-k of a row, lowest index first among equals."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .emit import Emit, f32
from .kernel import loop

_NONE = 0x7FFFFFFF


def argmax(
    em: Emit, values: Any, t: Any, width: int, count: int, below: float | None = None
) -> Any:
    """The lowest index of the largest value in values[t, :width] (padding holds -inf).

    With `below`, only values strictly less than it take part. The result is always in
    [0, count), even when nothing compares (NaN), so that no reader goes out of bounds.
    """
    best = T.alloc_buffer((1,), em.f32v)
    where = T.alloc_buffer((1,), em.i32v)
    T.buffer_store(best, em.splat(float("-inf")), [0])
    T.buffer_store(where, em.isplat(_NONE), [0])
    lanes = em.lane_ids(0)
    with loop(width // em.lanes) as c:
        value = em.bind(em.load(values, [t, c * em.lanes], "float32"))
        index = em.bind(lanes + tirx.Broadcast(tirx.Cast("int32", c * em.lanes), em.lanes))
        old, old_at = tirx.BufferLoad(best, [0]), tirx.BufferLoad(where, [0])
        # The first value of a lane is taken even when it is -inf: it must have an index.
        better = tirx.Or(value > old, tirx.And(value >= old, old_at > index))
        if below is not None:
            better = tirx.And(better, value < em.splat(below))
        # `better` is not bound to a name: TVM's analyzer fails on bound boolean vectors.
        T.buffer_store(where, tirx.Select(better, index, old_at), [0])
        T.buffer_store(best, tirx.Select(better, value, old), [0])
    top = tirx.Broadcast(em.reduce_max(tirx.BufferLoad(best, [0])), em.lanes)
    mine = tirx.BufferLoad(best, [0]) >= em.bind(top)
    winner = em.reduce_min_i32(tirx.Select(mine, tirx.BufferLoad(where, [0]), em.isplat(_NONE)))
    inside = tirx.Min(winner, tirx.const(count - 1, "int32"))
    return em.bind(tirx.Cast("int64", inside))


def take(values: Any, t: Any, index: Any) -> None:
    """Remove an index from further selection."""
    # NaN compares with nothing: unlike -inf it can never be chosen a second time, even when
    # all that is left are masked experts at -inf.
    T.buffer_store(values, f32(float("nan")), [t, index])
