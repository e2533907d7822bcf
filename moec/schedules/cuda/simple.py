"""Matmuls by plain fused multiply-add in float32: every dtype, shape and epilogue.

What the tensor-core kernels do not take (float32 weights, widths that are no multiple of
their tiles, weighted inputs), the dense matmuls of a block, and the baseline that the others
are compared with. 64 rows by 64 outputs a block, 16 columns of K at a time in shared memory.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from . import sort
from .activation import device_function
from .intrinsics import LOAD_ONE, fresh, round_to

ROWS, OUTS, DEPTH, THREADS = 64, 64, 16, 256


@dataclass(frozen=True)
class Simple:
    """What is multiplied: `experts` 0 is one dense weight, otherwise tiles of sorted rows.

    `gather`: x is [T, inner], read through row_order; else x has a row for each result row.
    `single`: the rows of one expert only, the one whose number is passed as `threads`; its
    rows are found in expert_offsets, which stand in the place of the tiles.
    `scatter`: result rows go to their (token, k) place. `weighted`: rows of x are multiplied
    by topk_weights and rounded to `x_dtype` first. `act`: gate and up are combined.
    """

    experts: int
    top_k: int
    inner: int
    outer: int
    x_dtype: str
    dtype: str
    out: str
    bias: bool = False
    gated: bool = False
    act: ActivationSpec | None = None
    gather: bool = False
    scatter: bool = False
    weighted: bool = False
    single: bool = False


def matmul(symbol: str, spec: Simple, sms: int) -> Kernel:
    """x, row_order, tiles, tile_count, topk_weights, weight, bias -> result [rows, outer].

    Dense: x [T, inner], weight [(2 x) outer, inner]; the operands between them, and whatever
    `spec` does without, are there unread: any buffer stands in their place.
    """
    E, TOPK, K, N = spec.experts, spec.top_k, spec.inner, spec.outer
    DENSE, GATHER, SCATTER, WEIGHTED = E == 0, spec.gather, spec.scatter, spec.weighted
    GATED, BIAS, ACTIVE = spec.gated, spec.bias, spec.act is not None
    XDT, WDT, ODT = spec.x_dtype, spec.dtype, spec.out
    HALVES = 2 if GATED else 1
    WROWS, NB = N * HALVES, -(-N // OUTS)
    PER, SINGLE = 1 if DENSE or GATHER else TOPK, spec.single
    ACT, ACT_SRC = device_function(spec.act, GATED, ODT == "float32") if spec.act else ("", "")

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(XDT), order_p: T.handle("int32"), tiles_p: T.handle("int32"), count_p: T.handle("int32"), wts_p: T.handle("float32"), w_p: T.handle(WDT), bias_p: T.handle("float32"), out_p: T.handle(ODT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        S: T.let[T.int32] = NT * TOPK
        X = T.decl_buffer((tokens * PER, T.int64(K)), XDT, data=x_p)
        ORDER = T.decl_buffer((S,), "int32", data=order_p)
        TILES = T.decl_buffer((E + 1 if SINGLE else S * 4,), "int32", data=tiles_p)
        COUNT = T.decl_buffer((4,), "int32", data=count_p)
        WTS = T.decl_buffer((S,), "float32", data=wts_p)
        WEIGHT = T.decl_buffer((T.int64(max(E, 1) * WROWS), T.int64(K)), WDT, data=w_p)
        BIASV = T.decl_buffer((max(E, 1) * WROWS,), "float32", data=bias_p)
        OUT = T.decl_buffer((tokens * (1 if DENSE else TOPK), T.int64(N)), ODT, data=out_p)
        T.device_entry()
        bx = T.cta_id([(NT + ROWS - 1) // ROWS * NB if DENSE else sms])
        tid = T.thread_id([THREADS])
        pool = T.SMEMPool()
        xs = pool.alloc((DEPTH, ROWS + 4), "float32", align=16)
        ws = pool.alloc((HALVES, DEPTH, OUTS + 4), "float32", align=16)
        pool.commit()
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        tile: T.int32 = bx
        step: T.int32 = sms
        total: T.int32
        e: T.int32 = 0
        first: T.int32 = 0
        last: T.int32 = 0
        if DENSE:
            step = (NT + ROWS - 1) // ROWS * NB
            total = step
        elif SINGLE:
            e = T.Cast("int32", threads)
            first = fresh(TILES, e)
            last = fresh(TILES, e + 1)
            total = (last - first + ROWS - 1) // ROWS * NB
        else:
            total = fresh(COUNT, 0) * NB
        acc = T.alloc_local((HALVES * 16,), "float32")
        xv = T.alloc_local((4,), "float32")
        wv = T.alloc_local((4,), "float32")
        ty: T.int32 = tid // 16
        tx: T.int32 = tid % 16
        lr: T.int32 = tid // 4                   # row (of x, of the weight) that this thread loads
        lk: T.int32 = tid % 4 * 4
        row0: T.int32
        rows: T.int32

        while tile < total:
            m: T.int32 = tile // NB
            n: T.int32 = tile - m * NB
            if DENSE:
                row0 = m * ROWS
                rows = T.min(NT - row0, ROWS)
            elif SINGLE:
                row0 = first + m * ROWS
                rows = T.min(last - row0, ROWS)
            else:
                e = fresh(TILES, m * 4)
                row0 = fresh(TILES, m * 4 + 1)
                rows = fresh(TILES, m * 4 + 2)
            source: T.int64 = T.Cast("int64", row0 + T.min(lr, rows - 1))
            scale: T.float32 = T.float32(1)
            if GATHER or WEIGHTED:
                pair: T.int32 = fresh(ORDER, row0 + T.min(lr, rows - 1))
                if GATHER:
                    source = T.Cast("int64", pair // TOPK)
                if WEIGHTED:
                    scale = fresh(WTS, pair, "float32")
            wrow: T.int64 = T.Cast("int64", e) * WROWS + T.min(n * OUTS + lr, N - 1)
            for i in T.unroll(HALVES * 16):
                acc[i] = T.float32(0)
            for kb in T.serial((K + DEPTH - 1) // DEPTH):
                T.cuda.cta_sync()
                for j in T.unroll(4):
                    at: T.int32 = kb * DEPTH + lk + j
                    xs[lk + j, lr] = T.float32(0)
                    for h in T.unroll(HALVES):
                        ws[h, lk + j, lr] = T.float32(0)
                    if at < K:
                        one: T.float32 = T.cuda.func_call("moec_load_one", X.ptr_to([source, T.Cast("int64", at)]), source_code=LOAD_ONE, return_type="float32")
                        if WEIGHTED:
                            one = round_to(one * scale, XDT)
                        xs[lk + j, lr] = one
                        for h in T.unroll(HALVES):
                            ws[h, lk + j, lr] = T.cuda.func_call("moec_load_one", WEIGHT.ptr_to([wrow + T.Cast("int64", h) * N, T.Cast("int64", at)]), source_code=LOAD_ONE, return_type="float32")
                T.cuda.cta_sync()
                for d in T.unroll(DEPTH):
                    for i in T.unroll(4):
                        xv[i] = xs[d, ty * 4 + i]
                    for h in T.unroll(HALVES):
                        for i in T.unroll(4):
                            wv[i] = ws[h, d, tx * 4 + i]
                        for i in T.unroll(4):
                            for j in T.unroll(4):
                                acc[h * 16 + i * 4 + j] = acc[h * 16 + i * 4 + j] + xv[i] * wv[j]
            for i in T.unroll(4):
                if ty * 4 + i < rows:
                    to: T.int64 = T.Cast("int64", row0 + ty * 4 + i)
                    if SCATTER:
                        to = T.Cast("int64", fresh(ORDER, row0 + ty * 4 + i))
                    for j in T.unroll(4):
                        col: T.int32 = n * OUTS + tx * 4 + j
                        if col < N:
                            value: T.float32 = acc[i * 4 + j]
                            if BIAS:
                                value = value + BIASV[e * WROWS + col]
                            if ACTIVE:
                                if GATED:
                                    other: T.float32 = acc[16 * (HALVES - 1) + i * 4 + j]
                                    if BIAS:
                                        other = other + BIASV[e * WROWS + N + col]
                                    value = T.cuda.func_call(ACT, value, other, source_code=ACT_SRC, return_type="float32")
                                else:
                                    value = T.cuda.func_call(ACT, value, value, source_code=ACT_SRC, return_type="float32")
                            OUT[to, T.Cast("int64", col)] = T.Cast(ODT, value)
            tile += step
    # fmt: on
    _, order, offsets, tiles, count = sort.buffers(max(E, 1), TOPK)
    weight = Buf("weight", (max(E, 1), WROWS, K) if E else (WROWS, K), WDT)
    args = (
        Buf("x", (PerToken(PER), K), XDT, True),
        order,
        offsets if SINGLE else tiles,
        count,
        Buf("topk_weights", (PerToken(), TOPK), "float32", True),
        weight,
        Buf("bias", (max(E, 1), WROWS), "float32"),
        Buf("rows" if SCATTER else "h" if ACTIVE else "y",
            (PerToken(1 if DENSE else TOPK), N), ODT),
    )  # fmt: skip
    return Kernel(symbol, args, kernel)
