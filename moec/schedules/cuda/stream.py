"""Grouped matmuls on wgmma: every weight byte is read once where an expert has few rows.

The sides are swapped: 128 or 256 weight rows are the M side of wgmma (64 or 128 a warpgroup) and
the tokens of an expert its N side, 8 to 256 of them, so that padding costs no bandwidth. For a
gated first matmul the tile holds a few gate rows, their up rows, the next gate rows...: one TMA
box of five dimensions lays the canonical weight out like that, and both values of a pair end up
in one thread. Every warp transposes its own results through shared memory.

Compact weights are expanded (expand.py) into the registers that wgmma takes its M side from, for
one group of wgmma while another runs. All widths share that loop: a loop for each, as plain weights
have them, lacks registers.

A block runs on each multiprocessor and claims tiles from a counter, in their order. Shared out
beforehand, tiles that want the same weights drift apart, seemingly until each of them reads the
weights from memory again: DeepSeek-V3 took 1.65 times as long at T = 16384.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from dataclasses import dataclass, replace

from tvm.script import tirx as T

from ...errors import TargetError
from ...spec import ActivationSpec
from ...target import Form
from ..buffers import Kernel
from . import expand
from .activation import device_function
from .boxes import (
    BK,
    CACHE_HINT,
    EVICT_FIRST,
    EVICT_NORMAL,
    NO_MAP,
    PACKED,
    SHORT_ROWS,
    TMA,
    header_box,
    tile_box,
    unit_box,
)
from .compact import HALF, STRIP, UNIT, headers_kept
from .expand import HELD, RAW, SCRATCH, TABLE, Expansion, Rare
from .intrinsics import CLAIM, COPY16, STORE16, fresh, opaque, wait, wait_unless
from .shapes import Matmul
from .sort import GROUP

TMA2 = TMA.format(2)
QUEUE = 4  # tiles that were claimed and are not all heard of yet, at most
WARPS, GATHERING = 8, 96  # that multiply; threads that gather tokens
LOADER = WARPS + GATHERING // 32  # the warp that loads by TMA
THREADS = 32 * (LOADER + 1)
SHARED_LIMIT = 227 * 1024


@dataclass(frozen=True)
class StreamConfig:
    """Tiles of 128 * `blocks` weight rows by up to `rows` tokens.

    `widths`: the N of wgmma for which there is code, ascending up to `rows` (empty: only
    `rows`); a tile takes the narrowest that holds its tokens. `depth` K blocks of 64 a stage (1
    where they do not divide K), ring `stages` (0: all that fit).
    """

    rows: int = 16
    widths: tuple[int, ...] = ()
    blocks: int = 1
    depth: int = 1
    stages: int = 0

    def __post_init__(self) -> None:
        widths = self.widths or (self.rows,)
        if widths[-1] != self.rows or len(widths) > 8 or any(w % 8 for w in widths):
            raise TargetError(f"stream: widths {widths} do not lead up to {self.rows} by eights")
        if self.blocks * self.rows > 320:
            raise TargetError("stream: the accumulators of a tile do not fit the registers")
        if self.ring() < 3:
            raise TargetError("stream: three stages do not fit the shared memory")

    @property
    def tile(self) -> int:
        """Weight rows of a tile."""
        return 128 * self.blocks

    @property
    def box(self) -> int:
        """Tokens of a TMA box."""
        return next(p for p in (64, 32, 16, 8) if self.rows % p == 0)

    @property
    def part(self) -> int:
        """Tokens whose results are transposed at a time."""
        return 16 if self.rows % 16 == 0 else 8

    def ring(self) -> int:
        """Stages of the ring."""
        stage = self.depth * (self.tile + self.rows) * BK * 2 + 16
        return self.stages or min(12, self._room // stage)

    def compact_ring(self, steps: int, header: int) -> int:
        """Stages of the ring where weights are compact and a tile has so many steps."""
        strips = self.tile // STRIP
        stage = self.depth * (strips * UNIT + self.rows * BK * 2) + 16

        def needed(stages: int) -> int:
            return stages * stage + headers_kept(stages, steps) * strips * header

        room = self._room - 1024 - WARPS * 4 * SCRATCH
        return next(n for n in range(12, 2, -1) if needed(n) <= room)

    @property
    def _room(self) -> int:
        return SHARED_LIMIT - self.part * self.tile * 2 - 256 - 32 * QUEUE


def gate_up(
    symbol: str, shape: Matmul, act: ActivationSpec, config: StreamConfig, sms: int
) -> Kernel:
    """x [T, H], row_order, tiles, tile_count, weight [E, 2I, H] (, bias) -> h [S, I] sorted."""
    return _build(symbol, shape, act, config, sms)


def down(symbol: str, shape: Matmul, config: StreamConfig, sms: int) -> Kernel:
    """h [S, I] sorted, row_order, tiles, tile_count, weight [E, H, I] (, bias) -> rows [S, H].

    rows[t*K + k] is the unweighted row of expert topk_ids[t, k]; rows of ids outside [0, E)
    are not written.
    """
    return _build(symbol, shape, None, config, sms)


def _build(symbol: str, shape: Matmul, act, config: StreamConfig, sms: int) -> Kernel:
    FIRST = act is not None
    E, TOPK, K, COLS = shape.experts, shape.top_k, shape.inner, shape.outer
    PAIR, BIAS, DT = shape.gated and FIRST, shape.bias, shape.dtype
    SHORT = "bf16" if DT == "bfloat16" else "f16"
    if K % BK:  # boxes of several K blocks need whole ones
        config = replace(config, depth=1, stages=0)
    COMPACT, LAYOUT = shape.form is Form.COMPACT, shape.layout
    EXPERT, STRIPPED = LAYOUT.expert_bytes // 4, LAYOUT.strips * LAYOUT.strip_bytes // 4
    N, D, MB = config.rows, config.depth, config.blocks
    KB = -(-K // (BK * D))
    ST = config.compact_ring(KB, LAYOUT.header) if COMPACT else config.ring()
    BM = config.tile
    NOUT = BM // 2 if PAIR else BM  # outputs of a tile
    WOUT = NOUT // WARPS  # of a warp
    NB = -(-COLS // NOUT)
    EARLY = min(ST, KB)  # stages whose weights are loaded before the wait
    LOOK = min(2, KB - 1)  # K block at which the next tile is looked up
    CLAIMS = 1 if FIRST else 2  # the counter in tile_count
    HEARERS = LOADER if FIRST else WARPS  # warps that are told of a tile
    WIDTHS = config.widths or (N,)
    NV = len(WIDTHS)
    NACC = MB * N // 2
    STRIPS = BM // STRIP
    ABYTES, BBYTES = D * (STRIPS * UNIT if COMPACT else BM * BK * 2), D * N * BK * 2
    BOX = config.box
    BOXES = N // BOX
    PBYTES = D * BOX * BK * 2
    FULL = GATHERING + 1 if FIRST else 1
    TURNS = -(-N // 24)  # a gathering warp takes 8 tokens of every 24
    WROWS = COLS * (2 if PAIR else 1)
    # The 8-row groups of a warp, its M = 64 blocks taken together, are neighbours: block b has
    # every MB-th group. Where I does not allow that a warp has a piece of every 64 rows.
    JOIN = MB if not PAIR or COLS % (8 * MB) == 0 else 1
    SBO, BLOCK = 64 * JOIN, 64 if JOIN > 1 else 64 * BK * 2 // 16  # in 16 bytes
    PART, PIECES = config.part, WOUT // 8  # tokens, and 16-byte pieces of their results
    FRAGS = 1 if PAIR else 2  # 8x8 results of an M = 64 block and 8 tokens
    MATRICES = PART // 8 * PIECES  # 1, 2 or a multiple of 4
    LANES = 8 // PIECES  # rows of pieces in 128 bytes: the swizzle
    STORES = -(-PART * PIECES // 32)  # of a lane, of a part
    mma = "wgmma.mma_async.sync.aligned.m64n{}k16.f32." + f"{SHORT}.{SHORT}"
    cvt = f"cvt.rn.{SHORT}x2.f32"
    st = "stmatrix.sync.aligned.m8n8.x{}.trans.shared.b16"
    BOXED = unit_box(LAYOUT, STRIPS, D) if COMPACT else tile_box(shape, PAIR, BM, JOIN, D)
    HEADERS = header_box(LAYOUT, STRIPS)
    LOAD_HEADS = TMA.format(HEADERS.rank)
    HEADS = headers_kept(ST, KB) if COMPACT else 0  # tiles
    HBYTES = STRIPS * LAYOUT.header
    # Registers of a thread that loads, and of one that multiplies: in all what a block starts with,
    # 384 times 168. For more its warps would wait without end.
    FEW, MANY = (56, 224) if COMPACT else (88, 208)
    MAPPED, WT = (PACKED, "int32") if COMPACT else (DT, DT)
    WEIGHT_TMA = TMA.format(BOXED.rank) + CACHE_HINT
    # Of weights that one tile needs. Short rows are fetched with their neighbours, which the next
    # K step loads: those must stay.
    ALONE = EVICT_FIRST if D > 1 else EVICT_NORMAL
    ACT, ACT_SRC = device_function(act, PAIR) if FIRST else ("", "")

    # of a group of wgmma: the K block of its stage, the M = 64 block, the half of the unit
    def depth_of(g: int) -> int:
        return g // (2 // HALVES) // MB

    def block_of(g: int) -> int:
        return g // (2 // HALVES) % MB

    def half_of(g: int) -> int:
        return g % (2 // HALVES)

    def bytes_of(g: int, f: int) -> int:
        """From a warp's part of a stage to what a group takes of the first or second strip."""
        return (strip_of(block_of(g), f) * D + depth_of(g)) * UNIT + half_of(g) * HALF

    def strip_of(mb: int, f: int) -> int:
        """Of a warp's strips that with the first (f = 0) or last eight rows of an M = 64 block."""
        return mb * 2 + f if PAIR else f * MB + mb

    # halves of a unit that are expanded and multiplied at a time: as many as there are registers for
    HALVES = 2 if MB * N <= 288 and MB * D % 2 == 0 else 1
    EXPANSION = Expansion(LAYOUT.inline, HALVES, Rare.OWN)
    GROUPS = D * MB * (2 // HALVES)  # of wgmma, of a stage
    PICKED, PICKED_SRC = expand.multiply_picked(WIDTHS, 2 * HALVES)

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(DT), order_p: T.handle("int32"), tiles_p: T.handle("int32"), count_p: T.handle("int32"), w_p: T.handle(WT), bias_p: T.handle("float32"), out_p: T.handle(DT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        S: T.let[T.int32] = NT * TOPK
        X = T.decl_buffer((NT if FIRST else S, K), DT, data=x_p)
        ORDER = T.decl_buffer((S,), "int32", data=order_p)
        TILES = T.decl_buffer((S * 4,), "int32", data=tiles_p)
        COUNT = T.decl_buffer((4,), "int32", data=count_p)
        BIASV = T.decl_buffer((E * WROWS,), "float32", data=bias_p)
        OUT = T.decl_buffer((S, COLS), DT, data=out_p)
        B_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        if not FIRST:
            T.call_packed("runtime.cuTensorMapEncodeTiled", B_map, DT, 2, x_p, K, S, K * 2, BK, BOX, 1, 1, *SHORT_ROWS)
        A_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        assert T.call_extern("int32", "moec_tensor_map", A_map, w_p, BOXED.text(MAPPED)) == 0, NO_MAP
        if COMPACT:
            PACKED_W = T.decl_buffer((E * EXPERT,), "int32", data=w_p)
            H_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            assert T.call_extern("int32", "moec_tensor_map", H_map, w_p, HEADERS.text(MAPPED)) == 0, NO_MAP

        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        bx = T.cta_id([sms])
        tid = T.thread_id([THREADS])
        wid: T.int32 = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), tid // 32, 0, 32)
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        if COMPACT:
            units = pool.alloc((ST, STRIPS, D, UNIT), "uint8", align=1024)
            heads = pool.alloc((HEADS, STRIPS, LAYOUT.header), "uint8", align=1024)
        else:
            As = pool.alloc((ST, D, BM, BK), DT, align=1024)
        Bs = pool.alloc((ST, D, N, BK), DT, align=1024)
        if COMPACT:
            scratch = pool.alloc((WARPS, SCRATCH), "int32", align=4)
        Ds = pool.alloc((WARPS, PART, WOUT), DT, align=128)
        full = pool.alloc((ST,), "uint64", align=8)
        empty = pool.alloc((ST,), "uint64", align=8)
        claims = pool.alloc((QUEUE, 4), "int32", align=16)
        told = pool.alloc((QUEUE,), "uint64", align=8)
        heard = pool.alloc((QUEUE,), "uint64", align=8)
        pool.commit()

        if tid == LOADER * 32:
            for i in T.unroll(ST):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(FULL))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(WARPS))
            for i in T.unroll(QUEUE):
                T.ptx.mbarrier.init.shared.b64(told.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(heard.ptr_to([i]), T.uint32(HEARERS))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        # The first matmul lets the second one start after its own wait: the sort is complete
        # there, and weights may be loaded while the first still runs.
        if FIRST:
            T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()

        stage: T.int32 = 0
        phase: T.int32 = 0
        slot: T.int32 = 0
        turn: T.int32 = 0
        e: T.int32
        row0: T.int32
        rows: T.int32
        n: T.int32
        policy: T.uint64
        hslot: T.int32 = 0

        # What the thread that loads weights claimed: its tile, or no rows at the end. One lane
        # reads and says that it did, so that the place is not written before.
        @T.inline
        def hear():
            wait(told.ptr_to([slot]), turn)
            if lane == 0:
                e = claims[slot, 0]
                row0 = claims[slot, 1]
                rows = claims[slot, 2]
                n = claims[slot, 3]
                T.ptx.mbarrier.arrive.shared.b64(heard.ptr_to([slot]), T.uint32(1))
            e = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), e, 0, 32)
            row0 = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), row0, 0, 32)
            rows = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), rows, 0, 32)
            n = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), n, 0, 32)
            next_slot()

        @T.inline
        def next_slot():
            slot += 1
            if slot == QUEUE:
                slot = 0
                turn = turn ^ 1

        @T.inline
        def advance():
            stage += 1
            if stage == ST:
                stage = 0
                phase = phase ^ 1

        @T.inline
        def next_heads():
            if COMPACT:
                hslot += 1
                if hslot == HEADS:
                    hslot = 0

        @T.inline
        def weights(k):
            if COMPACT:
                if k == 0:
                    T.ptx[LOAD_HEADS](heads.ptr_to([hslot, 0, 0]), T.address_of(H_map), *HEADERS.at(0, n * STRIPS, e), full.ptr_to([stage]))
                T.ptx[WEIGHT_TMA](units.ptr_to([stage, 0, 0, 0]), T.address_of(A_map), *BOXED.at(k, n * STRIPS, e), full.ptr_to([stage]), policy)
            else:
                T.ptx[WEIGHT_TMA](As.ptr_to([stage, 0, 0, 0]), T.address_of(A_map), *BOXED.at(k, n, e), full.ptr_to([stage]), policy)

        if wid == LOADER:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](FEW)
            if lane == 0:
                k0: T.int32 = 0
                boxes: T.int32
                tile: T.int32 = bx
                total: T.int32 = fresh(COUNT, 0) * NB
                next_e: T.int32
                next_row0: T.int32
                next_rows: T.int32
                next_n: T.int32
                next_many: T.int32

                # Blocks claim tiles in their order, so that those that share weights or tokens
                # start at about the same time and meet in the L2, however long the others took.
                @T.inline
                def look():
                    next_rows = 0
                    if tile < total:
                        walk: T.int32 = fresh(TILES, tile // NB * 4 + 3)
                        group: T.int32 = walk // (GROUP * 2)
                        inside: T.int32 = tile - group * NB
                        next_many = walk % (GROUP * 2)
                        next_n = inside // next_many
                        m: T.int32 = group + inside - next_n * next_many
                        next_e = fresh(TILES, m * 4)
                        next_row0 = fresh(TILES, m * 4 + 1)
                        next_rows = fresh(TILES, m * 4 + 2)

                @T.inline
                def tell():
                    wait(heard.ptr_to([slot]), turn ^ 1)
                    e = next_e
                    row0 = next_row0
                    rows = next_rows
                    n = next_n
                    policy = T.if_then_else(next_many == 1, T.uint64(ALONE), T.uint64(EVICT_NORMAL))
                    boxes = (rows + BOX - 1) // BOX
                    claims[slot, 0] = e
                    claims[slot, 1] = row0
                    claims[slot, 2] = rows
                    claims[slot, 3] = n
                    T.ptx.mbarrier.arrive.shared.b64(told.ptr_to([slot]), T.uint32(1))
                    next_slot()
                    if rows > 0:
                        tile = sms + T.cuda.func_call("moec_claim", COUNT.ptr_to([CLAIMS]), source_code=CLAIM, return_type="int32")

                @T.inline
                def tokens_of(k):
                    for d in T.unroll(D):
                        for i in T.unroll(BOXES):
                            if i < boxes:
                                T.ptx[TMA2](Bs.ptr_to([stage, d, i * BOX, 0]), T.address_of(B_map), (k * D + d) * BK, row0 + i * BOX, full.ptr_to([stage]))

                @T.inline
                def expect(k):
                    coming: T.int32 = ABYTES
                    if COMPACT:
                        if k == 0:
                            coming += HBYTES
                    if not FIRST:
                        coming += boxes * PBYTES
                    T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.Cast("uint32", coming))

                look()
                tell()
                if not FIRST:
                    if rows > 0:
                        for k in T.serial(EARLY):
                            expect(k)
                            weights(k)
                            advance()
                    T.ptx.griddepcontrol.wait()
                    if rows > 0:
                        stage = 0
                        phase = 0
                        for k in T.serial(EARLY):
                            tokens_of(k)
                            advance()
                        k0 = EARLY
                        if EARLY > LOOK:
                            look()
                while rows > 0:
                    for k in T.serial(k0, KB):
                        wait(empty.ptr_to([stage]), phase ^ 1)
                        expect(k)
                        weights(k)
                        if not FIRST:
                            tokens_of(k)
                        advance()
                        if k == LOOK:
                            look()
                    k0 = 0
                    next_heads()
                    tell()
        elif wid >= WARPS:
            T.ptx["setmaxnreg.dec.sync.aligned.u32"](FEW)
            if FIRST:
                # 16-byte pieces: lane l has piece l % 8 of tokens l // 8 and l // 8 + 4 of the eight.
                # The first of every token is kept, by its number (32 bits are enough for 64 GB), and
                # `along` moves with K: with more work for a copy these warps are so busy that the
                # tensor cores wait (a seventh of the time, where every address was worked out).
                place = T.alloc_local((TURNS * 2,), "uint32")
                to = T.alloc_local((2,), "uint32")
                along: T.uint64
                first: T.int32 = (wid - WARPS) * 8
                if COMPACT:
                    behind: T.int32 = -1

                @T.inline
                def arrive_gathered(s):
                    T.ptx.fence.proxy.async_.shared__cta()
                    T.ptx.mbarrier.arrive.shared.b64(full.ptr_to([s]), T.uint32(1))

                hear()
                while rows > 0:
                    for p in T.unroll(TURNS):
                        for h in T.unroll(2):
                            r8: T.int32 = T.min(p * 24 + first + h * 4 + lane // 8, rows - 1)
                            token: T.uint32 = T.Cast("uint32", fresh(ORDER, row0 + r8) // TOPK)
                            place[p * 2 + h] = token * T.uint32(K // 8) + T.Cast("uint32", lane % 8)
                    along = T.cuda.func_call("moec_global", X.data, source_code=COPY16, return_type="uint64")
                    for k in T.serial(KB):
                        wait(empty.ptr_to([stage]), phase ^ 1)
                        for d in T.unroll(D):
                            for h in T.unroll(2):
                                swizzled = T.meta_var((lane % 8 ^ (h * 4 + lane // 8)) * 8)
                                to[h] = T.cuda.func_call("moec_shared", Bs.ptr_to([stage, d, first + h * 4 + lane // 8, swizzled]), source_code=COPY16, return_type="uint32")
                            for p in T.unroll(TURNS):
                                # tokens past the tile's are not loaded: what is there reaches no valid result
                                if p * 24 + first < T.min(rows, N):
                                    for h in T.unroll(2):
                                        there = T.meta_var(to[h] + T.uint32(p * 24 * BK * 2))
                                        if K % (BK * D) == 0:
                                            T.cuda.func_call("moec_copy16", there, along, place[p * 2 + h], source_code=COPY16)
                                        else:
                                            T.cuda.func_call("moec_copy_part", there, along, place[p * 2 + h], T.if_then_else((k * D + d) * BK + lane % 8 * 8 < K, 16, 0), source_code=COPY16)
                            along = along + T.uint64(BK * 2)
                        if COMPACT:
                            # What cp.async wrote is ordered before what wgmma reads here, a stage later, and
                            # not by those that multiply, who would wait for it in every stage.
                            T.ptx.cp.async_.commit_group()
                            T.ptx.cp.async_.wait_group(1)
                            if behind >= 0:
                                arrive_gathered(behind)
                            behind = stage
                        else:
                            # arrives when this thread's copies have: nothing waits for them here
                            T.ptx["cp.async.mbarrier.arrive.noinc.shared.b64"](full.ptr_to([stage]))
                        advance()
                    if COMPACT:
                        T.ptx.cp.async_.wait_group(0)
                        arrive_gathered(behind)
                        behind = -1
                    hear()
        else:
            T.ptx["setmaxnreg.inc.sync.aligned.u32"](MANY)
            to_row = T.alloc_local((-(-N // 32),), "int32")
            acc = T.alloc_local((NACC,), "float32")
            hw = T.alloc_local((MATRICES,), "uint32")
            v = T.alloc_local((4 * STORES,), "uint32")
            own_row = T.alloc_local((STORES,), "int32")
            results: T.uint64 = T.cuda.func_call("moec_global", OUT.data, source_code=COPY16, return_type="uint64")
            vv = T.alloc_local((2,), "float32")
            bb = T.alloc_local((2 * MB,), "float32")
            dA: T.uint64
            dB: T.uint64
            wgi: T.int32 = wid // 4
            if not COMPACT:
                T.cuda.wgmma.encode_matrix_descriptor(T.address_of(dA), As.ptr_to([0, 0, wgi * 64 * MB, 0]), 1, SBO, 3)
            T.cuda.wgmma.encode_matrix_descriptor(T.address_of(dB), Bs.ptr_to([0, 0, 0, 0]), 1, 64, 3)
            prev: T.int32 = 0
            steps: T.int32 = opaque(KB)

            @T.inline
            def release(s):
                if lane == 0:
                    T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([s]), T.uint32(1))

            @T.inline
            def multiply(width):
                for k in T.serial(steps):
                    wait(full.ptr_to([stage]), phase)
                    if FIRST:  # what cp.async wrote is not yet ordered before what wgmma reads
                        T.ptx.fence.proxy.async_.shared__cta()
                    T.ptx.wgmma.fence.sync.aligned()
                    for kk in T.unroll(D * BK // 16):
                        for mb in T.unroll(MB):
                            T.ptx[mma.format(width)](*[acc[mb * (N // 2) + i] for i in range(width // 2)],
                                dA + T.Cast("uint64", stage * (ABYTES // 16) + kk // 4 * (BM * BK * 2 // 16) + mb * BLOCK + kk % 4 * 2),
                                dB + T.Cast("uint64", stage * (BBYTES // 16) + kk // 4 * (N * BK * 2 // 16) + kk % 4 * 2),
                                (k + kk) != 0, 1, 1, 0, 0)
                    T.ptx.wgmma.commit_group.sync.aligned()
                    if k > 0:
                        T.ptx.wgmma.wait_group.sync.aligned(1)
                        release(prev)
                    prev = stage
                    advance()
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release(prev)

            # The A side of a group of wgmma is expanded into registers while the group before runs. What
            # it is expanded from is loaded as soon as that one has begun, into the next stage as well.
            @T.inline
            def multiply_compact(pick):
                wide = T.alloc_local((16 * HALVES,), "uint32")
                raw = T.alloc_local((RAW * HALVES,), "uint32")
                held = T.alloc_local((MB * HELD,), "uint32")
                table = T.alloc_local((MB * TABLE,), "uint32")
                high: T.int32 = T.Cast("int32", T.shift_right(dB, T.uint64(32)))
                first: T.int32 = T.Cast("int32", dB & T.uint64(0xFFFFFFFF))
                low_bytes: T.uint32 = expand.place(units.ptr_to([0, wid * (2 * MB), 0, 0]), 8)
                codes_of: T.uint32 = expand.place(units.ptr_to([0, wid * (2 * MB), 0, 0]), 4)
                some: T.uint32
                pool_of = T.meta_var(PACKED_W.ptr_to([T.Cast("int64", e) * EXPERT + STRIPPED]))

                @T.inline
                def load(g, k):
                    EXPANSION.load(raw.ptr_to([0]), (low_at, codes_at), (bytes_of(g, 0), bytes_of(g, 1)))
                    some = EXPANSION.due(held.ptr_to([block_of(g) * HELD]), (k * D + depth_of(g)) * 2 + half_of(g))

                @T.inline
                def at_stage():
                    low_at = low_bytes + T.Cast("uint32", stage) * T.uint32(ABYTES)
                    codes_at = codes_of + T.Cast("uint32", stage) * T.uint32(ABYTES)

                low_at: T.uint32
                codes_at: T.uint32
                low: T.int32 = first + stage * (BBYTES // 16)
                wait(full.ptr_to([stage]), phase)
                for mb in T.unroll(MB):
                    headers = T.meta_var((heads.ptr_to([hslot, wid * (2 * MB) + strip_of(mb, 0), 0]), heads.ptr_to([hslot, wid * (2 * MB) + strip_of(mb, 1), 0])))
                    EXPANSION.table(table.ptr_to([mb * TABLE]), headers)
                    EXPANSION.start(held.ptr_to([mb * HELD]), headers, pool_of, scratch.ptr_to([wid, 0]))
                at_stage()
                load(0, 0)
                for k in T.serial(steps):
                    for g in T.unroll(GROUPS):
                        # the registers that the group before the last was multiplied from
                        own = T.meta_var(g % 2 * 8 * HALVES)
                        mb = T.meta_var(block_of(g))
                        headers = T.meta_var((heads.ptr_to([hslot, wid * (2 * MB) + strip_of(mb, 0), 0]), heads.ptr_to([hslot, wid * (2 * MB) + strip_of(mb, 1), 0])))
                        T.ptx.wgmma.wait_group.sync.aligned(1)
                        if g == 1:
                            if k > 0:
                                release(prev)
                        if g == GROUPS - 1:
                            # Here, where the group before still runs: behind wgmma the warp would wait
                            # for where the next stage is.
                            prev = stage
                            advance()
                            at_stage()
                        EXPANSION.expand(wide.ptr_to([own]), raw.ptr_to([0]), table.ptr_to([mb * TABLE]))
                        if some != T.uint32(0):
                            EXPANSION.put(wide.ptr_to([own]), held.ptr_to([mb * HELD]), headers, pool_of, (k * D + depth_of(g)) * 2 + half_of(g))
                        if g < GROUPS - 1:
                            load(g + 1, k)
                        T.ptx.wgmma.fence.sync.aligned()
                        T.cuda.func_call(PICKED, acc.ptr_to([mb * (N // 2)]), wide.ptr_to([own]),
                            low + (depth_of(g) * (N * BK * 2 // 16) + half_of(g) * 4), high, T.Cast("int32", (k + depth_of(g) + half_of(g)) != 0), pick, source_code=PICKED_SRC)
                        if g == GROUPS - 1:
                            low += BBYTES // 16
                            if stage == 0:
                                low = first
                            # behind the last K block nothing uses what is loaded
                            wait_unless(T.Cast("int32", k + 1 == steps), full.ptr_to([stage]), phase)
                            load(0, k + 1)
                T.ptx.wgmma.wait_group.sync.aligned(0)
                release(prev)

            hear()
            while rows > 0:
                if not FIRST:
                    # where the tile's rows go: lane l knows that of tokens l, l + 32, ...
                    for p in T.unroll(-(-N // 32)):
                        if p * 32 + lane < rows:
                            to_row[p] = fresh(ORDER, row0 + p * 32 + lane)
                pick: T.int32 = T.Cast("int32", rows > WIDTHS[0])
                pick += T.Cast("int32", rows > WIDTHS[min(1, NV - 1)])
                pick += T.Cast("int32", rows > WIDTHS[min(2, NV - 1)])
                pick += T.Cast("int32", rows > WIDTHS[min(3, NV - 1)])
                pick += T.Cast("int32", rows > WIDTHS[min(4, NV - 1)])
                pick += T.Cast("int32", rows > WIDTHS[min(5, NV - 1)])
                pick += T.Cast("int32", rows > WIDTHS[min(6, NV - 1)])
                if COMPACT:
                    # what it was, but in a register of each lane: multiply_picked says why
                    pick = T.Cast("int32", T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), pick, lane, 32))
                    multiply_compact(pick)
                else:
                    if pick == 0:
                        multiply(WIDTHS[0])
                    if NV > 1:
                        if pick == 1:
                            multiply(WIDTHS[min(1, NV - 1)])
                    if NV > 2:
                        if pick == 2:
                            multiply(WIDTHS[min(2, NV - 1)])
                    if NV > 3:
                        if pick == 3:
                            multiply(WIDTHS[min(3, NV - 1)])
                    if NV > 4:
                        if pick == 4:
                            multiply(WIDTHS[min(4, NV - 1)])
                    if NV > 5:
                        if pick == 5:
                            multiply(WIDTHS[min(5, NV - 1)])
                    if NV > 6:
                        if pick == 6:
                            multiply(WIDTHS[min(6, NV - 1)])
                    if NV > 7:
                        if pick == 7:
                            multiply(WIDTHS[min(7, NV - 1)])
                next_heads()
                first_col: T.int32 = n * NOUT + wid * WOUT
                apart = T.meta_var(8 if JOIN == MB else 32)  # columns from a piece to the next
                if JOIN != MB:
                    first_col = n * NOUT + wgi * (32 * MB) + wid % 4 * 8
                piece = T.meta_var(lane % PIECES)
                inside: T.bool = first_col + piece * apart < COLS
                column: T.uint64 = results + T.Cast("uint64", (first_col + piece * apart) * 2)
                if BIAS:
                    for i in T.unroll(2 * MB):
                        bb[i] = T.float32(0)
                    for mb in T.unroll(MB):
                        for i in T.unroll(2):
                            if PAIR:
                                if first_col + mb * apart + lane // 4 < COLS:
                                    bb[mb * 2 + i] = BIASV[e * WROWS + i * COLS + first_col + mb * apart + lane // 4]
                            else:
                                if first_col + (i * MB + mb) * 8 + lane // 4 < COLS:
                                    bb[mb * 2 + i] = BIASV[e * WROWS + first_col + (i * MB + mb) * 8 + lane // 4]
                for part in T.unroll(N // PART):
                    t0 = T.meta_var(part * PART)
                    if part == 0 or t0 < rows:
                        for b in T.unroll(PART // 8):
                            for mb in T.unroll(MB):
                                for f in T.unroll(FRAGS):
                                    for i in T.unroll(2):
                                        a = T.meta_var(mb * (N // 2) + t0 // 2 + b * 4 + i)
                                        if PAIR:
                                            if BIAS:
                                                vv[i] = T.cuda.func_call(ACT, acc[a] + bb[mb * 2], acc[a + 2] + bb[mb * 2 + 1], source_code=ACT_SRC, return_type="float32")
                                            else:
                                                vv[i] = T.cuda.func_call(ACT, acc[a], acc[a + 2], source_code=ACT_SRC, return_type="float32")
                                        else:
                                            vv[i] = acc[a + f * 2]
                                            if BIAS:
                                                vv[i] = vv[i] + bb[mb * 2 + f]
                                            if FIRST:
                                                vv[i] = T.cuda.func_call(ACT, vv[i], vv[i], source_code=ACT_SRC, return_type="float32")
                                    T.ptx[cvt](hw[b * PIECES + f * MB + mb], vv[1], vv[0])
                        T.cuda.warp_sync()  # the rows that were there have been read
                        # matrix j: piece j % PIECES of 8 tokens
                        for s in T.unroll(MATRICES // 4):
                            j = T.meta_var(s * 4 + lane // 8)
                            T.ptx[st.format(4)](Ds.ptr_to([wid, j // PIECES * 8 + lane % 8, (j % PIECES ^ lane % 8 // LANES) * 8]), hw[s * 4], hw[s * 4 + 1], hw[s * 4 + 2], hw[s * 4 + 3])
                        if MATRICES == 2:
                            T.ptx[st.format(2)](Ds.ptr_to([wid, lane // 8 % 2 // PIECES * 8 + lane % 8, (lane // 8 % 2 % PIECES ^ lane % 8 // LANES) * 8]), hw[0], hw[1])
                        if MATRICES == 1:
                            T.ptx[st.format(1)](Ds.ptr_to([wid, lane % 8, 0]), hw[0])
                        T.cuda.warp_sync()
                        # All loads, then all stores, and no branches: one after the other they are waited for.
                        for p in T.unroll(STORES):
                            token = T.meta_var((p * 32 + lane) // PIECES)
                            own_row[p] = row0 + t0 + token
                            if not FIRST:
                                own_row[p] = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), to_row[t0 // 32], t0 % 32 + token, 32)
                            T.ptx["ld.shared.v4.u32"](v[p * 4], v[p * 4 + 1], v[p * 4 + 2], v[p * 4 + 3], Ds.ptr_to([wid, token % PART, (piece ^ token % 8 // LANES) * 8]))
                        for p in T.unroll(STORES):
                            token = T.meta_var((p * 32 + lane) // PIECES)
                            valid = T.meta_var(inside and token < PART and t0 + token < rows)
                            T.cuda.func_call("moec_store16", column, own_row[p], COLS * 2, v.ptr_to([p * 4]), valid, source_code=STORE16)
                hear()
    # fmt: on
    return Kernel(symbol, shape.buffers("h" if FIRST else "rows", FIRST), kernel)
