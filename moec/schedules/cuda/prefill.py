"""Grouped matmuls for many rows an expert: persistent, warp-specialised wgmma.

Tokens are the M side (tiles of 128 rows of one expert), weights the N side. Two consumer
warpgroups of 64 rows multiply from a ring of shared-memory stages; a producer fills it with
the weights by TMA and the tokens by gathering cp.async (first matmul) or TMA (second). The
activation is applied in the epilogue of the first; the second scatters its rows to their
(token, k) place, where a sum in fixed order finds them. A warpgroup without valid rows skips
its work, so tails cost 64 rows.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass

from tvm.script import tirx as T

from ...errors import TargetError
from ...spec import ActivationSpec
from ..buffers import Kernel
from .activation import device_function
from .intrinsics import BARRIER_WAIT, fresh, opaque
from .shapes import Matmul

TMA2 = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA3 = "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
TMA4 = "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
BM, BK, THREADS = 128, 64, 384


@dataclass(frozen=True)
class PrefillConfig:
    """`columns` weight rows a tile (64 to 256, by 32), ring `stages`, `group` M tiles a walk.

    `lag`: gathered stages that are under way before the first of them is handed over.
    """

    columns: int = 256
    stages: int = 4
    group: int = 8
    lag: int = 2

    def __post_init__(self) -> None:
        # The consumers hold a stage until they have the next one, which is handed over only
        # when `lag` more were asked for: with fewer stages both sides wait for ever.
        if self.stages < self.lag + 2:
            raise TargetError(f"prefill: a lag of {self.lag} needs {self.lag + 2} stages or more")

    def shared_bytes(self) -> int:
        """Dynamic shared memory of the kernel."""
        return self.stages * (BM + self.columns) * BK * 2 + 8 * 2048 + 16 * self.stages


def gate_up(
    symbol: str, shape: Matmul, act: ActivationSpec, config: PrefillConfig, sms: int
) -> Kernel:
    """x [T, H], row_order, tiles, tile_count, weight [E, 2I, H] (, bias) -> h [S, I] sorted."""
    return _build(symbol, shape, act, config, sms)


def down(symbol: str, shape: Matmul, config: PrefillConfig, sms: int) -> Kernel:
    """h [S, I] sorted, row_order, tiles, tile_count, weight [E, H, I] (, bias) -> rows [S, H].

    rows[t*K + k] is the unweighted row of expert topk_ids[t, k]; rows of ids outside [0, E)
    are not written.
    """
    return _build(symbol, shape, None, config, sms)


def _build(symbol: str, shape: Matmul, act, config: PrefillConfig, sms: int) -> Kernel:
    FIRST = act is not None
    E, TOPK, K, COLS = shape.experts, shape.top_k, shape.inner, shape.outer
    GATED, BIAS, DT = shape.gated and FIRST, shape.bias, shape.dtype
    SHORT = "bf16" if DT == "bfloat16" else "f16"
    BN, ST, GM, LAG = config.columns, config.stages, config.group, config.lag
    HALVES = 2 if GATED else 1
    NOUT = BN // HALVES  # output columns of a tile
    NB = -(-COLS // NOUT)
    KB = -(-K // BK)
    LOOK = min(3, KB - 1)  # K block at which the next tile's rows are looked up
    NACC = BN // 2
    CHUNKS = -(-NOUT // 64)
    ABYTES, BBYTES = BM * BK * 2, BN * BK * 2
    TX = BBYTES if FIRST else ABYTES + BBYTES
    FULL = 5 if FIRST else 1
    UP = NACC // 2  # accumulator of `up` behind the one of its gate
    mma = f"wgmma.mma_async.sync.aligned.m64n{BN}k16.f32.{SHORT}.{SHORT}"
    cvt = f"cvt.rn.{SHORT}x2.f32"
    ACT, ACT_SRC = device_function(act, GATED) if FIRST else ("", "")

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(DT), order_p: T.handle("int32"), tiles_p: T.handle("int32"), count_p: T.handle("int32"), w_p: T.handle(DT), bias_p: T.handle("float32"), out_p: T.handle(DT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        S: T.let[T.int32] = NT * TOPK
        X = T.decl_buffer((NT if FIRST else S, K), DT, data=x_p)
        ORDER = T.decl_buffer((S,), "int32", data=order_p)
        TILES = T.decl_buffer((S * 4,), "int32", data=tiles_p)
        COUNT = T.decl_buffer((4,), "int32", data=count_p)
        BIASV = T.decl_buffer((E * HALVES * COLS,), "float32", data=bias_p)
        OUT = T.decl_buffer((S, COLS), DT, data=out_p)
        A_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if not FIRST:
            T.call_packed("runtime.cuTensorMapEncodeTiled", A_map, DT, 2, x_p, K, S, K * 2, BK, BM, 1, 1, 0, 3, 3, 0)
        B_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if GATED:
            T.call_packed("runtime.cuTensorMapEncodeTiled", B_map, DT, 4, w_p, K, COLS, 2, E, K * 2, COLS * K * 2, 2 * COLS * K * 2, BK, NOUT, 2, 1, 1, 1, 1, 1, 0, 3, 3, 0)
        else:
            T.call_packed("runtime.cuTensorMapEncodeTiled", B_map, DT, 3, w_p, K, COLS, E, K * 2, COLS * K * 2, BK, NOUT, 1, 1, 1, 1, 0, 3, 3, 0)

        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        bx = T.cta_id([sms])
        tid = T.thread_id([THREADS])
        wid: T.int32 = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), tid // 32, 0, 32)
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        As = pool.alloc((ST, BM, BK), DT, align=1024)
        Bs = pool.alloc((ST, BN, BK), DT, align=1024)
        Ds = pool.alloc((8, 16, 64), DT, align=1024)
        full = pool.alloc((ST,), "uint64", align=8)
        empty = pool.alloc((ST,), "uint64", align=8)
        pool.commit()

        if tid == 256:
            for i in T.unroll(ST):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(FULL))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(8))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        T.ptx.griddepcontrol.launch_dependents()
        T.ptx.griddepcontrol.wait()

        stage: T.int32 = 0
        phase: T.int32 = 0
        tile: T.int32 = bx
        mb: T.int32 = fresh(COUNT, 0)
        total: T.int32 = mb * NB
        e: T.int32
        row0: T.int32
        rows: T.int32
        n: T.int32
        next_e: T.int32
        next_row0: T.int32
        next_rows: T.int32
        next_n: T.int32

        @T.inline
        def wait(bar, parity):
            T.cuda.func_call("moec_barrier_wait", bar, parity, source_code=BARRIER_WAIT)

        # tile -> (M tile, N block): M fastest inside groups of GM tiles. The next tile is looked
        # up while the current one is computed.
        @T.inline
        def look(which):
            if which < total:
                g: T.int32 = which // (GM * NB)
                gm: T.int32 = T.min(mb - g * GM, GM)
                r: T.int32 = which - g * (GM * NB)
                m: T.int32 = g * GM + r % gm
                next_n = r // gm
                next_e = fresh(TILES, m * 4)
                next_row0 = fresh(TILES, m * 4 + 1)
                next_rows = fresh(TILES, m * 4 + 2)

        @T.inline
        def locate():
            n = next_n
            e = next_e
            row0 = next_row0
            rows = next_rows

        @T.inline
        def advance():
            stage += 1
            if stage == ST:
                stage = 0
                phase = phase ^ 1

        if wid >= 8:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](72 if FIRST else 40)
            if FIRST:
                pt = T.meta_var(tid - 256)
                src = T.alloc_local((8,), "int64")
                next_src = T.alloc_local((8,), "int32")
                pst: T.int32 = 0
                behind: T.int32 = 0

                @T.inline
                def sources():
                    for p in T.unroll(8):
                        next_src[p] = fresh(ORDER, next_row0 + T.min(p * 16 + pt // 8, next_rows - 1))

                look(tile)
                if tile < total:
                    sources()
                while tile < total:
                    locate()
                    for p in T.unroll(8):
                        src[p] = T.Cast("int64", next_src[p] // TOPK) * K + (pt % 8) * 8
                    look(tile + sms)
                    for k in T.serial(KB):
                        if k == LOOK and tile + sms < total:
                            sources()
                        wait(empty.ptr_to([stage]), phase ^ 1)
                        if pt == 0:
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(TX))
                            if GATED:
                                T.ptx[TMA4](Bs.ptr_to([stage, 0, 0]), T.address_of(B_map), k * BK, n * NOUT, 0, e, full.ptr_to([stage]))
                            else:
                                T.ptx[TMA3](Bs.ptr_to([stage, 0, 0]), T.address_of(B_map), k * BK, n * NOUT, e, full.ptr_to([stage]))
                        for p in T.unroll(8):
                            # rows of a missing half are not loaded: what they hold reaches no valid row
                            if p < 4 or rows > 64:
                                if K % BK == 0:
                                    T.ptx["cp.async.cg.shared.global.L2::128B"](As.ptr_to([stage, p * 16 + pt // 8, ((pt % 8) ^ ((pt // 8) % 8)) * 8]), X.ptr_to([0, src[p] + k * BK]), 16)
                                else:
                                    inside: T.int32 = T.if_then_else(k * BK + (pt % 8) * 8 < K, 16, 0)
                                    T.ptx["cp.async.cg.shared.global.L2::128B"](As.ptr_to([stage, p * 16 + pt // 8, ((pt % 8) ^ ((pt // 8) % 8)) * 8]), X.ptr_to([0, src[p] + T.if_then_else(inside == 16, k * BK, 0)]), 16, T.Cast("uint32", inside))
                        T.ptx.cp.async_.commit_group()
                        if behind == LAG:
                            T.ptx.cp.async_.wait_group(LAG)
                            T.ptx.fence.proxy.async_.shared__cta()
                            T.cuda.warp_sync()
                            if lane == 0:
                                T.ptx.mbarrier.arrive.shared.b64(full.ptr_to([pst]), T.uint32(1))
                            pst += 1
                            if pst == ST:
                                pst = 0
                        else:
                            behind += 1
                        advance()
                    tile += sms
                T.ptx.cp.async_.wait_group(0)
                T.ptx.fence.proxy.async_.shared__cta()
                T.cuda.warp_sync()
                while behind > 0:
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(full.ptr_to([pst]), T.uint32(1))
                    pst += 1
                    if pst == ST:
                        pst = 0
                    behind -= 1
            else:
                if tid == 256:
                    look(tile)
                    while tile < total:
                        locate()
                        look(tile + sms)
                        for k in T.serial(KB):
                            wait(empty.ptr_to([stage]), phase ^ 1)
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(TX))
                            T.ptx[TMA2](As.ptr_to([stage, 0, 0]), T.address_of(A_map), k * BK, row0, full.ptr_to([stage]))
                            T.ptx[TMA3](Bs.ptr_to([stage, 0, 0]), T.address_of(B_map), k * BK, n * NOUT, e, full.ptr_to([stage]))
                            advance()
                        tile += sms
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](216 if FIRST else 232)
            acc = T.alloc_local((NACC,), "float32")
            hw = T.alloc_local((4,), "uint32")
            vv = T.alloc_local((8,), "float32")
            dst = T.alloc_local((4,), "int32")
            dA: T.uint64
            dB: T.uint64
            wgi: T.int32 = wid // 4
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(dA), As.ptr_to([0, wgi * 64, 0]), 1, 64, 3)
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(dB), Bs.ptr_to([0, 0, 0]), 1, 64, 3)
            prev: T.int32 = 0
            steps: T.int32 = opaque(KB)

            @T.inline
            def release(s):
                if lane == 0:
                    T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([s]), T.uint32(1))

            look(tile)
            while tile < total:
                locate()
                if wgi * 64 >= rows:
                    look(tile + sms)
                    for k in T.serial(KB):
                        wait(full.ptr_to([stage]), phase)
                        release(stage)
                        advance()
                else:
                    for k in T.serial(steps):
                        wait(full.ptr_to([stage]), phase)
                        T.ptx.wgmma.fence.sync.aligned()
                        for kk in T.unroll(BK // 16):
                            T.ptx[mma](*[acc[i] for i in range(NACC)],
                                dA + T.Cast("uint64", stage * (ABYTES // 16) + kk * 2),
                                dB + T.Cast("uint64", stage * (BBYTES // 16) + kk * 2),
                                (k + kk) != 0, 1, 1, 0, 0)
                        T.ptx.wgmma.commit_group.sync.aligned()
                        if k > 0:
                            T.ptx.wgmma.wait_group.sync.aligned(1)
                            release(prev)
                        prev = stage
                        advance()
                        if k == 0:
                            look(tile + sms)
                            # where the rows that this lane stores belong: lane//8, +4, +8, +12 of the warp's 16
                            for p in T.unroll(4):
                                r4: T.int32 = wid * 16 + p * 4 + lane // 8
                                dst[p] = -1
                                if r4 < rows:
                                    if FIRST:
                                        dst[p] = row0 + r4
                                    else:
                                        dst[p] = fresh(ORDER, row0 + r4)
                    T.ptx.wgmma.wait_group.sync.aligned(0)
                    release(prev)
                    for c in T.unroll(CHUNKS):
                        for j in T.unroll(4):
                            if c * 64 + j * 16 < NOUT:
                                a = T.meta_var(c * 32 + j * 8)
                                for i in T.unroll(8):
                                    # i: 0,1 row g; 2,3 row g+8; 4..7 the same of the next 8 columns
                                    col: T.int32 = n * NOUT + c * 64 + j * 16 + (i // 4) * 8 + (lane % 4) * 2 + i % 2
                                    if FIRST:
                                        if BIAS:
                                            b0: T.float32 = T.float32(0)
                                            b1: T.float32 = T.float32(0)
                                            if col < COLS:
                                                b0 = BIASV[e * (HALVES * COLS) + col]
                                                if GATED:
                                                    b1 = BIASV[e * (HALVES * COLS) + COLS + col]
                                            if GATED:
                                                vv[i] = T.cuda.func_call(ACT, acc[a + i] + b0, acc[a + i + UP] + b1, source_code=ACT_SRC, return_type="float32")
                                            else:
                                                vv[i] = T.cuda.func_call(ACT, acc[a + i] + b0, b1, source_code=ACT_SRC, return_type="float32")
                                        else:
                                            if GATED:
                                                vv[i] = T.cuda.func_call(ACT, acc[a + i], acc[a + i + UP], source_code=ACT_SRC, return_type="float32")
                                            else:
                                                vv[i] = T.cuda.func_call(ACT, acc[a + i], acc[a + i], source_code=ACT_SRC, return_type="float32")
                                    else:
                                        vv[i] = acc[a + i]
                                        if BIAS:
                                            if col < COLS:
                                                vv[i] = vv[i] + BIASV[e * COLS + col]
                                for q in T.unroll(4):
                                    T.ptx[cvt](hw[q], vv[q * 2 + 1], vv[q * 2])
                                T.ptx["stmatrix.sync.aligned.m8n8.x4.shared.b16"](
                                    Ds.ptr_to([wid, lane % 16, ((j * 2 + lane // 16) ^ (lane % 8)) * 8]),
                                    hw[0], hw[1], hw[2], hw[3])
                        T.cuda.warp_sync()
                        ch = T.meta_var(lane % 8)
                        for p in T.unroll(4):
                            if dst[p] >= 0 and ch * 8 < NOUT - c * 64 and n * NOUT + c * 64 + ch * 8 < COLS:
                                T.ptx["ld.shared.v4.u32"](hw[0], hw[1], hw[2], hw[3], Ds.ptr_to([wid, p * 4 + lane // 8, (ch ^ ((p * 4 + lane // 8) % 8)) * 8]))
                                T.ptx["st.global.v4.u32"](OUT.ptr_to([dst[p], n * NOUT + c * 64 + ch * 8]), hw[0], hw[1], hw[2], hw[3])
                        T.cuda.warp_sync()
                tile += sms
    # fmt: on
    return Kernel(symbol, shape.buffers("rows" if not FIRST else "h", FIRST), kernel)
