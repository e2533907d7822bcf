"""What surrounds the experts of a block: matmuls of mixed dtypes, RMSNorm, routing weights."""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...spec import ActivationSpec, NormSpec
from ..buffers import Buf, Kernel, PerToken
from .activation import device_function
from .intrinsics import LOAD_ONE, fresh, load8, round_to

WARPS, GROUP = 8, 8
STEPS = 4  # of 256 columns whose loads are in flight together


@T.inline
def dots(x, weight, acc, wv, xv, t0, n, tokens, outer, inner, halves, lane):
    """acc[t * halves + h] += a part of row t0 + t of `x` times row n + h * outer of `weight`.

    The part of columns lane * 8, lane * 8 + 256, ...; `wv` and `xv` hold STEPS * 8 (* halves)
    floats. Loads of several steps come before the first use: each is a trip to memory.
    """
    for block in T.serial((inner + STEPS * 256 - 1) // (STEPS * 256)):
        for s in T.unroll(STEPS):
            for h in T.unroll(halves):
                c: T.int32 = ((block * STEPS + s) * 32 + lane) * 8
                if c < inner:
                    load8(wv.ptr_to([(s * halves + h) * 8]), weight.ptr_to([n + h * outer, c]))
        for t in T.unroll(GROUP):
            if t0 + t < tokens:
                for s in T.unroll(STEPS):
                    c: T.int32 = ((block * STEPS + s) * 32 + lane) * 8
                    if c < inner:
                        load8(xv.ptr_to([s * 8]), x.ptr_to([T.Cast("int64", t0 + t), c]))
                for s in T.unroll(STEPS):
                    c: T.int32 = ((block * STEPS + s) * 32 + lane) * 8
                    if c < inner:
                        for h in T.unroll(halves):
                            for i in T.unroll(8):
                                acc[t * halves + h] = (
                                    acc[t * halves + h]
                                    + xv[s * 8 + i] * wv[(s * halves + h) * 8 + i]
                                )


@dataclass(frozen=True)
class Few:
    """x [T, inner] times weight [(2 x) outer, inner]^T (+ bias), activated or not."""

    inner: int
    outer: int
    x_dtype: str
    dtype: str
    out: str
    bias: bool = False
    gated: bool = False
    act: ActivationSpec | None = None


def few(symbol: str, spec: Few) -> Kernel:
    """x, weight, bias -> y [T, outer]: a warp for every output of a group of eight tokens.

    Float32 sums in an order that depends on nothing but `inner`, a multiple of 8. Without bias
    any buffer stands in its place.
    """
    K, N, XDT, WDT, ODT = spec.inner, spec.outer, spec.x_dtype, spec.dtype, spec.out
    GATED, BIAS, ACTIVE = spec.gated, spec.bias, spec.act is not None
    HALVES, NB = 2 if GATED else 1, -(-spec.outer // WARPS)
    ACT, ACT_SRC = device_function(spec.act, GATED, ODT == "float32") if spec.act else ("", "")

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(XDT), w_p: T.handle(WDT), bias_p: T.handle("float32"), y_p: T.handle(ODT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        X = T.decl_buffer((NT, K), XDT, data=x_p)
        WEIGHT = T.decl_buffer((N * HALVES, K), WDT, data=w_p)
        BIASV = T.decl_buffer((N * HALVES,), "float32", data=bias_p)
        Y = T.decl_buffer((NT, N), ODT, data=y_p)
        T.device_entry()
        bx = T.cta_id([(NT + GROUP - 1) // GROUP * NB])
        tid = T.thread_id([WARPS * 32])
        lane = T.meta_var(tid % 32)
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        t0: T.int32 = bx // NB * GROUP
        n: T.int32 = bx % NB * WARPS + tid // 32
        acc = T.alloc_local((GROUP * HALVES,), "float32")
        wv = T.alloc_local((STEPS * HALVES * 8,), "float32")
        xv = T.alloc_local((STEPS * 8,), "float32")
        for i in T.unroll(GROUP * HALVES):
            acc[i] = T.float32(0)
        if n < N:
            dots(X, WEIGHT, acc, wv, xv, t0, n, NT, N, K, HALVES, lane)
            for t in T.unroll(GROUP):
                if t0 + t < NT:
                    for h in T.unroll(HALVES):
                        for d in T.unroll(5):
                            acc[t * HALVES + h] = acc[t * HALVES + h] + T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), acc[t * HALVES + h], 1 << d, 32)
                        if BIAS:
                            acc[t * HALVES + h] = acc[t * HALVES + h] + BIASV[n + h * N]
                    if lane == 0:
                        if ACTIVE:
                            Y[T.Cast("int64", t0 + t), n] = T.Cast(ODT, T.cuda.func_call(ACT, acc[t * HALVES], acc[t * HALVES + HALVES - 1], source_code=ACT_SRC, return_type="float32"))
                        else:
                            Y[T.Cast("int64", t0 + t), n] = T.Cast(ODT, acc[t * HALVES])
    # fmt: on
    args = (
        Buf("x", (PerToken(), K), XDT, True),
        Buf("weight", (N * HALVES, K), WDT),
        Buf("bias", (N * HALVES,), "float32"),
        Buf("h" if ACTIVE else "y", (PerToken(), N), ODT),
    )
    return Kernel(symbol, args, kernel)


def rms_norm(
    symbol: str, spec: NormSpec, width: int, dtype: str, out: str, copies: int = 1
) -> Kernel:
    """x [T, width], weight [width] f32 -> x * (mean(x^2) + eps)^-0.5 [* weight] [* scale].

    With `copies` there are so many rows for each token. `out` is what the result is rounded
    to; with a constant scale every step is rounded, as published code does it on rounded
    values. Without weight any buffer stands in its place.
    """
    THREADS, STEPS = 256, spec.scale != 1.0
    FIRST, LAST = spec.vector_first, spec.weighted and not spec.vector_first
    TURNS = -(-width // THREADS)

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(dtype), w_p: T.handle("float32"), y_p: T.handle(out), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens) * copies
        X = T.decl_buffer((NT, width), dtype, data=x_p)
        WEIGHT = T.decl_buffer((width,), "float32", data=w_p)
        Y = T.decl_buffer((NT, width), out, data=y_p)
        T.device_entry()
        bx = T.cta_id([NT])
        row: T.int64 = T.Cast("int64", bx)
        tid = T.thread_id([THREADS])
        pool = T.SMEMPool()
        sums = pool.alloc((THREADS // 32,), "float32", align=16)
        pool.commit()
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        acc: T.float32 = T.float32(0)
        for i in T.serial(TURNS):
            if i * THREADS + tid < width:
                one: T.float32 = T.cuda.func_call("moec_load_one", X.ptr_to([row, i * THREADS + tid]), source_code=LOAD_ONE, return_type="float32")
                if FIRST:
                    one = one * (fresh(WEIGHT, i * THREADS + tid, "float32") + T.float32(spec.offset))
                acc = acc + one * one
        for d in T.unroll(5):
            acc = acc + T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), acc, 1 << d, 32)
        if tid % 32 == 0:
            sums[tid // 32] = acc
        T.cuda.cta_sync()
        acc = T.float32(0)
        for i in T.unroll(THREADS // 32):
            acc = acc + sums[i]
        factor: T.float32 = T.float32(1) / T.sqrt(acc / T.float32(width) + T.float32(spec.eps))
        for i in T.serial(TURNS):
            c: T.int32 = i * THREADS + tid
            if c < width:
                value: T.float32 = T.cuda.func_call("moec_load_one", X.ptr_to([row, c]), source_code=LOAD_ONE, return_type="float32")
                if FIRST:
                    value = value * (fresh(WEIGHT, c, "float32") + T.float32(spec.offset))
                value = value * factor
                if STEPS:
                    value = round_to(value, out)
                if LAST:
                    value = value * (fresh(WEIGHT, c, "float32") + T.float32(spec.offset))
                if STEPS:
                    value = round_to(value, out) * T.float32(spec.scale)
                Y[row, c] = T.Cast(out, value)
    # fmt: on
    args = (
        Buf("x", (PerToken(copies), width), dtype, True),
        Buf("weight", (width,), "float32"),
        Buf("y", (PerToken(copies), width), out),
    )
    return Kernel(symbol, args, kernel)


def weigh(symbol: str, width: int, dtype: str) -> Kernel:
    """x [T, width], topk_weights [T, 1] -> x * weight, rounded to `dtype`, what x is of."""
    THREADS, TURNS = 128, -(-width // 128)

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(dtype), w_p: T.handle("float32"), y_p: T.handle(dtype), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        X = T.decl_buffer((NT, width), dtype, data=x_p)
        W = T.decl_buffer((NT,), "float32", data=w_p)
        Y = T.decl_buffer((NT, width), dtype, data=y_p)
        T.device_entry()
        bx = T.cta_id([NT])
        row: T.int64 = T.Cast("int64", bx)
        tid = T.thread_id([THREADS])
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        w: T.float32 = fresh(W, bx, "float32")
        for i in T.serial(TURNS):
            c: T.int32 = i * THREADS + tid
            if c < width:
                one: T.float32 = T.cuda.func_call("moec_load_one", X.ptr_to([row, c]), source_code=LOAD_ONE, return_type="float32")
                Y[row, c] = T.Cast(dtype, one * w)
    # fmt: on
    args = (
        Buf("x", (PerToken(), width), dtype, True),
        Buf("topk_weights", (PerToken(), 1), "float32", True),
        Buf("y", (PerToken(), width), dtype),
    )
    return Kernel(symbol, args, kernel)
