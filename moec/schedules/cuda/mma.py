"""Matmuls by mma.sync and cp.async, for every GPU since Ampere: experts and dense weights.

Tokens are the M side, rows of the weight the N side of mma.m16n8k16. A block of warps owns a
tile of both and walks K in steps of 64 through a ring of shared-memory stages, 16 bytes a copy,
swizzled so that ldmatrix meets no bank conflict. A gated tile holds gate and up rows of the
same outputs, so that the activation is applied to registers. On Hopper this is how the dense
matmuls of a block run; the experts have kernels of their own there.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...errors import TargetError
from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from . import sort
from .activation import device_function
from .intrinsics import fresh

DEPTH = 64  # of K a stage: 128 bytes a row, the eight 16-byte pieces that the swizzle permutes
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
CP_ASYNC = "cp.async.cg.shared.global.L2::128B"


@dataclass(frozen=True)
class MmaConfig:
    """A tile of `rows` tokens and `outs` rows of the weight; warps down and across; ring stages."""

    rows: int
    outs: int = 128
    down: int = 1
    across: int = 4
    stages: int = 4

    def __post_init__(self) -> None:
        if self.rows % (16 * self.down) or self.outs % (32 * self.across):
            raise TargetError("mma: a warp has multiples of 16 tokens and of 32 weight rows")
        if self.shared_bytes() > 99 << 10:
            raise TargetError("mma: the ring does not fit the 99 KB of an sm_89")

    def shared_bytes(self) -> int:
        """Dynamic shared memory of the kernel."""
        return self.stages * (self.rows + self.outs) * DEPTH * 2


SMALL, LARGE = MmaConfig(16), MmaConfig(64, down=2)


@dataclass(frozen=True)
class Mma:
    """What is multiplied: `experts` 0 is one dense weight, otherwise tiles of sorted rows.

    `gather`: x is [T, inner], read through row_order; else x has a row for each result row.
    `scatter`: result rows go to their (token, k) place. `act`: gate and up are combined.
    inner is a multiple of 8, outer of 2.
    """

    experts: int
    top_k: int
    inner: int
    outer: int
    dtype: str
    out: str
    bias: bool = False
    gated: bool = False
    act: ActivationSpec | None = None
    gather: bool = False
    scatter: bool = False


def matmul(symbol: str, spec: Mma, config: MmaConfig, sms: int) -> Kernel:
    """x, row_order, tiles, tile_count, weight, bias -> result [rows, outer].

    Dense: x [T, inner], weight [(2 x) outer, inner]; the operands between them, and a bias that
    is not there, are unread: any buffer stands in their place.
    """
    E, TOPK, K, N = spec.experts, spec.top_k, spec.inner, spec.outer
    DENSE, GATHER, SCATTER = E == 0, spec.gather, spec.scatter
    GATED, BIAS, ACTIVE = spec.gated, spec.bias, spec.act is not None
    DT, ODT, WIDE = spec.dtype, spec.out, spec.out == "float32"
    SHORT = "bf16" if DT == "bfloat16" else "f16"
    HALVES = 2 if GATED else 1
    BM, BN, ST = config.rows, config.outs, config.stages
    WM, WN = config.down, config.across
    THREADS = WM * WN * 32
    NOUT = BN // HALVES  # outputs of a tile
    NB, WROWS, KB = -(-N // NOUT), N * HALVES, -(-K // DEPTH)
    MT, NT8 = BM // WM // 16, BN // WN // 8  # fragments of a warp; gate ones first, then up
    WOUT = NOUT // WN  # outputs of a warp
    AT, BT = -(-BM * 8 // THREADS), BN * 8 // THREADS  # copies of a thread a stage
    PER = 1 if DENSE or GATHER else TOPK
    ACT, ACT_SRC = device_function(spec.act, GATED, WIDE) if spec.act else ("", "")
    MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.{SHORT}.{SHORT}.f32"
    CVT = f"cvt.rn.{SHORT}x2.f32"

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(DT), order_p: T.handle("int32"), tiles_p: T.handle("int32"), count_p: T.handle("int32"), w_p: T.handle(DT), bias_p: T.handle("float32"), out_p: T.handle(ODT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        S: T.let[T.int32] = NT * TOPK
        X = T.decl_buffer((tokens * PER, T.int64(K)), DT, data=x_p)
        ORDER = T.decl_buffer((S,), "int32", data=order_p)
        TILES = T.decl_buffer((S * 4,), "int32", data=tiles_p)
        COUNT = T.decl_buffer((4,), "int32", data=count_p)
        WEIGHT = T.decl_buffer((T.int64(max(E, 1) * WROWS), T.int64(K)), DT, data=w_p)
        BIASV = T.decl_buffer((max(E, 1) * WROWS,), "float32", data=bias_p)
        OUT = T.decl_buffer((tokens * (1 if DENSE else TOPK), T.int64(N)), ODT, data=out_p)
        T.device_entry()
        bx = T.cta_id([(NT + BM - 1) // BM * NB if DENSE else sms])
        tid = T.thread_id([THREADS])
        wid: T.int32 = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), tid // 32, 0, 32)
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        As = pool.alloc((ST, BM, DEPTH), DT, align=1024)
        Bs = pool.alloc((ST, BN, DEPTH), DT, align=1024)
        pool.commit()
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        wm: T.int32 = wid // WN * (BM // WM)
        wn: T.int32 = wid % WN * WOUT
        tile: T.int32 = bx
        step: T.int32 = sms
        total: T.int32
        if DENSE:
            step = (NT + BM - 1) // BM * NB
            total = step
        else:
            total = fresh(COUNT, 0) * NB
        acc = T.alloc_local((MT * NT8 * 4,), "float32")
        a = T.alloc_local((MT * 4,), "uint32")
        b = T.alloc_local((4,), "uint32")
        v = T.alloc_local((2,), "float32")
        w = T.alloc_local((2,), "float32")
        word = T.alloc_local((1,), "uint32")
        xrow = T.alloc_local((AT,), "int64")
        wrow = T.alloc_local((BT,), "int64")
        e: T.int32 = 0
        row0: T.int32
        rows: T.int32
        n: T.int32

        # one K step of a tile's rows, or of its weight rows; what lies behind K is zero
        @T.inline
        def copies(source, at, to, count, turns, k):
            for i in T.unroll(turns):
                q = T.meta_var(i * THREADS + tid)
                spot = T.meta_var((q % 8 ^ (q // 8) % 8) * 8)
                if count % THREADS == 0 or q < count:
                    if K % DEPTH == 0:
                        T.ptx[CP_ASYNC](to.ptr_to([k % ST, q // 8, spot]), source.ptr_to([at[i], T.Cast("int64", k * DEPTH + q % 8 * 8)]), 16)
                    else:
                        col: T.int32 = k * DEPTH + q % 8 * 8
                        size: T.int32 = T.if_then_else(col < K, 16, 0)
                        T.ptx[CP_ASYNC](to.ptr_to([k % ST, q // 8, spot]), source.ptr_to([at[i], T.Cast("int64", T.if_then_else(col < K, col, 0))]), 16, T.Cast("uint32", size))

        @T.inline
        def load(k):
            copies(X, xrow, As, BM * 8, AT, k)
            copies(WEIGHT, wrow, Bs, BN * 8, BT, k)

        while tile < total:
            m: T.int32 = tile // NB
            n = tile - m * NB
            if DENSE:
                row0 = m * BM
                rows = T.min(NT - row0, BM)
            else:
                e = fresh(TILES, m * 4)
                row0 = fresh(TILES, m * 4 + 1)
                rows = fresh(TILES, m * 4 + 2)
            # rows past the end are copies of the last one: what comes of them is not stored
            for i in T.unroll(AT):
                r: T.int32 = row0 + T.min((i * THREADS + tid) // 8, rows - 1)
                if GATHER:
                    r = fresh(ORDER, r) // TOPK
                xrow[i] = T.Cast("int64", r)
            for i in T.unroll(BT):
                j: T.int32 = (i * THREADS + tid) // 8
                out_row: T.int32 = T.min(n * NOUT + j % NOUT, N - 1) + j // NOUT * N
                wrow[i] = T.Cast("int64", e) * WROWS + T.Cast("int64", out_row)
            for i in T.unroll(MT * NT8 * 4):
                acc[i] = T.float32(0)
            for k in T.unroll(ST - 1):
                if k < KB:
                    load(k)
                T.ptx.cp.async_.commit_group()
            for k in T.serial(KB):
                T.ptx.cp.async_.wait_group(ST - 2)
                T.cuda.cta_sync()
                if k + ST - 1 < KB:
                    load(k + ST - 1)
                T.ptx.cp.async_.commit_group()
                for s in T.unroll(DEPTH // 16):
                    for i in T.unroll(MT):
                        T.ptx[LDMATRIX](a[i * 4], a[i * 4 + 1], a[i * 4 + 2], a[i * 4 + 3], As.ptr_to([k % ST, wm + i * 16 + lane % 16, ((s * 2 + lane // 16) ^ (lane % 8)) * 8]))
                    for j in T.unroll(NT8 // 2):
                        # pairs of eight weight rows: those of the gate, then those of up
                        half = T.meta_var(j * 16 // WOUT)
                        T.ptx[LDMATRIX](b[0], b[1], b[2], b[3], Bs.ptr_to([k % ST, half * NOUT + wn + j * 16 - half * WOUT + lane // 16 * 8 + lane % 8, ((s * 2 + lane // 8 % 2) ^ (lane % 8)) * 8]))
                        for i in T.unroll(MT):
                            for p in T.unroll(2):
                                z = T.meta_var((i * NT8 + j * 2 + p) * 4)
                                T.ptx[MMA](acc[z], acc[z + 1], acc[z + 2], acc[z + 3], a[i * 4], a[i * 4 + 1], a[i * 4 + 2], a[i * 4 + 3], b[p * 2], b[p * 2 + 1], acc[z], acc[z + 1], acc[z + 2], acc[z + 3])
            T.ptx.cp.async_.wait_group(0)
            for i in T.unroll(MT):
                for h in T.unroll(2):
                    row: T.int32 = wm + i * 16 + h * 8 + lane // 4
                    if row < rows:
                        to: T.int64 = T.Cast("int64", row0 + row)
                        if SCATTER:
                            to = T.Cast("int64", fresh(ORDER, row0 + row))
                        for j in T.unroll(NT8 // HALVES):
                            col: T.int32 = n * NOUT + wn + j * 8 + lane % 4 * 2
                            if col < N:
                                for p in T.unroll(2):
                                    v[p] = acc[(i * NT8 + j) * 4 + h * 2 + p]
                                    w[p] = acc[(i * NT8 + NT8 // HALVES * (HALVES - 1) + j) * 4 + h * 2 + p]
                                    if BIAS:
                                        v[p] = v[p] + BIASV[e * WROWS + col + p]
                                        if GATED:
                                            w[p] = w[p] + BIASV[e * WROWS + N + col + p]
                                    if ACTIVE:
                                        if GATED:
                                            v[p] = T.cuda.func_call(ACT, v[p], w[p], source_code=ACT_SRC, return_type="float32")
                                        else:
                                            v[p] = T.cuda.func_call(ACT, v[p], v[p], source_code=ACT_SRC, return_type="float32")
                                if WIDE:
                                    T.ptx["st.global.v2.f32"](OUT.ptr_to([to, T.Cast("int64", col)]), v[0], v[1])
                                else:
                                    T.ptx[CVT](word[0], v[1], v[0])
                                    T.ptx["st.global.u32"](OUT.ptr_to([to, T.Cast("int64", col)]), word[0])
            T.cuda.cta_sync()
            tile += step
    # fmt: on
    _, order, _, tiles, count = sort.buffers(max(E, 1), TOPK)
    args = (
        Buf("x", (PerToken(PER), K), DT, True),
        order,
        tiles,
        count,
        Buf("weight", (max(E, 1), WROWS, K) if E else (WROWS, K), DT),
        Buf("bias", (max(E, 1), WROWS), "float32"),
        Buf("rows" if SCATTER else "h" if ACTIVE else "y",
            (PerToken(1 if DENSE else TOPK), N), ODT),
    )  # fmt: skip
    return Kernel(symbol, args, kernel)
