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
    copies: int = 1,
) -> Kernel:
    """x [T, width] of `dtype` -> x * (mean(x^2) + eps)^-0.5 [* weight] [* scale].

    With `copies` there are so many rows for each token. Rows of a float32 accumulator are `stride` apart. `out_dtype` is what the result is
    rounded to; when a constant scale follows, the product with the vector is rounded first,
    then the product with the constant (each was an operation of its own on rounded values).
    The sum of squares runs over lanes in a fixed order, so a row never depends on the others.
    """
    args = [Buf("x", (PerToken(copies), stride), storage(dtype), True)]
    if spec.weighted:
        args.append(Buf("weight", (width,), "float32"))
    args.append(Buf("y", (PerToken(copies), stride if out_dtype == "float32" else width),
                    storage(out_dtype)))  # fmt: skip
    steps = spec.scale != 1.0
    first = spec.vector_first

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        full = width // em.lanes
        tail = range(full * em.lanes, width)

        def vector(at: Any) -> Any:
            value = em.load(b.weight, [at], "float32")
            return value + em.splat(spec.offset) if spec.offset else value

        def one(at: int) -> Any:
            value = tirx.BufferLoad(b.weight, [i64(at)])
            return value + f32(spec.offset) if spec.offset else value

        def lanes_of(t: Any, c: Any) -> Any:
            value = em.load(b.x, [t, c * em.lanes], dtype)
            return value * vector(c * em.lanes) if first else value

        def one_of(t: Any, c: int) -> Any:
            value = load_scalar(b.x, [t, i64(c)], dtype)
            return value * one(c) if first else value

        with chunk(tokens * copies, threads) as (begin, end), loop(end, begin) as t:
            total = T.alloc_buffer((1,), em.f32v)
            T.buffer_store(total, em.splat(0.0), [0])
            with loop(full) as c:
                value = em.bind(lanes_of(t, c))
                T.buffer_store(total, em.fma(value, value, tirx.BufferLoad(total, [0])), [0])
            squares = scalar("float32", em.reduce_add(tirx.BufferLoad(total, [0])))
            for c in tail:
                value = em.bind(one_of(t, c))
                T.buffer_store(squares, tirx.BufferLoad(squares, [0]) + value * value, [0])
            mean = tirx.BufferLoad(squares, [0]) / f32(float(width)) + f32(spec.eps)
            factor = em.bind(f32(1.0) / T.sqrt(mean))
            splat = em.bind(tirx.Broadcast(factor, em.lanes))
            with loop(full) as c:
                value = lanes_of(t, c) * splat
                if steps:
                    value = em.round_to(value, out_dtype)
                if spec.weighted and not first:
                    value = value * vector(c * em.lanes)
                if steps:
                    value = em.round_to(value, out_dtype) * em.splat(spec.scale)
                em.store(b.y, em.bind(value), [t, c * em.lanes], out_dtype)
            for c in tail:
                value = one_of(t, c) * factor
                if steps:
                    value = round_scalar(value, out_dtype)
                if spec.weighted and not first:
                    value = value * one(c)
                if steps:
                    value = round_scalar(value, out_dtype) * f32(spec.scale)
                store_scalar(b.y, value, [t, i64(c)], out_dtype)

    return build(symbol, isa, tuple(args), body)
