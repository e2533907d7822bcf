"""The expert matmuls of up to 8 tokens: two launches, no sort, no atomics, no sum kernel.

Every token is a fixed column of mma.m16n8k16, weights are its 16 rows. A block finds the
active experts itself from topk_ids; one thread streams 16-row boxes of weights through a ring
of shared-memory stages by TMA, and the warps share out a box's K chunks. The first kernel
splits all (active expert, gate/up pair)s evenly over the multiprocessors. The second owns
output columns, weighs the experts of a token and adds them up in registers, in ascending
expert order: bitwise repeatable. It starts loading its weights while the first still runs.

Of compact weights (compact.py) a box holds two strips of eight rows, whose chunks the warps expand
in registers instead of reading them by ldmatrix; columns are shared out by strips.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
from tvm.script import tirx as T

from ...spec import ActivationSpec
from ...target import Form
from ..buffers import Buf, Kernel, PerToken
from . import expand
from .activation import device_function
from .boxes import CACHE_HINT, EVICT_FIRST, NO_MAP, PACKED, TMA, header_box, row_box, unit_box
from .compact import STRIP, UNIT, headers_kept
from .decode_config import CHUNK, DecodeConfig
from .expand import HELD, RAW, TABLE, Expansion, Rare
from .intrinsics import fresh, wait
from .shapes import Matmul

LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
MAX_TOKENS = 8
SUMS = 4  # tiles that wait for the finishing warp of the first kernel at most


def _buffers(experts: int, top_k: int) -> tuple[Buf, Buf]:
    return (
        Buf("topk_ids", (PerToken(), top_k), "int32", True),
        Buf("topk_weights", (PerToken(), top_k), "float32", True),
    )


def gate_up(
    symbol: str, shape: Matmul, act: ActivationSpec, config: DecodeConfig, sms: int
) -> Kernel:
    """x [T, H], topk_ids, weight [E, 2I, H] (, bias) -> h [S, I].

    h[t*K + k] is in an order of columns of its own, that of the second kernel's lanes. Of an
    expert that a token names twice only the last k is written. T <= 8.
    """
    E, K, H, I = shape.experts, shape.top_k, shape.inner, shape.outer
    PAIR, BIAS, DT = shape.gated, shape.bias, shape.dtype
    SHORT = "bf16" if DT == "bfloat16" else "f16"
    KO, ST = config.chunks, config.stages
    NW, NCH = KO, H // CHUNK // KO
    THREADS = NW * 32 + 64  # and a producer warp, and one that finishes tiles
    OUT = 8 if PAIR else 16  # outputs of a tile
    HALVES = 2 if PAIR else 1
    TILES = -(-I // OUT)  # of an expert
    NWORD, NPC = -(-E // 32), -(-MAX_TOKENS * K // 32)
    NA = min(E, MAX_TOKENS * K)
    WROWS = I * HALVES
    COMPACT, LAYOUT = shape.form is Form.COMPACT, shape.layout
    EXPANSION = Expansion(LAYOUT.inline, 2, Rare.ASK)
    EXPERT, STRIPPED = LAYOUT.expert_bytes // 4, LAYOUT.strips * LAYOUT.strip_bytes // 4
    TX = KO * (2 * UNIT if COMPACT else 16 * CHUNK * 2)
    BOX = unit_box(LAYOUT, 2, KO) if COMPACT else row_box(shape, PAIR, OUT, KO)
    HEADERS = header_box(LAYOUT, 2)
    HEADS = headers_kept(ST, NCH) if COMPACT else 0  # tiles
    MAPPED, WT = (PACKED, "int32") if COMPACT else (DT, DT)
    LOAD = TMA.format(BOX.rank) + CACHE_HINT
    LOAD_HEADS = TMA.format(HEADERS.rank)
    MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.{SHORT}.{SHORT}.f32"
    ACT, ACT_SRC = device_function(act, PAIR)

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(DT), ids_p: T.handle("int32"), w_p: T.handle(WT), bias_p: T.handle("float32"), h_p: T.handle(DT), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        X = T.decl_buffer((NT, H), DT, data=x_p)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        BIASV = T.decl_buffer((E * WROWS,), "float32", data=bias_p)
        HOUT = T.decl_buffer((NT * K, I), DT, data=h_p)
        W_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        assert T.call_extern("int32", "moec_tensor_map", W_map, w_p, BOX.text(MAPPED)) == 0, NO_MAP
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
            units = pool.alloc((ST, 2, KO, UNIT), "uint8", align=128)
            heads = pool.alloc((HEADS, 2, LAYOUT.header), "uint8", align=128)
        else:
            ring = pool.alloc((ST, KO, 16, CHUNK), DT, align=1024)
        red = pool.alloc((SUMS, NW, 32, 4), "float32", align=16)
        full = pool.alloc((ST,), "uint64", align=8)
        empty = pool.alloc((ST,), "uint64", align=8)
        summed = pool.alloc((SUMS,), "uint64", align=8)
        taken = pool.alloc((SUMS,), "uint64", align=8)
        active = pool.alloc((NA,), "int32", align=4)
        ids = pool.alloc((NPC * 32,), "int32", align=4)
        pool.commit()

        if tid == 0:
            for i in T.unroll(ST):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(NW))
            for i in T.unroll(SUMS):
                T.ptx.mbarrier.init.shared.b64(summed.ptr_to([i]), T.uint32(NW * 32))
                T.ptx.mbarrier.init.shared.b64(taken.ptr_to([i]), T.uint32(32))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()

        # active experts, ascending
        mine = T.alloc_local((NPC,), "int32")
        mask = T.alloc_local((1,), "uint32")
        every = T.alloc_local((1,), "uint32")
        count: T.int32 = 0
        for i in T.unroll(NPC):
            mine[i] = -1
            if i * 32 + lane < NT * K:
                mine[i] = fresh(IDS, i * 32 + lane)
                if mine[i] >= E:
                    mine[i] = -1
                if wid == 0:
                    ids[i * 32 + lane] = mine[i]
        for word in T.unroll(NWORD):
            mask[0] = T.uint32(0)
            for i in T.unroll(NPC):
                if T.shift_right(mine[i], 5) == word:
                    mask[0] = mask[0] | T.shift_left(T.uint32(1), T.Cast("uint32", mine[i] & 31))
            T.ptx["redux_sync.or.b32"](every[0], mask[0], T.uint32(0xFFFFFFFF))
            if wid == 0 and (T.shift_right(every[0], T.Cast("uint32", lane)) & T.uint32(1)) == T.uint32(1):
                active[count + T.Cast("int32", T.popcount(every[0] & (T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1))))] = word * 32 + lane
            count += T.Cast("int32", T.popcount(every[0]))
        T.cuda.cta_sync()

        stage: T.int32 = 0
        phase: T.int32 = 0

        @T.inline
        def advance():
            stage += 1
            if stage == ST:
                stage = 0
                phase = phase ^ 1

        # Tiles go round the blocks, so that all of them read from the same few megabytes.
        p: T.int32 = bx
        end: T.int32 = count * TILES
        slot: T.int32
        i0: T.int32

        @T.inline
        def locate():
            slot = p // TILES
            i0 = (p - slot * TILES) * OUT

        g = T.meta_var(lane // 4)
        q = T.meta_var(lane % 4)
        hslot: T.int32 = 0
        s4 = T.alloc_local((4,), "float32")
        t4 = T.alloc_local((4,), "float32")
        slot4: T.int32 = 0
        phase4: T.int32 = 0

        @T.inline
        def next_heads():
            if COMPACT:
                hslot += 1
                if hslot == HEADS:
                    hslot = 0

        # sums of a tile go to the finishing warp through a ring of their own
        @T.inline
        def next_sum():
            slot4 += 1
            if slot4 == SUMS:
                slot4 = 0
                phase4 = phase4 ^ 1

        if wid == NW:
            if lane == 0:
                while p < end:
                    locate()
                    for c in T.serial(NCH):
                        wait(empty.ptr_to([stage]), phase ^ 1)
                        if COMPACT:
                            place = T.meta_var(i0 // 4 if PAIR else i0 // 8)
                            if c == 0:
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(TX + 2 * LAYOUT.header))
                                T.ptx[LOAD_HEADS](heads.ptr_to([hslot, 0, 0]), T.address_of(H_map), *HEADERS.at(0, place, active[slot]), full.ptr_to([stage]))
                            else:
                                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(TX))
                            T.ptx[LOAD](units.ptr_to([stage, 0, 0, 0]), T.address_of(W_map), *BOX.at(c, place, active[slot]), full.ptr_to([stage]), T.uint64(EVICT_FIRST))
                        else:
                            T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(TX))
                            T.ptx[LOAD](ring.ptr_to([stage, 0, 0, 0]), T.address_of(W_map), *BOX.at(c, i0, active[slot]), full.ptr_to([stage]), T.uint64(EVICT_FIRST))
                        advance()
                    next_heads()
                    p += sms
        elif wid == NW + 1:
            while p < end:
                locate()
                wait(summed.ptr_to([slot4]), phase4)
                e: T.int32 = active[slot]
                for i in T.unroll(4):
                    s4[i] = T.float32(0)
                for w in T.unroll(NW):
                    T.ptx["ld.shared.v4.f32"](t4[0], t4[1], t4[2], t4[3], red.ptr_to([slot4, w, lane, 0]))
                    for i in T.unroll(4):
                        s4[i] = s4[i] + t4[i]
                T.ptx.mbarrier.arrive.shared.b64(taken.ptr_to([slot4]), T.uint32(1))
                if BIAS:
                    for i in T.unroll(2):
                        if PAIR:
                            if i0 + g < I:
                                s4[i * 2] = s4[i * 2] + BIASV[e * WROWS + i * I + i0 + g]
                                s4[i * 2 + 1] = s4[i * 2 + 1] + BIASV[e * WROWS + i * I + i0 + g]
                        else:
                            if i0 + g + i * 8 < I:
                                s4[i * 2] = s4[i * 2] + BIASV[e * WROWS + i0 + g + i * 8]
                                s4[i * 2 + 1] = s4[i * 2 + 1] + BIASV[e * WROWS + i0 + g + i * 8]
                for t in T.unroll(2):
                    if q * 2 + t < NT:
                        at: T.int32 = -1
                        for k in T.unroll(K):
                            if ids[(q * 2 + t) * K + k] == e:
                                at = (q * 2 + t) * K + k
                        if at >= 0:
                            for o in T.unroll(1 if PAIR else 2):
                                if i0 + g + o * 8 < I:
                                    col: T.int32 = i0 + g + o * 8
                                    value: T.float32 = T.float32(0)
                                    if PAIR:
                                        value = T.cuda.func_call(ACT, s4[t], s4[2 + t], source_code=ACT_SRC, return_type="float32")
                                    else:
                                        value = T.cuda.func_call(ACT, s4[o * 2 + t], s4[o * 2 + t], source_code=ACT_SRC, return_type="float32")
                                    HOUT[at, col // 32 * 32 + col % 8 // 2 * 8 + col % 32 // 8 * 2 + col % 2] = T.Cast(DT, value)
                next_sum()
                p += sms
        else:
            xf = T.alloc_local((NCH * 8,), "uint32")
            a = T.alloc_local((4,), "uint32")
            acc = T.alloc_local((8,), "float32")
            if COMPACT:
                wide = T.alloc_local((16,), "uint32")
                raw = T.alloc_local((2 * RAW,), "uint32")
                table = T.alloc_local((TABLE,), "uint32")
                held = T.alloc_local((HELD,), "uint32")
            for i in T.unroll(NCH * 8):
                xf[i] = T.uint32(0)
            if g < NT:
                for c in T.unroll(NCH):
                    for i in T.unroll(8):
                        T.ptx["ld.global.cg.u32"](xf[c * 8 + i], X.ptr_to([g, (c * KO + wid) * CHUNK + i * 8 + q * 2]))
            while p < end:
                locate()
                for i in T.unroll(8):
                    acc[i] = T.float32(0)
                for c in T.unroll(NCH):
                    wait(full.ptr_to([stage]), phase)
                    if COMPACT:
                        pool_of = T.meta_var(PACKED_W.ptr_to([T.Cast("int64", active[slot]) * EXPERT + STRIPPED]))
                        headers = T.meta_var((heads.ptr_to([hslot, 0, 0]), heads.ptr_to([hslot, 1, 0])))
                        places = T.meta_var((expand.place(units.ptr_to([stage, 0, wid, 0]), 8), expand.place(units.ptr_to([stage, 0, wid, 0]), 4)))
                        EXPANSION.load(raw.ptr_to([0]), places, (0, KO * UNIT))
                        EXPANSION.table(table.ptr_to([0]), headers)
                        if c == 0:
                            EXPANSION.start(held.ptr_to([0]), headers, pool_of)
                        some: T.uint32 = EXPANSION.due(held.ptr_to([0]), (c * KO + wid) * 2)
                        EXPANSION.expand(wide.ptr_to([0]), raw.ptr_to([0]), table.ptr_to([0]))
                        if some != T.uint32(0):
                            EXPANSION.put(wide.ptr_to([0]), held.ptr_to([0]), headers, pool_of, (c * KO + wid) * 2)
                    for s in T.unroll(4):
                        if COMPACT:
                            for i in T.unroll(4):
                                a[i] = wide[s * 4 + i]
                        else:
                            T.ptx[LDMATRIX](a[0], a[1], a[2], a[3], ring.ptr_to([stage, wid, lane % 16, ((s * 2 + lane // 16) ^ (lane % 8)) * 8]))
                        z = T.meta_var(s % 2 * 4)
                        T.ptx[MMA](acc[z], acc[z + 1], acc[z + 2], acc[z + 3], a[0], a[1], a[2], a[3], xf[c * 8 + s * 2], xf[c * 8 + s * 2 + 1], acc[z], acc[z + 1], acc[z + 2], acc[z + 3])
                    T.cuda.warp_sync()
                    if lane == 0:
                        T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([stage]), T.uint32(1))
                    advance()
                wait(taken.ptr_to([slot4]), phase4 ^ 1)
                T.ptx["st.shared.v4.f32"](red.ptr_to([slot4, wid, lane, 0]), acc[0] + acc[4], acc[1] + acc[5], acc[2] + acc[6], acc[3] + acc[7])
                T.ptx.mbarrier.arrive.shared.b64(summed.ptr_to([slot4]), T.uint32(1))
                next_sum()
                next_heads()
                p += sms
    # fmt: on
    args = (
        Buf("x", (PerToken(), H), DT, True),
        _buffers(E, K)[0],
        shape.weight,
        Buf("bias", (E, WROWS), "float32") if BIAS else shape.weight,
        Buf("h", (PerToken(K), I), DT),
    )
    return Kernel(symbol, args, kernel)


def down(
    symbol: str, shape: Matmul, config: DecodeConfig, sms: int, out: str, scale: float = 1.0
) -> Kernel:
    """h [S, I] of `gate_up`, ids, weights, weight [E, H, I] (, bias) -> y [T, H] of `out`.

    y is `scale` times the sum over the token's experts. T <= 8.
    """
    E, K, I, H = shape.experts, shape.top_k, shape.inner, shape.outer
    BIAS, DT = shape.bias, shape.dtype
    SHORT = "bf16" if DT == "bfloat16" else "f16"
    KO, ST, GP = config.chunks, config.stages, config.ahead
    NW, NCH = KO, I // CHUNK // KO
    THREADS = NW * 32 + 32
    COMPACT, LAYOUT = shape.form is Form.COMPACT, shape.layout
    EXPANSION = Expansion(LAYOUT.inline, 2, Rare.ASK)
    EXPERT, STRIPPED = LAYOUT.expert_bytes // 4, LAYOUT.strips * LAYOUT.strip_bytes // 4
    GRAIN = STRIP if COMPACT else 1  # columns are shared out by so many
    MOST = -(-H // GRAIN // sms) * GRAIN  # columns of a block
    NCT = -(-MOST // 16)
    LAST = 8 if MOST - (NCT - 1) * 16 <= 8 else 16
    NWORD, NPC = -(-E // 32), -(-MAX_TOKENS * K // 32)
    NA = min(E, MAX_TOKENS * K)
    WHOLE, REST = row_box(shape, False, 16, KO), row_box(shape, False, LAST, KO)
    LOAD = TMA.format(WHOLE.rank) + CACHE_HINT
    LENGTH = KO * CHUNK * 2  # bytes of a row of a box
    if COMPACT:
        WHOLE, REST, LENGTH = unit_box(LAYOUT, 2, KO), unit_box(LAYOUT, 1, KO), KO * UNIT // STRIP
    HEADERS, LONE = header_box(LAYOUT, 2), header_box(LAYOUT, 1)
    FEWEST = max(1, -(-(H // GRAIN // sms * GRAIN) // 16))  # boxes of a chunk of K, of any block
    HEADS = headers_kept(ST, NCH * FEWEST) if COMPACT else 0  # experts
    MAPPED, WT = (PACKED, "int32") if COMPACT else (DT, DT)
    LOAD_HEADS = TMA.format(HEADERS.rank)
    FW = max(NCT, 1)
    MMA = f"mma.sync.aligned.m16n8k16.row.col.f32.{SHORT}.{SHORT}.f32"
    SCALED = scale != 1.0

    # fmt: off
    @T.prim_func
    def kernel(h_p: T.handle(DT), ids_p: T.handle("int32"), wts_p: T.handle("float32"), w_p: T.handle(WT), bias_p: T.handle("float32"), y_p: T.handle(out), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        HIN = T.decl_buffer((NT * K, I), DT, data=h_p)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        WTS = T.decl_buffer((NT * K,), "float32", data=wts_p)
        BIASV = T.decl_buffer((E * H,), "float32", data=bias_p)
        Y = T.decl_buffer((NT, H), out, data=y_p)
        W_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
        assert T.call_extern("int32", "moec_tensor_map", W_map, w_p, WHOLE.text(MAPPED)) == 0, NO_MAP
        if COMPACT:
            PACKED_W = T.decl_buffer((E * EXPERT,), "int32", data=w_p)
            H_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            assert T.call_extern("int32", "moec_tensor_map", H_map, w_p, HEADERS.text(MAPPED)) == 0, NO_MAP
            LH_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            assert T.call_extern("int32", "moec_tensor_map", LH_map, w_p, LONE.text(MAPPED)) == 0, NO_MAP
        if LAST < 16 or COMPACT:
            L_map: T.let[T.handle("tensormap")] = T.tvm_stack_alloca("tensormap", 1)
            assert T.call_extern("int32", "moec_tensor_map", L_map, w_p, REST.text(MAPPED)) == 0, NO_MAP
        else:
            L_map = W_map

        T.device_entry()
        T.attr({"tirx.launch_bounds_min_blocks_per_sm": 1})
        bx = T.cta_id([sms])
        tid = T.thread_id([THREADS])
        wid: T.int32 = T.cuda.__shfl_sync(T.uint32(0xFFFFFFFF), tid // 32, 0, 32)
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        if COMPACT:
            units = pool.alloc((ST, 2, KO, UNIT), "uint8", align=128)
            heads = pool.alloc((HEADS, NCT, 2, LAYOUT.header), "uint8", align=128)
        else:
            ring = pool.alloc((ST, KO, 16, CHUNK), DT, align=1024)
        red = pool.alloc((NCT, NW, 32, 4), "float32", align=16)
        full = pool.alloc((ST,), "uint64", align=8)
        empty = pool.alloc((ST,), "uint64", align=8)
        active = pool.alloc((NA,), "int32", align=4)
        ids = pool.alloc((NPC * 32,), "int32", align=4)
        rows = pool.alloc((NA * 8,), "int32", align=4)
        shares = pool.alloc((NA * 8,), "float32", align=4)
        wts = pool.alloc((NPC * 32,), "float32", align=4)
        pool.commit()

        if tid == 0:
            for i in T.unroll(ST):
                T.ptx.mbarrier.init.shared.b64(full.ptr_to([i]), T.uint32(1))
                T.ptx.mbarrier.init.shared.b64(empty.ptr_to([i]), T.uint32(NW))
            T.ptx.fence.mbarrier_init.release.cluster()
        T.cuda.cta_sync()
        T.ptx.griddepcontrol.launch_dependents()

        # The first kernel let this one start after its own wait: topk_ids are complete.
        mine = T.alloc_local((NPC,), "int32")
        mask = T.alloc_local((1,), "uint32")
        every = T.alloc_local((1,), "uint32")
        count: T.int32 = 0
        for i in T.unroll(NPC):
            mine[i] = -1
            if i * 32 + lane < NT * K:
                mine[i] = fresh(IDS, i * 32 + lane)
                if mine[i] >= E:
                    mine[i] = -1
                if wid == 0:
                    ids[i * 32 + lane] = mine[i]
                    wts[i * 32 + lane] = fresh(WTS, i * 32 + lane, "float32")
        for word in T.unroll(NWORD):
            mask[0] = T.uint32(0)
            for i in T.unroll(NPC):
                if T.shift_right(mine[i], 5) == word:
                    mask[0] = mask[0] | T.shift_left(T.uint32(1), T.Cast("uint32", mine[i] & 31))
            T.ptx["redux_sync.or.b32"](every[0], mask[0], T.uint32(0xFFFFFFFF))
            if wid == 0 and (T.shift_right(every[0], T.Cast("uint32", lane)) & T.uint32(1)) == T.uint32(1):
                active[count + T.Cast("int32", T.popcount(every[0] & (T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1))))] = word * 32 + lane
            count += T.Cast("int32", T.popcount(every[0]))
        T.cuda.cta_sync()

        stage: T.int32 = 0
        phase: T.int32 = 0

        @T.inline
        def advance():
            stage += 1
            if stage == ST:
                stage = 0
                phase = phase ^ 1

        col0: T.int32 = bx * (H // GRAIN) // sms * GRAIN
        ncol: T.int32 = (bx + 1) * (H // GRAIN) // sms * GRAIN - col0

        @T.inline
        def load_rows(c, ct, e):
            wait(empty.ptr_to([stage]), phase ^ 1)
            if ct == NCT - 1:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(LAST * LENGTH))
                T.ptx[LOAD](ring.ptr_to([stage, 0, 0, 0]), T.address_of(L_map), *WHOLE.at(c, col0 + ct * 16, e), full.ptr_to([stage]), T.uint64(EVICT_FIRST))
            else:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(16 * LENGTH))
                T.ptx[LOAD](ring.ptr_to([stage, 0, 0, 0]), T.address_of(W_map), *WHOLE.at(c, col0 + ct * 16, e), full.ptr_to([stage]), T.uint64(EVICT_FIRST))
            advance()

        @T.inline
        def load_strips(of_units, of_headers, box, headers, count, c, ct, place, slot, e):
            if c == 0:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(count * (KO * UNIT + LAYOUT.header)))
                T.ptx[LOAD_HEADS](heads.ptr_to([slot, ct, 0, 0]), T.address_of(of_headers), *headers.at(0, place, e), full.ptr_to([stage]))
            else:
                T.ptx.mbarrier.arrive.expect_tx.shared.b64(full.ptr_to([stage]), T.uint32(count * KO * UNIT))
            T.ptx[LOAD](units.ptr_to([stage, 0, 0, 0]), T.address_of(of_units), *box.at(c, place, e), full.ptr_to([stage]), T.uint64(EVICT_FIRST))

        if wid == NW:
            if lane == 0:
                for j in T.serial(count):
                    for c in T.serial(NCH):
                        for ct in T.unroll(NCT):
                            if COMPACT:
                                # of the last two strips of the block's columns there may be one, or none
                                if ct * 16 < ncol:
                                    wait(empty.ptr_to([stage]), phase ^ 1)
                                    place: T.int32 = (col0 + ct * 16) // STRIP
                                    slot: T.int32 = j % HEADS
                                    if ct * 16 + STRIP < ncol:
                                        load_strips(W_map, H_map, WHOLE, HEADERS, 2, c, ct, place, slot, active[j])
                                    else:
                                        load_strips(L_map, LH_map, REST, LONE, 1, c, ct, place, slot, active[j])
                                    advance()
                            else:
                                load_rows(c, ct, active[j])
        else:
            g = T.meta_var(lane // 4)
            q = T.meta_var(lane % 4)
            a = T.alloc_local((4,), "uint32")
            if COMPACT:
                wide = T.alloc_local((16,), "uint32")
                raw = T.alloc_local((2 * RAW,), "uint32")
                table = T.alloc_local((TABLE,), "uint32")
                held = T.alloc_local((NCT * HELD,), "uint32")
            acc = T.alloc_local((NCT * 4,), "float32")
            part = T.alloc_local((8,), "float32")
            weight = T.alloc_local((2,), "float32")
            s4 = T.alloc_local((4,), "float32")
            t4 = T.alloc_local((4,), "float32")
            b = T.alloc_local((GP * 8,), "uint32")
            nb = T.alloc_local((GP * 8,), "uint32")
            for i in T.unroll(NCT * 4):
                acc[i] = T.float32(0)
            # row of h and weight of (active expert, token); -1 and 0 where it is not used
            fill: T.int32 = tid
            while fill < count * 8:
                found: T.int32 = -1
                share: T.float32 = T.float32(0)
                if fill % 8 < NT:
                    for k in T.unroll(K):
                        if ids[fill % 8 * K + k] == active[fill // 8]:
                            found = fill % 8 * K + k
                            share = share + wts[fill % 8 * K + k]
                rows[fill] = found
                shares[fill] = share
                fill += NW * 32
            T.ptx.bar.sync(T.uint32(1), T.uint32(NW * 32))
            T.ptx.griddepcontrol.wait()
            it: T.int32 = 0
            last: T.int32 = count * NCH

            # activations of the next boxes are loaded while these ones are multiplied
            @T.inline
            def ahead(begin):
                for u in T.unroll(GP):
                    for i in T.unroll(8):
                        nb[u * 8 + i] = T.uint32(0)
                    if begin + u < last:
                        j2: T.int32 = (begin + u) // NCH
                        at: T.int32 = rows[j2 * 8 + g]
                        if at >= 0:
                            place = T.meta_var((((begin + u) - j2 * NCH) * KO + wid) * CHUNK + q * 8)
                            T.ptx["ld.global.cg.v4.u32"](nb[u * 8], nb[u * 8 + 1], nb[u * 8 + 2], nb[u * 8 + 3], HIN.ptr_to([at, place]))
                            T.ptx["ld.global.cg.v4.u32"](nb[u * 8 + 4], nb[u * 8 + 5], nb[u * 8 + 6], nb[u * 8 + 7], HIN.ptr_to([at, place + 32]))

            @T.inline
            def multiply(box, u, ct):
                wait(full.ptr_to([stage]), phase)
                for i in T.unroll(8):
                    part[i] = T.float32(0)
                if COMPACT:
                    j: T.int32 = box // NCH
                    slot: T.int32 = j % HEADS
                    pool_of = T.meta_var(PACKED_W.ptr_to([T.Cast("int64", active[j]) * EXPERT + STRIPPED]))
                    # a second strip that is not there is the first again
                    two: T.int32 = T.if_then_else(ct * 16 + STRIP < ncol, 1, 0)
                    headers = T.meta_var((heads.ptr_to([slot, ct, 0, 0]), heads.ptr_to([slot, ct, two, 0])))
                    own = T.meta_var(held.ptr_to([ct * HELD]))
                    places = T.meta_var((expand.place(units.ptr_to([stage, 0, wid, 0]), 8), expand.place(units.ptr_to([stage, 0, wid, 0]), 4)))
                    EXPANSION.load(raw.ptr_to([0]), places, (0, two * (KO * UNIT)))
                    EXPANSION.table(table.ptr_to([0]), headers)
                    if box % NCH == 0:
                        EXPANSION.start(own, headers, pool_of)
                    some: T.uint32 = EXPANSION.due(own, (box % NCH * KO + wid) * 2)
                    EXPANSION.expand(wide.ptr_to([0]), raw.ptr_to([0]), table.ptr_to([0]))
                    if some != T.uint32(0):
                        EXPANSION.put(wide.ptr_to([0]), own, headers, pool_of, (box % NCH * KO + wid) * 2)
                for s in T.unroll(4):
                    if COMPACT:
                        for i in T.unroll(4):
                            a[i] = wide[s * 4 + i]
                    else:
                        if ct == NCT - 1 and LAST == 8:
                            # the box has 8 rows; the other 8 of the tile are the same again
                            T.ptx[LDMATRIX](a[0], a[1], a[2], a[3], ring.ptr_to([stage, wid // 2, wid % 2 * 8 + lane % 8, ((s * 2 + lane // 16) ^ (lane % 8)) * 8]))
                        else:
                            T.ptx[LDMATRIX](a[0], a[1], a[2], a[3], ring.ptr_to([stage, wid, lane % 16, ((s * 2 + lane // 16) ^ (lane % 8)) * 8]))
                    z = T.meta_var(s % 2 * 4)
                    T.ptx[MMA](part[z], part[z + 1], part[z + 2], part[z + 3], a[0], a[1], a[2], a[3], b[u * 8 + s * 2], b[u * 8 + s * 2 + 1], part[z], part[z + 1], part[z + 2], part[z + 3])
                # columns 2q and 2q + 1 are tokens: each expert has its weight there
                for i in T.unroll(4):
                    acc[ct * 4 + i] = acc[ct * 4 + i] + weight[i % 2] * (part[i] + part[i + 4])
                T.cuda.warp_sync()
                if lane == 0:
                    T.ptx.mbarrier.arrive.shared.b64(empty.ptr_to([stage]), T.uint32(1))
                advance()

            ahead(it)
            while it < last:
                for i in T.unroll(GP * 8):
                    b[i] = nb[i]
                ahead(it + GP)
                for u in T.unroll(GP):
                    if it + u < last:
                        for i in T.unroll(2):
                            weight[i] = shares[(it + u) // NCH * 8 + q * 2 + i]
                        for ct in T.unroll(NCT):
                            if COMPACT:
                                if ct * 16 < ncol:
                                    multiply(it + u, u, ct)
                            else:
                                multiply(it + u, u, ct)
                it += GP
            for ct in T.unroll(NCT):
                T.ptx["st.shared.v4.f32"](red.ptr_to([ct, wid, lane, 0]), acc[ct * 4], acc[ct * 4 + 1], acc[ct * 4 + 2], acc[ct * 4 + 3])
            T.ptx.bar.sync(T.uint32(1), T.uint32(NW * 32))
            tile: T.int32 = wid
            while tile < FW:
                for i in T.unroll(4):
                    s4[i] = T.float32(0)
                for w in T.unroll(NW):
                    T.ptx["ld.shared.v4.f32"](t4[0], t4[1], t4[2], t4[3], red.ptr_to([tile, w, lane, 0]))
                    for i in T.unroll(4):
                        s4[i] = s4[i] + t4[i]
                for t in T.unroll(2):
                    for o in T.unroll(2):
                        local: T.int32 = tile * 16 + g + o * 8
                        if q * 2 + t < NT and local < ncol:
                            value: T.float32 = s4[o * 2 + t]
                            if BIAS:
                                for k in T.unroll(K):
                                    e: T.int32 = ids[(q * 2 + t) * K + k]
                                    if e >= 0:
                                        value = value + wts[(q * 2 + t) * K + k] * BIASV[e * H + col0 + local]
                            if SCALED:
                                value = value * T.float32(scale)
                            Y[q * 2 + t, col0 + local] = T.Cast(out, value)
                tile += NW
    # fmt: on
    args = (
        Buf("h", (PerToken(K), I), DT),
        *_buffers(E, K),
        shape.weight,
        Buf("bias", (E, H), "float32") if BIAS else shape.weight,
        Buf("y", (PerToken(), H), out, True),
    )
    return Kernel(symbol, args, kernel)
