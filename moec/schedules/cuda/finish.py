"""The weighted sum of the K rows of each token, and what the block adds to it.

Each thread owns 8 columns of one token and adds its K rows in ascending k, in float32: the
order is fixed, so the result is bitwise the same on every run and wherever a token stands
in the batch.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...spec import SharedGate
from ..buffers import Buf, Kernel, PerToken
from .intrinsics import LOAD_ONE, fresh, load8, store8, unpack8

THREADS = 128


@dataclass(frozen=True)
class Finish:
    """y = share * scale * (sum_k w_k rows_k [+ pass_weight * passed]) [+ s * shared] [+ residual]
    [+ bias], rounded once.

    `weighted`: w is topk_weights, else 1. rows and y are of `dtype` and `out`, passed and
    residual of the dtypes given (None: absent). s is `shared_scale`, times sigmoid(gate [T, 1])
    or, with the softmax gate [T, 2], its second share; `share` is then the first one, else 1.
    With 0 `experts` rows are [T, width] and plain: nothing but the rest is done.
    """

    experts: int
    top_k: int
    width: int
    dtype: str
    out: str
    weighted: bool = True
    scale: float = 1.0
    shared: bool = False
    gate: SharedGate = SharedGate.NONE
    shared_scale: float = 1.0
    residual: str | None = None
    passed: str | None = None
    bias: bool = False


def finish(symbol: str, spec: Finish) -> Kernel:
    """rows [S, width], topk_ids, topk_weights, and OPTIONAL -> y [T, width].

    Operands that `spec` does without are there, unread: any buffer stands in their place.
    """
    E, K, H, DT, OUT_DT = spec.experts, spec.top_k, spec.width, spec.dtype, spec.out
    WEIGHTED, SHARED, BIAS = spec.weighted, spec.shared, spec.bias
    SIGMOID, SOFTMAX = spec.gate is SharedGate.SIGMOID, spec.gate is SharedGate.SOFTMAX
    GATES, FACTOR = 2 if SOFTMAX else 1, spec.shared_scale
    RESIDUAL, SCALE, RES_DT = spec.residual is not None, spec.scale, spec.residual or DT
    PASSED, PASS_DT = spec.passed is not None, spec.passed or DT
    EVEN = H % 8 == 0  # then every piece of 8 columns is whole and aligned
    COLS = -(-H // 8)
    WORDS = 8 if DT == "float32" else 4  # of 8 columns of a row

    # fmt: off
    @T.prim_func
    def kernel(rows_p: T.handle(DT), ids_p: T.handle("int32"), w_p: T.handle("float32"), shared_p: T.handle("float32"), gate_p: T.handle("float32"), res_p: T.handle(RES_DT), bias_p: T.handle("float32"), passed_p: T.handle(PASS_DT), pw_p: T.handle("float32"), y_p: T.handle(OUT_DT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        ROWS = T.decl_buffer((NT * K, H), DT, data=rows_p)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        W = T.decl_buffer((NT * K,), "float32", data=w_p)
        SH = T.decl_buffer((NT, H), "float32", data=shared_p)
        G = T.decl_buffer((NT * GATES,), "float32", data=gate_p)
        RES = T.decl_buffer((NT, H), RES_DT, data=res_p)
        BIASV = T.decl_buffer((H,), "float32", data=bias_p)
        PASS = T.decl_buffer((NT, H), PASS_DT, data=passed_p)
        PW = T.decl_buffer((NT,), "float32", data=pw_p)
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
        row: T.int64 = T.Cast("int64", t)  # values of T * K rows are more than 32 bits count
        total = T.alloc_local((8,), "float32")
        value = T.alloc_local((8,), "float32")
        raw = T.alloc_local((K * WORDS,), "uint32")

        @T.inline
        def load(source, row):
            if EVEN:
                load8(value.ptr_to([0]), source.ptr_to([row, c]))
            else:
                for i in T.unroll(8):
                    value[i] = T.float32(0)
                    if c + i < H:
                        value[i] = T.cuda.func_call("moec_load_one", source.ptr_to([row, c + i]), source_code=LOAD_ONE, return_type="float32")

        if t < NT:
            for i in T.unroll(8):
                total[i] = T.float32(0)
            # all loads first: they are in flight together, whatever the ids are
            if EVEN:
                for k in T.unroll(K):
                    for j in T.unroll(WORDS // 4):
                        r = T.meta_var(k * WORDS + j * 4)
                        T.ptx["ld.global.cg.v4.u32"](raw[r], raw[r + 1], raw[r + 2], raw[r + 3], ROWS.ptr_to([row * K + k, c + j * 4]))
            for k in T.unroll(K):
                e: T.int32 = 0
                if E > 0:
                    e = fresh(IDS, t * K + k)
                w: T.float32 = T.float32(1)
                if WEIGHTED:
                    w = fresh(W, t * K + k, "float32")
                if EVEN:
                    unpack8(value.ptr_to([0]), raw.ptr_to([k * WORDS]), DT)
                else:
                    load(ROWS, row * K + k)
                # selected, not branched over: a branch would hold the loads back. Rows of
                # absent experts were never written and may hold anything.
                for i in T.unroll(8):
                    total[i] = total[i] + T.Select(e >= 0 and e < max(E, 1), w * value[i], T.float32(0))
            if PASSED:
                load(PASS, row)
                p: T.float32 = fresh(PW, t, "float32")
                for i in T.unroll(8):
                    total[i] = total[i] + p * value[i]
            if SCALE != 1.0:
                for i in T.unroll(8):
                    total[i] = total[i] * T.float32(SCALE)
            if SHARED:
                s: T.float32 = T.float32(FACTOR)
                if SIGMOID:
                    s = T.float32(FACTOR) / (T.float32(1) + T.exp(-fresh(G, t, "float32")))
                if SOFTMAX:
                    # the softmax of two values: sigmoids of their difference
                    more: T.float32 = fresh(G, t * 2 + 1, "float32") - fresh(G, t * 2, "float32")
                    s = T.float32(FACTOR) / (T.float32(1) + T.exp(-more))
                    for i in T.unroll(8):
                        total[i] = total[i] / (T.float32(1) + T.exp(more))
                load(SH, row)
                for i in T.unroll(8):
                    total[i] = total[i] + s * value[i]
            if RESIDUAL:
                load(RES, row)
                for i in T.unroll(8):
                    total[i] = total[i] + value[i]
            if BIAS:
                for i in T.unroll(8):
                    if EVEN or c + i < H:
                        total[i] = total[i] + fresh(BIASV, c + i, "float32")
            if EVEN:
                store8(Y.ptr_to([row, c]), total.ptr_to([0]))
            else:
                for i in T.unroll(8):
                    if c + i < H:
                        Y[row, c + i] = T.Cast(OUT_DT, total[i])
    # fmt: on
    rows = PerToken(K)
    args = (
        Buf("rows", (rows, H), DT),
        Buf("topk_ids", (PerToken(), K), "int32", True),
        Buf("topk_weights", (PerToken(), K), "float32", True),
        Buf("shared", (PerToken(), H), "float32"),
        Buf("gate", (PerToken(), GATES), "float32"),
        Buf("residual", (PerToken(), H), RES_DT, True),
        Buf("bias", (H,), "float32"),
        Buf("passed", (PerToken(), H), PASS_DT, True),
        Buf("pass_weight", (PerToken(), 1), "float32"),
        Buf("y", (PerToken(), H), OUT_DT, True),
    )
    return Kernel(symbol, args, kernel)


# The operands after rows, ids and weights, by the names that ops.combine has for them.
OPTIONAL = ("shared", "gate", "residual", "bias", "passed", "pass_weight")


def pass_weight(symbol: str, top_k: int, first: int, count: int) -> Kernel:
    """topk_ids, topk_weights [T, K] -> [T, 1]: the sum of weights whose ids are of zero experts.

    Those are [first, first + count).
    """
    K, LOW, HIGH = top_k, first, first + count

    # fmt: off
    @T.prim_func
    def kernel(ids_p: T.handle("int32"), w_p: T.handle("float32"), y_p: T.handle("float32"), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        W = T.decl_buffer((NT * K,), "float32", data=w_p)
        Y = T.decl_buffer((NT,), "float32", data=y_p)
        T.device_entry()
        bx = T.cta_id([(NT + THREADS - 1) // THREADS])
        tid = T.thread_id([THREADS])
        T.ptx.griddepcontrol.launch_dependents()
        T.ptx.griddepcontrol.wait()
        t: T.int32 = bx * THREADS + tid
        total: T.float32 = T.float32(0)
        if t < NT:
            for k in T.serial(K):
                e: T.int32 = fresh(IDS, t * K + k)
                if e >= LOW and e < HIGH:
                    total = total + fresh(W, t * K + k, "float32")
            Y[t] = total
    # fmt: on
    args = (
        Buf("topk_ids", (PerToken(), K), "int32", True),
        Buf("topk_weights", (PerToken(), K), "float32", True),
        Buf("pass_weight", (PerToken(), 1), "float32"),
    )
    return Kernel(symbol, args, kernel)
