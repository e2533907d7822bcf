"""Dense matmuls of few tokens on tensor cores: eight tokens are the N side of mma.m16n8k16.

A block computes 16 rows of the weight (or 8 of the gate and the 8 of up that belong to them)
for a group of eight tokens. Its warps share K, a lane reads 16 bytes of each of two rows and of
one token at a time: what an mma calls its k is any order of columns that both sides agree on.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from .activation import device_function

WARPS, GROUP, ROWS = 8, 8, 16
CHUNK = 32  # columns of K that the four lanes of a row read at once
AHEAD = 4  # chunks whose loads are in flight together
LOAD = "ld.global.cg.v4.u32"


@dataclass(frozen=True)
class Thin:
    """x [T, inner] times weight [(2 x) outer, inner]^T (+ bias), activated or not.

    x and weight are of `dtype`, bfloat16 or float16; inner is a multiple of 8.
    """

    inner: int
    outer: int
    dtype: str
    out: str
    bias: bool = False
    gated: bool = False
    act: ActivationSpec | None = None

    @property
    def mma(self) -> str:
        """The instruction."""
        short = "bf16" if self.dtype == "bfloat16" else "f16"
        return f"mma.sync.aligned.m16n8k16.row.col.f32.{short}.{short}.f32"

    @property
    def turns(self) -> int:
        """How many times a warp loads AHEAD chunks."""
        return -(-self.inner // (CHUNK * AHEAD * WARPS))


@T.inline
def load(source, row, words, place, stride, turn, inner, wid, lane):
    """Words place, place + stride, ... of `words` become a lane's columns of a row, AHEAD chunks."""
    for i in T.unroll(AHEAD):
        at = T.meta_var(place + i * stride)
        if inner % (CHUNK * AHEAD * WARPS) == 0:
            T.ptx[LOAD](
                words[at],
                words[at + 1],
                words[at + 2],
                words[at + 3],
                source.ptr_to([row, ((turn * AHEAD + i) * WARPS + wid) * CHUNK + lane % 4 * 8]),
            )
        else:
            c: T.int32 = ((turn * AHEAD + i) * WARPS + wid) * CHUNK + lane % 4 * 8
            for j in T.unroll(4):
                words[at + j] = T.uint32(0)
            if c < inner:
                T.ptx[LOAD](
                    words[at], words[at + 1], words[at + 2], words[at + 3], source.ptr_to([row, c])
                )


@T.inline
def multiply(acc, rows, cols, mma):
    """acc += 16 rows times 8 tokens, over the chunks that were loaded."""
    for i in T.unroll(AHEAD):
        for s in T.unroll(2):
            r = T.meta_var(i * 8 + s * 2)
            c = T.meta_var(i * 4 + s * 2)
            T.ptx[mma](
                acc[0],
                acc[1],
                acc[2],
                acc[3],
                rows[r],
                rows[r + 4],
                rows[r + 1],
                rows[r + 5],
                cols[c],
                cols[c + 1],
                acc[0],
                acc[1],
                acc[2],
                acc[3],
            )


@T.inline
def share(acc, parts, wid, lane):
    """The sums of a warp, where all warps see them."""
    T.ptx["st.shared.v4.f32"](parts.ptr_to([wid, lane, 0]), acc[0], acc[1], acc[2], acc[3])
    T.cuda.cta_sync()


def few(symbol: str, spec: Thin) -> Kernel:
    """x, weight, bias -> y [T, outer]; without bias any buffer stands in its place.

    Float32 sums in an order that depends on nothing but `inner`. The weight is requested
    before the kernel waits for the one that makes x.
    """
    K, N, DT, ODT = spec.inner, spec.outer, spec.dtype, spec.out
    GATED, BIAS, ACTIVE, MMA = spec.gated, spec.bias, spec.act is not None, spec.mma
    OUT = ROWS // 2 if GATED else ROWS  # outputs of a block
    UP, NB, TURNS = (N if GATED else 8), -(-N // OUT), spec.turns
    LAST = N * 2 - 1 if GATED else N - 1
    ACT, ACT_SRC = device_function(spec.act, GATED, ODT == "float32") if spec.act else ("", "")

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(DT), w_p: T.handle(DT), bias_p: T.handle("float32"), y_p: T.handle(ODT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        X = T.decl_buffer((NT, K), DT, data=x_p)
        WEIGHT = T.decl_buffer((LAST + 1, K), DT, data=w_p)
        BIASV = T.decl_buffer((LAST + 1,), "float32", data=bias_p)
        Y = T.decl_buffer((NT, N), ODT, data=y_p)
        T.device_entry()
        bx = T.cta_id([(NT + GROUP - 1) // GROUP * NB])
        tid = T.thread_id([WARPS * 32])
        wid: T.int32 = tid // 32
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        parts = pool.alloc((WARPS, 32, 4), "float32", align=16)
        pool.commit()
        t0: T.int32 = bx // NB * GROUP
        n0: T.int32 = bx % NB * OUT
        # rows and tokens past the end are copies of the last: what comes of them is not stored
        low: T.int32 = T.min(n0 + lane // 4, LAST)
        high: T.int32 = T.min(n0 + lane // 4 + UP, LAST)
        token: T.int32 = T.min(t0 + lane // 4, NT - 1)
        acc = T.alloc_local((4,), "float32")
        rows = T.alloc_local((AHEAD * 8,), "uint32")
        cols = T.alloc_local((AHEAD * 4,), "uint32")
        for i in T.unroll(4):
            acc[i] = T.float32(0)
        load(WEIGHT, low, rows, 0, 8, 0, K, wid, lane)
        load(WEIGHT, high, rows, 4, 8, 0, K, wid, lane)
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        for turn in T.serial(TURNS):
            load(X, T.Cast("int64", token), cols, 0, 4, turn, K, wid, lane)
            multiply(acc, rows, cols, MMA)
            if turn + 1 < TURNS:
                load(WEIGHT, low, rows, 0, 8, turn + 1, K, wid, lane)
                load(WEIGHT, high, rows, 4, 8, turn + 1, K, wid, lane)
        share(acc, parts, wid, lane)
        # thread (lane', j) has what that lane's sum j is: row lane' / 4, + 8 (or its up) for j > 1
        if tid < (64 if GATED else 128):
            from_: T.int32 = tid // (2 if GATED else 4)
            j: T.int32 = tid % (2 if GATED else 4)
            value: T.float32 = T.float32(0)
            other: T.float32 = T.float32(0)
            for w in T.unroll(WARPS):
                value = value + parts[w, from_, j]
                if GATED:
                    other = other + parts[w, from_, j + 2]
            n: T.int32 = n0 + from_ // 4 + j // 2 * 8
            t: T.int32 = t0 + from_ % 4 * 2 + j % 2
            if n < N and t < NT:
                if BIAS:
                    value = value + BIASV[n]
                    if GATED:
                        other = other + BIASV[n + N]
                if ACTIVE:
                    if GATED:
                        value = T.cuda.func_call(ACT, value, other, source_code=ACT_SRC, return_type="float32")
                    else:
                        value = T.cuda.func_call(ACT, value, value, source_code=ACT_SRC, return_type="float32")
                Y[T.Cast("int64", t), n] = T.Cast(ODT, value)
    # fmt: on
    args = (
        Buf("x", (PerToken(), K), DT, True),
        Buf("weight", (LAST + 1, K), DT),
        Buf("bias", (LAST + 1,), "float32"),
        Buf("h" if ACTIVE else "y", (PerToken(), N), ODT),
    )
    return Kernel(symbol, args, kernel)
