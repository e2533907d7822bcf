"""RMSNorm of rows, in float32, with the roundings of the published code."""

from __future__ import annotations

from dataclasses import dataclass
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

    With `copies` there are so many rows for each token. Rows of a float32 accumulator are
    `stride` apart. `out_dtype` is what the result is rounded to; when a constant scale follows,
    the product with the vector is rounded first, then the product with the constant (each was
    an operation of its own on rounded values). The sum of squares runs over lanes in a fixed
    order, so a row never depends on the others.
    """
    args = [Buf("x", (PerToken(copies), stride), storage(dtype), True)]
    if spec.weighted:
        args.append(Buf("weight", (width,), "float32"))
    args.append(Buf("y", (PerToken(copies), stride if out_dtype == "float32" else width),
                    storage(out_dtype)))  # fmt: skip
    steps = spec.scale != 1.0
    first = spec.vector_first
    last = spec.weighted and not first

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        full = width // em.lanes
        row = _Row(em, b, spec, dtype)
        with chunk(tokens * copies, threads) as (begin, end), loop(end, begin) as t:
            factor = em.bind(_factor(em, row, t, full, width, spec.eps))
            splat = em.bind(tirx.Broadcast(factor, em.lanes))
            with loop(full) as c:
                value = row.lanes(t, c, first) * splat
                if steps:
                    value = em.round_to(value, out_dtype)
                if last:
                    value = value * row.vector(c * em.lanes)
                if steps:
                    value = em.round_to(value, out_dtype) * em.splat(spec.scale)
                em.store(b.y, em.bind(value), [t, c * em.lanes], out_dtype)
            for c in range(full * em.lanes, width):
                value = row.one(t, c, first) * factor
                if steps:
                    value = round_scalar(value, out_dtype)
                if last:
                    value = value * row.entry(c)
                if steps:
                    value = round_scalar(value, out_dtype) * f32(spec.scale)
                store_scalar(b.y, value, [t, i64(c)], out_dtype)

    return build(symbol, isa, tuple(args), body)


@dataclass(frozen=True)
class _Row:
    """Reads x and the stored vector, by vectors and by single values."""

    em: Emit
    b: SimpleNamespace
    spec: NormSpec
    dtype: str

    def vector(self, at: Any) -> Any:
        value = self.em.load(self.b.weight, [at], "float32")
        return value + self.em.splat(self.spec.offset) if self.spec.offset else value

    def entry(self, at: int) -> Any:
        value = tirx.BufferLoad(self.b.weight, [i64(at)])
        return value + f32(self.spec.offset) if self.spec.offset else value

    def lanes(self, t: Any, c: Any, weighted: bool) -> Any:
        value = self.em.load(self.b.x, [t, c * self.em.lanes], self.dtype)
        return value * self.vector(c * self.em.lanes) if weighted else value

    def one(self, t: Any, c: int, weighted: bool) -> Any:
        value = load_scalar(self.b.x, [t, i64(c)], self.dtype)
        return value * self.entry(c) if weighted else value


def _factor(em: Emit, row: _Row, t: Any, full: int, width: int, eps: float) -> Any:
    """(mean(x^2) + eps)^-0.5 of one row."""
    first = row.spec.vector_first
    total = T.alloc_buffer((1,), em.f32v)
    T.buffer_store(total, em.splat(0.0), [0])
    with loop(full) as c:
        value = em.bind(row.lanes(t, c, first))
        T.buffer_store(total, em.fma(value, value, tirx.BufferLoad(total, [0])), [0])
    squares = scalar("float32", em.reduce_add(tirx.BufferLoad(total, [0])))
    for c in range(full * em.lanes, width):
        value = em.bind(row.one(t, c, first))
        T.buffer_store(squares, tirx.BufferLoad(squares, [0]) + value * value, [0])
    mean = tirx.BufferLoad(squares, [0]) / f32(float(width)) + f32(eps)
    return f32(1.0) / T.sqrt(mean)
