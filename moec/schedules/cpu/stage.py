"""Stage activations for a matmul: converted, padded with zeros, aligned, optionally weighted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, i64, storage
from .isa import Isa
from .kernel import build, chunk, loop
from .tiles import Operand


def load_scalar(buffer: Any, indices: list[Any], dtype: str) -> Any:
    """One value of `dtype` as float32."""
    value = tirx.BufferLoad(buffer, indices)
    if dtype == "bfloat16":
        bits = tirx.LShift(tirx.Cast("int32", value), tirx.const(16, "int32"))
        return T.reinterpret("float32", bits)
    return value if dtype == "float32" else tirx.Cast("float32", value)


def stage_rows(
    symbol: str, isa: Isa, dtype: str, operand: Operand, top_k: int | None, stride: int
) -> Kernel:
    """x [T, stride] of `dtype` -> staged [T, ...] (or [S, ...] of w * x when `top_k` is given).

    With `top_k` the row t*K+k is x[t] * topk_weights[t, k], rounded to `dtype` as a model
    that weights the experts' input does it.
    """
    out_dtype = storage(operand.dtype)
    width = operand.width
    args = [Buf("x", (PerToken(), stride), storage(dtype), True)]
    if top_k is not None:
        args.append(Buf("topk_weights", (PerToken(), top_k), "float32", True))
    copies = 1 if top_k is None else top_k
    args.append(Buf("rows", (PerToken(copies), operand.stride), out_dtype))

    def row(em: Emit, b: SimpleNamespace, t: Any, k: Any) -> None:
        target = t * copies + k
        full = width // em.lanes
        weight = None
        if top_k is not None:
            weight = em.bind(tirx.Broadcast(tirx.BufferLoad(b.topk_weights, [t, k]), em.lanes))
        with loop(full) as c:
            value = em.load(b.x, [t, c * em.lanes], dtype)
            if weight is not None:
                value = em.round_to(value * weight, dtype)
            em.store(b.rows, value, [target, c * em.lanes], operand.dtype)
        # Columns past the last full vector: values one by one inside a zeroed tail.
        tail = width - full * em.lanes
        for c in range(full * em.lanes, operand.stride, em.lanes):
            em.store(b.rows, em.splat(0.0), [target, i64(c)], operand.dtype)
        for c in range(width - tail, width):
            raw = tirx.BufferLoad(b.x, [t, i64(c)])
            if weight is None and operand.dtype == dtype:
                T.buffer_store(b.rows, raw, [target, i64(c)])
                continue
            value = load_scalar(b.x, [t, i64(c)], dtype)
            if weight is not None:
                value = value * tirx.BufferLoad(b.topk_weights, [t, k])
            store_scalar(b.rows, value, [target, i64(c)], operand.dtype, dtype)

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t, loop(copies) as k:
            row(em, b, t, k)

    return build(symbol, isa, tuple(args), body)


def round_scalar(value: Any, dtype: str) -> Any:
    """A float32 scalar rounded to what `dtype` holds, as float32 (NaN stays NaN)."""
    if dtype == "float16":
        return tirx.Cast("float32", tirx.Cast("float16", value))
    if dtype != "bfloat16":
        return value
    return T.reinterpret(
        "float32", tirx.BitwiseAnd(_rounded_bits(value), tirx.const(-65536, "int32"))
    )


def _rounded_bits(value: Any) -> Any:
    value = T.bind(value)
    bits = T.bind(T.reinterpret("int32", value))
    sixteen = tirx.const(16, "int32")
    odd = tirx.BitwiseAnd(tirx.RShift(bits, sixteen), tirx.const(1, "int32"))
    rounded = bits + odd + tirx.const(0x7FFF, "int32")
    return T.bind(tirx.Select(tirx.NE(value, value), tirx.const(0x7FC00000, "int32"), rounded))


def store_scalar(
    buffer: Any, value: Any, indices: list[Any], dtype: str, via: str = "float32"
) -> None:
    """Store a float32 scalar as `dtype`, after rounding it to `via`."""
    value = round_scalar(value, via) if via != dtype else value
    if dtype == "bfloat16":
        bits = tirx.RShift(_rounded_bits(value), tirx.const(16, "int32"))
        value = tirx.Cast("uint16", bits)
    elif dtype == "float16":
        value = tirx.Cast("float16", value)
    T.buffer_store(buffer, value, indices)
