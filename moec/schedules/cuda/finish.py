"""The weighted sum of the K rows of each token, and what the block adds to it.

Each thread owns 8 columns of one token and adds its K rows in ascending k, in float32: the
order is fixed, so the result is bitwise the same on every run and wherever a token stands
in the batch.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ..buffers import Buf, Kernel, PerToken
from .intrinsics import fresh, load8, store8, unpack8

THREADS = 128


@dataclass(frozen=True)
class Finish:
    """y = scale * sum_k w_k rows_k (+ sigmoid(gate) * shared) (+ residual), rounded once.

    `weighted`: w is topk_weights, else 1. rows and y are of `dtype` and `out`. With 0
    `experts` rows are [T, H] and plain: nothing but the rest is done.
    """

    experts: int
    top_k: int
    hidden: int
    dtype: str
    out: str
    weighted: bool = True
    scale: float = 1.0
    shared: bool = False
    gate: bool = False
    residual: str | None = None


def finish(symbol: str, spec: Finish) -> Kernel:
    """rows [S, H], topk_ids, topk_weights, shared, gate, residual -> y [T, H].

    Operands that `spec` does without are there, unread: any buffer stands in their place.
    """
    E, K, H, DT, OUT_DT = spec.experts, spec.top_k, spec.hidden, spec.dtype, spec.out
    WEIGHTED, SHARED, GATE = spec.weighted, spec.shared, spec.gate
    RESIDUAL, SCALE, RES_DT = spec.residual is not None, spec.scale, spec.residual or DT
    COLS = H // 8
    WORDS = 8 if DT == "float32" else 4  # of 8 columns of a row

    # fmt: off
    @T.prim_func
    def kernel(rows_p: T.handle(DT), ids_p: T.handle("int32"), w_p: T.handle("float32"), shared_p: T.handle("float32"), gate_p: T.handle("float32"), res_p: T.handle(RES_DT), y_p: T.handle(OUT_DT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        ROWS = T.decl_buffer((NT * K, H), DT, data=rows_p)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        W = T.decl_buffer((NT * K,), "float32", data=w_p)
        SH = T.decl_buffer((NT, H), "float32", data=shared_p)
        G = T.decl_buffer((NT,), "float32", data=gate_p)
        RES = T.decl_buffer((NT, H), RES_DT, data=res_p)
        Y = T.decl_buffer((NT, H), OUT_DT, data=y_p)
        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 6})
        bx = T.cta_id([(NT * COLS + THREADS - 1) // THREADS])
        tid = T.thread_id([THREADS])
        T.ptx.griddepcontrol.launch_dependents()
        T.ptx.griddepcontrol.wait()
        at: T.int32 = bx * THREADS + tid
        t: T.int32 = at // COLS
        c: T.int32 = (at - t * COLS) * 8
        total = T.alloc_local((8,), "float32")
        value = T.alloc_local((8,), "float32")
        raw = T.alloc_local((K * WORDS,), "uint32")
        if t < NT:
            for i in T.unroll(8):
                total[i] = T.float32(0)
            # all loads first: they are in flight together, whatever the ids are
            for k in T.unroll(K):
                for j in T.unroll(WORDS // 4):
                    r = T.meta_var(k * WORDS + j * 4)
                    T.ptx["ld.global.cg.v4.u32"](raw[r], raw[r + 1], raw[r + 2], raw[r + 3], ROWS.ptr_to([t * K + k, c + j * 4]))
            for k in T.unroll(K):
                e: T.int32 = 0
                if E > 0:
                    e = fresh(IDS, t * K + k)
                w: T.float32 = T.float32(1)
                if WEIGHTED:
                    w = fresh(W, t * K + k, "float32")
                unpack8(value.ptr_to([0]), raw.ptr_to([k * WORDS]), DT)
                # selected, not branched over: a branch would hold the loads back. Rows of
                # absent experts were never written and may hold anything.
                for i in T.unroll(8):
                    total[i] = total[i] + T.Select(e >= 0 and e < max(E, 1), w * value[i], T.float32(0))
            if SCALE != 1.0:
                for i in T.unroll(8):
                    total[i] = total[i] * T.float32(SCALE)
            if SHARED:
                load8(value.ptr_to([0]), SH.ptr_to([t, c]))
                s: T.float32 = T.float32(1)
                if GATE:
                    s = T.float32(1) / (T.float32(1) + T.exp(-fresh(G, t, "float32")))
                for i in T.unroll(8):
                    total[i] = total[i] + s * value[i]
            if RESIDUAL:
                load8(value.ptr_to([0]), RES.ptr_to([t, c]))
                for i in T.unroll(8):
                    total[i] = total[i] + value[i]
            store8(Y.ptr_to([t, c]), total.ptr_to([0]))
    # fmt: on
    rows = PerToken(K)
    args = (
        Buf("rows", (rows, H), DT),
        Buf("topk_ids", (PerToken(), K), "int32", True),
        Buf("topk_weights", (PerToken(), K), "float32", True),
        Buf("shared", (PerToken(), H), "float32"),
        Buf("gate", (PerToken(), 1), "float32"),
        Buf("residual", (PerToken(), H), RES_DT, True),
        Buf("y", (PerToken(), H), OUT_DT, True),
    )
    return Kernel(symbol, args, kernel)
