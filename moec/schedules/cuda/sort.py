"""Stable counting sort of the (token, expert) pairs by expert, and the tiles of the matmuls.

One block of 1024 threads does everything where rows are few. Where they are many, the blocks of
a cluster share them out and read each other's counts (Hopper), or a first launch counts per
block of rows and a second one places, each block adding up the counts itself. Pairs of one expert keep their order, so the result is the same on every run. Ids outside
[0, E) sort behind expert_offsets[E], where no expert reads.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from enum import Enum

from tvm.script import tirx as T

from ..buffers import Buf, Kernel, PerToken
from .intrinsics import CLUSTER_LOAD, CLUSTER_SYNC, SHARED_ADD, fresh, match

WARPS = 32
THREADS = WARPS * 32
BLOCK_ROWS = 2048
MAX_EXPERTS = THREADS - 1
TILE_WORDS = 4
CLUSTER = 8  # blocks that every GPU with clusters runs together
AHEAD = 8  # ids of a thread in flight
GROUP = 16  # tiles of an expert that are multiplied with the same weight rows in turn


class Grid(Enum):
    """Who sorts: one block, a cluster of blocks, or any number of blocks after `count`."""

    BLOCK = "block"
    CLUSTER = "cluster"
    COUNTED = "counted"


def buffers(experts: int, top_k: int) -> tuple[Buf, ...]:
    """topk_ids, and what the sort leaves: row_order, expert_offsets, tiles, tile_count.

    tiles [tile_count[0]] are (expert, first sorted row, rows, walk), expert by expert; a tile
    holds at least one row, hence S of them are enough. walk: up to GROUP tiles of an expert form
    a group, f * 2 * GROUP + n for the n tiles from f on, that are multiplied with the same
    weight rows before the next ones. tile_count[1] and [2] are 0: counters of the matmuls.
    """
    return (
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        Buf("row_order", (PerToken(top_k),), "int32"),
        Buf("expert_offsets", (experts + 1,), "int32"),
        Buf("tiles", (PerToken(top_k), TILE_WORDS), "int32"),
        Buf("tile_count", (TILE_WORDS,), "int32"),
    )


def sort(
    symbol: str, experts: int, top_k: int, tile_rows: int, grid: Grid, grain: int = 0
) -> Kernel:
    """The sort for matmul tiles of at most `tile_rows` rows.

    The rows of an expert are divided evenly among its tiles in multiples of `grain`, which
    divides tile_rows (0: tiles are full but for the last one).

    With Grid.COUNTED the kernel also reads `counts` [blocks of rows, E+1], as `count` made them.
    """
    E, K, BM = experts, top_k, tile_rows
    COUNTED, CLUSTERED = grid is Grid.COUNTED, grid is Grid.CLUSTER
    N = E + 1
    CHUNKS = -(-N // 32)
    GRAIN = grain or BM
    MATCH, MATCH_SRC = match((E + 1).bit_length())
    ROWS = BLOCK_ROWS

    # fmt: off
    @T.prim_func
    def kernel(ids_p: T.handle("int32"), counts_p: T.handle("int32"), order_p: T.handle("int32"), offs_p: T.handle("int32"), tiles_p: T.handle("int32"), count_p: T.handle("int32"), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        S: T.let[T.int32] = T.Cast("int32", tokens) * K
        NB: T.let[T.int32] = (S + ROWS - 1) // ROWS
        IDS = T.decl_buffer((S,), "int32", data=ids_p)
        ORDER = T.decl_buffer((S,), "int32", data=order_p)
        OFFS = T.decl_buffer((N,), "int32", data=offs_p)
        TILES = T.decl_buffer((S * 4,), "int32", data=tiles_p)
        COUNT = T.decl_buffer((4,), "int32", data=count_p)
        COUNTS = T.decl_buffer((NB * N,), "int32", data=counts_p)
        T.device_entry()
        bx = T.cta_id([NB if COUNTED else CLUSTER if CLUSTERED else 1])
        if CLUSTERED:
            rank_ = T.cta_id_in_cluster([CLUSTER])   # equal to bx: the grid is one cluster
        tid = T.thread_id([THREADS])
        wid: T.int32 = tid // 32
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        cursor = pool.alloc((WARPS, N), "int32", align=16)
        scan = pool.alloc((2, CHUNKS * 32), "int32", align=16)
        total = pool.alloc((2, 64), "int32", align=16)
        if CLUSTERED:
            own_rows = pool.alloc((N,), "int32", align=16)
        pool.commit()
        T.ptx.griddepcontrol.launch_dependents()
        T.ptx.griddepcontrol.wait()

        begin: T.int32 = 0
        end: T.int32 = S
        if COUNTED:
            begin = bx * ROWS
            end = T.min(S, begin + ROWS)
        if CLUSTERED:
            share: T.int32 = (S + CLUSTER - 1) // CLUSTER
            begin = T.min(S, bx * share)
            end = T.min(S, begin + share)
        span: T.int32 = ((end - begin + THREADS - 1) // THREADS) * 32     # rows of one warp
        for i in T.serial((N + 31) // 32):
            if i * 32 + lane < N:
                cursor[wid, i * 32 + lane] = 0
        T.cuda.warp_sync()

        e: T.int32
        at: T.int32
        rank: T.int32
        first: T.int32
        mask: T.uint32

        ids = T.alloc_local((AHEAD,), "int32")
        turns: T.int32 = span // 32

        # the ids of the turns from i on: in flight together
        @T.inline
        def ahead_of(i):
            for j in T.unroll(AHEAD):
                ids[j] = E + 1                       # rows past the end match each other only
                if i + j < turns and begin + wid * span + (i + j) * 32 + lane < end:
                    ids[j] = fresh(IDS, begin + wid * span + (i + j) * 32 + lane)
                    if ids[j] < 0 or ids[j] >= E:
                        ids[j] = E

        @T.inline
        def look(i, j):
            at = begin + wid * span + (i + j) * 32 + lane
            e = ids[j]
            mask = T.cuda.func_call(MATCH, e, source_code=MATCH_SRC, return_type="uint32")
            rank = T.Cast("int32", T.popcount(mask & (T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1))))
            first = 0
            if e <= E:
                first = cursor[wid, e]
            T.cuda.warp_sync()
            if e <= E and rank == 0:
                cursor[wid, e] = first + T.Cast("int32", T.popcount(mask))
            T.cuda.warp_sync()

        for i in T.serial((turns + AHEAD - 1) // AHEAD):
            ahead_of(i * AHEAD)
            for j in T.unroll(AHEAD):
                if i * AHEAD + j < turns:
                    look(i * AHEAD, j)
        T.cuda.cta_sync()
        # cursors of a warp start behind those of the warps before it
        held = T.alloc_local((WARPS,), "int32")
        mine: T.int32 = 0                            # rows of expert `tid`
        ahead: T.int32 = 0                           # of which in blocks before this one
        if CLUSTERED:
            if tid < N:
                for w in T.unroll(WARPS):
                    mine += cursor[w, tid]
                own_rows[tid] = mine
                mine = 0
            T.cuda.func_call("moec_cluster_sync", source_code=CLUSTER_SYNC)
        if tid < N:
            if CLUSTERED:
                for b in T.unroll(CLUSTER):
                    held[b] = T.cuda.func_call("moec_cluster_load", own_rows.ptr_to([tid]), b, source_code=CLUSTER_LOAD, return_type="int32")
                for b in T.unroll(CLUSTER):
                    if b == bx:
                        ahead = mine
                    mine += held[b]
            if COUNTED:
                for b8 in T.serial((NB + 7) // 8):
                    for b in T.unroll(8):            # eight loads in flight
                        held[b] = 0
                        if b8 * 8 + b < NB:
                            held[b] = fresh(COUNTS, (b8 * 8 + b) * N + tid)
                    for b in T.unroll(8):
                        if b8 * 8 + b == bx:
                            ahead = mine
                        mine += held[b]
            run: T.int32 = ahead
            for w in T.unroll(WARPS):
                held[w] = cursor[w, tid]
            for w in T.unroll(WARPS):
                cursor[w, tid] = run
                run += held[w]
            if not COUNTED and not CLUSTERED:
                mine = run
        # exclusive scans over experts: of rows, and of tiles
        own = T.alloc_local((2,), "int32")
        inc = T.alloc_local((2,), "int32")
        own[0] = mine
        own[1] = (mine + BM - 1) // BM
        if tid >= E:
            own[1] = 0
        if wid < CHUNKS:
            for s in T.unroll(2):
                inc[s] = own[s]
                for d in T.unroll(5):
                    up: T.int32 = T.cuda.__shfl_up_sync(T.uint32(0xFFFFFFFF), inc[s], 1 << d, 32)
                    if lane >= 1 << d:
                        inc[s] = inc[s] + up
                scan[s, tid] = inc[s] - own[s]
                if lane == 31:
                    total[s, wid] = inc[s]
        T.cuda.cta_sync()
        if wid < 2:
            t0: T.int32 = 0
            if lane < CHUNKS:
                t0 = total[wid, lane]
            t1: T.int32 = t0
            for d in T.unroll(5):
                up2: T.int32 = T.cuda.__shfl_up_sync(T.uint32(0xFFFFFFFF), t1, 1 << d, 32)
                if lane >= 1 << d:
                    t1 = t1 + up2
            total[wid, 32 + lane] = t1 - t0
        T.cuda.cta_sync()
        if tid < N:
            base: T.int32 = scan[0, tid] + total[0, 32 + wid]
            scan[0, tid] = base
            if bx == 0:
                OFFS[tid] = base
                tile: T.int32 = scan[1, tid] + total[1, 32 + wid]
                if tid < E:
                    # as even as multiples of GRAIN allow; at most BM, as GRAIN divides BM
                    some: T.int32 = T.max(own[1], 1)
                    span_: T.int32 = ((mine + some - 1) // some + GRAIN - 1) // GRAIN * GRAIN
                    for j in T.serial(own[1]):
                        TILES[(tile + j) * 4] = tid
                        TILES[(tile + j) * 4 + 1] = base + j * span_
                        TILES[(tile + j) * 4 + 2] = T.min(span_, mine - j * span_)
                        TILES[(tile + j) * 4 + 3] = (tile + j // GROUP * GROUP) * (2 * GROUP) + T.min(GROUP, own[1] - j // GROUP * GROUP)
                else:
                    COUNT[0] = tile
                    COUNT[1] = 0
                    COUNT[2] = 0
        T.cuda.cta_sync()
        for i in T.serial((turns + AHEAD - 1) // AHEAD):
            ahead_of(i * AHEAD)
            for j in T.unroll(AHEAD):
                if i * AHEAD + j < turns:
                    look(i * AHEAD, j)
                    if e <= E:
                        ORDER[scan[0, e] + first + rank] = at
        if CLUSTERED:                                # others may still read this block's counts
            T.cuda.func_call("moec_cluster_sync", source_code=CLUSTER_SYNC)
    # fmt: on
    ids, *results = buffers(E, K)
    return Kernel(symbol, (ids, counts(E) if COUNTED else ids, *results), kernel)


def counts(experts: int) -> Buf:
    """Rows of every expert in every block of rows; blocks of rows are fewer than tokens."""
    return Buf("counts", (PerToken(), experts + 1), "int32")


def count(symbol: str, experts: int, top_k: int) -> Kernel:
    """topk_ids -> counts [blocks of BLOCK_ROWS rows, E+1]; needs top_k <= BLOCK_ROWS."""
    E, K, N, ROWS = experts, top_k, experts + 1, BLOCK_ROWS

    # fmt: off
    @T.prim_func
    def kernel(ids_p: T.handle("int32"), counts_p: T.handle("int32"), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        S: T.let[T.int32] = T.Cast("int32", tokens) * K
        NB: T.let[T.int32] = (S + ROWS - 1) // ROWS
        IDS = T.decl_buffer((S,), "int32", data=ids_p)
        COUNTS = T.decl_buffer((NB * N,), "int32", data=counts_p)
        T.device_entry()
        bx = T.cta_id([NB])
        tid = T.thread_id([THREADS])
        pool = T.SMEMPool()
        bins = pool.alloc((N,), "int32", align=16)
        pool.commit()
        T.ptx.griddepcontrol.launch_dependents()
        T.ptx.griddepcontrol.wait()
        if tid < N:
            bins[tid] = 0
        T.cuda.cta_sync()
        for i in T.serial(ROWS // THREADS):
            at: T.int32 = bx * ROWS + i * THREADS + tid
            if at < S:
                e: T.int32 = IDS[at]
                if e < 0 or e >= E:
                    e = E
                T.cuda.func_call("moec_add", bins.ptr_to([e]), 1, source_code=SHARED_ADD)
        T.cuda.cta_sync()
        if tid < N:
            COUNTS[bx * N + tid] = bins[tid]
    # fmt: on
    ids = buffers(E, K)[0]
    return Kernel(symbol, (ids, counts(E)), kernel)
