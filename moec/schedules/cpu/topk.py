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
    # Two passes, the largest value and then its lowest index: a single pass that carries both
    # needs boolean vectors, which cost more than loading the row again from the L1 cache.
    best = T.alloc_buffer((1,), em.f32v)
    T.buffer_store(best, em.splat(float("-inf")), [0])
    with loop(width // em.lanes) as c:
        value = em.bind(em.load(values, [t, c * em.lanes], "float32"))
        if below is not None:
            value = em.bind(tirx.Select(value < em.splat(below), value, em.splat(float("-inf"))))
        old = tirx.BufferLoad(best, [0])
        T.buffer_store(best, tirx.Select(value > old, value, old), [0])  # a NaN never wins
    top = em.bind(tirx.Broadcast(em.reduce_max(tirx.BufferLoad(best, [0])), em.lanes))
    where = T.alloc_buffer((1,), em.i32v)
    T.buffer_store(where, em.isplat(_NONE), [0])
    # The index is carried from step to step: computed from c, TVM rebuilds it lane by lane.
    lanes = T.alloc_buffer((1,), em.i32v)
    T.buffer_store(lanes, em.lane_ids(0), [0])
    with loop(width // em.lanes) as c:
        value = em.load(values, [t, c * em.lanes], "float32")
        index = em.bind(tirx.BufferLoad(lanes, [0]))
        T.buffer_store(lanes, index + em.isplat(em.lanes), [0])
        found = tirx.Select(tirx.EQ(value, top), index, em.isplat(_NONE))
        T.buffer_store(where, tirx.Min(tirx.BufferLoad(where, [0]), found), [0])
    winner = em.reduce_min_i32(tirx.BufferLoad(where, [0]))
    inside = tirx.Min(winner, tirx.const(count - 1, "int32"))
    return em.bind(tirx.Cast("int64", inside))


def take(values: Any, t: Any, index: Any) -> None:
    """Remove an index from further selection."""
    # NaN compares with nothing: unlike -inf it can never be chosen a second time, even when
    # all that is left are masked experts at -inf.
    T.buffer_store(values, f32(float("nan")), [t, index])
