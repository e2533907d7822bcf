"""RMSNorm of rows, in float32, with the roundings of the published code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import NormSpec
from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, f32, i64, storage
from .isa import Isa
from .kernel import build, chunk, loop, scalar
from .stage import load_scalar, round_scalar, store_scalar


def rms_norm(
    symbol: str,
    isa: Isa,
    spec: NormSpec,
    width: int,
    dtype: str,
    out_dtype: str,
    stride: int,
) -> Kernel:
    """x [T, width] of `dtype` -> x * (mean(x^2) + eps)^-0.5 [* weight] [* scale].

    Rows of a float32 accumulator are `stride` apart. `out_dtype` is what the result is
    rounded to; when a constant scale follows, the product with the vector is rounded first,
    then the product with the constant (each was an operation of its own on rounded values).
    The sum of squares runs over lanes in a fixed order, so a row never depends on the others.
    """
    args = [Buf("x", (PerToken(), stride), storage(dtype), True)]
    if spec.weighted:
        args.append(Buf("weight", (width,), "float32"))
    args.append(Buf("y", (PerToken(), stride if out_dtype == "float32" else width),
                    storage(out_dtype)))  # fmt: skip
    steps = spec.scale != 1.0

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        full = width // em.lanes
        tail = range(full * em.lanes, width)
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            mean = _squares(em, b.x, t, dtype, width) / f32(float(width)) + f32(spec.eps)
            factor = em.bind(f32(1.0) / T.sqrt(mean))
            splat = em.bind(tirx.Broadcast(factor, em.lanes))
            with loop(full) as c:
                value = em.load(b.x, [t, c * em.lanes], dtype) * splat
                if steps:
                    value = em.round_to(value, out_dtype)
                if spec.weighted:
                    value = value * em.load(b.weight, [c * em.lanes], "float32")
                if steps:
                    value = em.round_to(value, out_dtype) * em.splat(spec.scale)
                em.store(b.y, em.bind(value), [t, c * em.lanes], out_dtype)
            for c in tail:
                value = load_scalar(b.x, [t, i64(c)], dtype) * factor
                if steps:
                    value = round_scalar(value, out_dtype)
                if spec.weighted:
                    value = value * tirx.BufferLoad(b.weight, [i64(c)])
                if steps:
                    value = round_scalar(value, out_dtype) * f32(spec.scale)
                store_scalar(b.y, value, [t, i64(c)], out_dtype)

    return build(symbol, isa, tuple(args), body)


def _squares(em: Emit, x: Any, t: Any, dtype: str, width: int) -> Any:
    """The sum of the squares of row t."""
    full = width // em.lanes
    total = T.alloc_buffer((1,), em.f32v)
    T.buffer_store(total, em.splat(0.0), [0])
    with loop(full) as c:
        value = em.bind(em.load(x, [t, c * em.lanes], dtype))
        T.buffer_store(total, em.fma(value, value, tirx.BufferLoad(total, [0])), [0])
    squares = scalar("float32", em.reduce_add(tirx.BufferLoad(total, [0])))
    for c in range(full * em.lanes, width):
        value = em.bind(load_scalar(x, [t, i64(c)], dtype))
        T.buffer_store(squares, tirx.BufferLoad(squares, [0]) + value * value, [0])
    return tirx.BufferLoad(squares, [0])
