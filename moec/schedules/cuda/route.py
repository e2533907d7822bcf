"""From router logits to topk_ids and topk_weights: every variant of RouterSpec, a warp a token.

On Hopper the router's matmul may be in the same launch: a cluster of blocks computes the logits
of eight tokens, and when all of them are there one of its blocks selects.

The order of operations and the roundings are those of `ops.reference.route`. Among equal
values the lowest expert id wins. Ids are in [0, E), whatever the logits hold, unless they come
out of a token table.
"""

# The TVMScript parser reads the annotations of locals itself: no `from __future__` here.
import numpy as np
from ml_dtypes import bfloat16
from tvm.script import tirx as T

from ...spec import (
    GroupScore,
    Masked,
    Precision,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    WeightSource,
)
from ..buffers import Buf, Kernel, PerToken
from . import thin
from .intrinsics import CLUSTER_SYNC, fresh, round_to

WARPS, CLUSTER = 4, 8
MAX_EXPERTS, MAX_TOP_K = 1024, 32
# The operands after the logits, by the names that ops.route has for them.
OPERANDS = ("selection_bias", "per_expert_scale", "global_scale", "token_ids", "token_table")
_NONE = 0x7FFFFFFF
_NUMPY = {"bfloat16": bfloat16, "float16": np.float16, "float32": np.float32}


def route(symbol: str, spec: RouterSpec, dtype: str, linear: thin.Thin | None = None) -> Kernel:
    """logits [T, E] f32 and the operands of ops.route -> topk_ids, topk_weights [T, K].

    With `linear` the operands begin with x [T, H], weight and bias of that matmul instead, and
    the logits are scratch.
    `dtype` is the model's dtype (Precision.MODEL). Operands that `spec` does without are
    there, unread: any buffer stands in their place. A token outside of the token table gets
    ids of -1.
    """
    E, K = spec.num_experts, spec.top_k
    FREE, PICKED = spec.selectable, spec.selected
    FUSED, MATMUL = linear is not None, linear or thin.Thin(8, E, "bfloat16", "float32")
    H, XDT, MMA, TURNS = MATMUL.inner, MATMUL.dtype, MATMUL.mma, MATMUL.turns
    ROWS_A_BLOCK = thin.GROUP if FUSED else WARPS  # tokens, a warp each
    TABLE, VOCAB = spec.selection is Selection.TOKEN_TABLE, max(spec.vocab_size, 1)
    VPL = -(-E // 32)
    LDT = dtype if spec.logits_dtype is Precision.MODEL else "float32"
    WDT = dtype if spec.weights_dtype is Precision.MODEL else "float32"
    SOFTMAX, SIGMOID = spec.score is Score.SOFTMAX, spec.score is Score.SIGMOID
    SOFTPLUS = spec.score is Score.SQRT_SOFTPLUS
    MIXER, BIAS = spec.selection is Selection.SPARSEMIXER, spec.selection_bias
    CAP = spec.logit_cap is not None
    GROUPS, G = spec.groups is not None, spec.groups.count if spec.groups else 1
    KEPT = spec.groups.kept if spec.groups else 1
    SIZE, GPL = FREE // G, -(-G // 32)
    BIASED = spec.groups is None or spec.groups.biased
    TOP2 = spec.groups is not None and spec.groups.score is GroupScore.SUM_TOP2
    INF = float("inf")
    LOST = 0.0 if spec.groups is not None and spec.groups.masked is Masked.ZERO else -INF
    SIGMOID_W = spec.weight_source is WeightSource.SIGMOID_SELECTED
    SOFTMAX_W = spec.weight_source is WeightSource.SOFTMAX_SELECTED
    RENORM, PNORM = spec.renorm is not Renorm.NONE, spec.renorm is Renorm.P_NORM
    CLAMPED = spec.renorm is Renorm.CLAMPED_SUM
    SCALE = spec.scale if spec.scale_on is ScaleOn.WEIGHTS else 1.0
    NEAR = float(np.asarray(2.0 * spec.sparsemixer_eps).astype(_NUMPY[LDT]))
    FULL, P, LIMIT = 0xFFFFFFFF, spec.renorm_p, spec.logit_cap or 1.0

    # fmt: off
    @T.prim_func
    def kernel(x_p: T.handle(XDT), router_p: T.handle(XDT), offset_p: T.handle("float32"), bias_p: T.handle("float32"), scale_p: T.handle("float32"), global_p: T.handle("float32"), tokens_p: T.handle("int32"), table_p: T.handle("int32"), ids_p: T.handle("int32"), w_p: T.handle("float32"), made_p: T.handle("float32"), tokens: T.int64, threads: T.int64):
        T.func_attr({"global_symbol": symbol})
        NT: T.let[T.int32] = T.Cast("int32", tokens)
        X = T.decl_buffer((NT, H), XDT, data=x_p)
        ROUTER = T.decl_buffer((E, H), XDT, data=router_p)
        OFFSET = T.decl_buffer((E,), "float32", data=offset_p)
        LOGITS = T.decl_buffer((NT * E,), "float32", data=made_p if FUSED else x_p)
        SEL_BIAS = T.decl_buffer((FREE,), "float32", data=bias_p)
        EXP_SCALE = T.decl_buffer((E,), "float32", data=scale_p)
        GLOBAL = T.decl_buffer((1,), "float32", data=global_p)
        TOKEN_IDS = T.decl_buffer((NT,), "int32", data=tokens_p)
        ROWS = T.decl_buffer((VOCAB, K), "int32", data=table_p)
        IDS = T.decl_buffer((NT * K,), "int32", data=ids_p)
        W = T.decl_buffer((NT * K,), "float32", data=w_p)
        T.device_entry()
        bx = T.cta_id([(NT + ROWS_A_BLOCK - 1) // ROWS_A_BLOCK * (CLUSTER if FUSED else 1)])
        if FUSED:
            rank = T.cta_id_in_cluster([CLUSTER])
        tid = T.thread_id([ROWS_A_BLOCK * 32])
        wid: T.int32 = tid // 32
        lane = T.meta_var(tid % 32)
        pool = T.SMEMPool()
        score = pool.alloc((ROWS_A_BLOCK, E), "float32", align=16)
        choice = pool.alloc((ROWS_A_BLOCK, E), "float32", align=16)
        if FUSED:
            parts = pool.alloc((thin.WARPS, 32, 4), "float32", align=16)
        pool.commit()
        t: T.int32 = bx * WARPS + wid
        if FUSED:
            t0: T.int32 = bx // CLUSTER * thin.GROUP
            t = NT
            sums = T.alloc_local((4,), "float32")
            rows = T.alloc_local((thin.AHEAD * 8,), "uint32")
            cols = T.alloc_local((thin.AHEAD * 4,), "uint32")
            token: T.int32 = T.min(t0 + lane // 4, NT - 1)
            n0: T.int32 = bx % CLUSTER * thin.ROWS
            thin.load(ROUTER, T.min(n0 + lane // 4, E - 1), rows, 0, 8, 0, H, wid, lane)
            thin.load(ROUTER, T.min(n0 + lane // 4 + 8, E - 1), rows, 4, 8, 0, H, wid, lane)
        T.ptx.griddepcontrol.wait()
        T.ptx.griddepcontrol.launch_dependents()
        if FUSED:
            while n0 < E:
                for i in T.unroll(4):
                    sums[i] = T.float32(0)
                for turn in T.serial(TURNS):
                    if n0 >= CLUSTER * thin.ROWS or turn > 0:
                        thin.load(ROUTER, T.min(n0 + lane // 4, E - 1), rows, 0, 8, turn, H, wid, lane)
                        thin.load(ROUTER, T.min(n0 + lane // 4 + 8, E - 1), rows, 4, 8, turn, H, wid, lane)
                    thin.load(X, T.Cast("int64", token), cols, 0, 4, turn, H, wid, lane)
                    thin.multiply(sums, rows, cols, MMA)
                thin.share(sums, parts, wid, lane)
                if tid < 128:
                    one: T.float32 = T.float32(0)
                    for w in T.unroll(thin.WARPS):
                        one = one + parts[w, tid // 4, tid % 4]
                    n: T.int32 = n0 + tid // 16 + tid % 4 // 2 * 8
                    to: T.int32 = t0 + tid // 4 % 4 * 2 + tid % 2
                    if n < E and to < NT:
                        if MATMUL.bias:
                            one = one + OFFSET[n]
                        LOGITS[to * E + n] = one
                T.cuda.cta_sync()
                n0 += CLUSTER * thin.ROWS
            T.cuda.func_call("moec_cluster_sync", source_code=CLUSTER_SYNC)
            if bx % CLUSTER == 0:
                t = t0 + wid
        v = T.alloc_local((VPL,), "float32")          # logits, then what is selected from
        gs = T.alloc_local((GPL,), "float32")
        best: T.float32
        where: T.int32
        acc: T.float32

        @T.inline
        def warp_max():
            for d in T.unroll(5):
                acc = T.max(acc, T.cuda.__shfl_xor_sync(T.uint32(FULL), acc, 1 << d, 32))

        @T.inline
        def warp_sum():
            for d in T.unroll(5):
                acc = acc + T.cuda.__shfl_xor_sync(T.uint32(FULL), acc, 1 << d, 32)

        # the lowest index of the largest of values[i] at index i * 32 + lane < count
        @T.inline
        def argmax(values, turns, count):
            best = T.float32(-INF)
            where = _NONE
            for i in T.unroll(turns):
                at = T.meta_var(i * 32 + lane)
                if at < count:
                    if values[i] > best or (values[i] == best and at < where):
                        best = values[i]
                        where = at
            for d in T.unroll(5):
                other: T.float32 = T.cuda.__shfl_xor_sync(T.uint32(FULL), best, 1 << d, 32)
                other_at: T.int32 = T.cuda.__shfl_xor_sync(T.uint32(FULL), where, 1 << d, 32)
                if other > best or (other == best and other_at < where):
                    best = other
                    where = other_at
            where = T.min(where, count - 1)

        if t < NT:
            for i in T.unroll(VPL):
                v[i] = T.float32(-INF)
                if i * 32 + lane < E:
                    v[i] = round_to(fresh(LOGITS, t * E + i * 32 + lane, "float32"), LDT)
                    if spec.logit_scale != 1.0:
                        v[i] = round_to(v[i] * T.float32(spec.logit_scale), LDT)
                    if CAP:
                        v[i] = round_to(T.float32(LIMIT) * T.tanh(v[i] / T.float32(LIMIT)), LDT)
            my_id: T.int32 = 0
            my_w: T.float32 = T.float32(0)
            if MIXER:
                left = T.alloc_local((VPL,), "float32")
                for i in T.unroll(VPL):
                    left[i] = v[i]
                for k in T.unroll(2):
                    argmax(left, VPL, E)
                    chosen: T.int32 = where
                    for i in T.unroll(VPL):
                        if i * 32 + lane == chosen:
                            choice[wid, 0] = v[i]
                    T.cuda.warp_sync()
                    top: T.float32 = choice[wid, 0]
                    acc = T.float32(0)
                    for i in T.unroll(VPL):
                        if i * 32 + lane < E:
                            factor: T.float32 = T.max(T.abs(v[i]), top)
                            gap: T.float32 = round_to(round_to(top - v[i], LDT) / factor, LDT)
                            # a gap of NaN (0/0) keeps the expert; `left` is NaN once selected
                            far: T.int32 = 0
                            if gap > T.float32(NEAR):
                                far = 1
                            if far == 0 and left[i] <= top:
                                acc = acc + T.exp(v[i] - top)
                    warp_sum()
                    if lane == k:
                        my_id = chosen
                        my_w = round_to(T.float32(1) / acc, LDT)
                    for i in T.unroll(VPL):
                        if i * 32 + lane == chosen:
                            left[i] = T.float32(float("nan"))
                    T.cuda.warp_sync()
            else:
                if SOFTMAX:
                    acc = T.float32(-INF)
                    for i in T.unroll(VPL):
                        acc = T.max(acc, v[i])
                    warp_max()
                    peak: T.float32 = acc
                    acc = T.float32(0)
                    for i in T.unroll(VPL):
                        v[i] = T.exp(v[i] - peak)
                        acc = acc + v[i]
                    warp_sum()
                    for i in T.unroll(VPL):
                        v[i] = v[i] / acc
                if SIGMOID:
                    for i in T.unroll(VPL):
                        v[i] = T.float32(1) / (T.float32(1) + T.exp(-v[i]))
                if SOFTPLUS:
                    # softplus(v) = max(v, 0) + log1p(e^-|v|): neither side overflows
                    for i in T.unroll(VPL):
                        v[i] = T.sqrt(T.max(v[i], T.float32(0)) + T.log1p(T.exp(-T.abs(v[i]))))
                for i in T.unroll(VPL):
                    if i * 32 + lane < E:
                        score[wid, i * 32 + lane] = v[i]
                        if BIAS:
                            if i * 32 + lane < FREE:
                                v[i] = v[i] + SEL_BIAS[i * 32 + lane]
                        choice[wid, i * 32 + lane] = v[i]
                T.cuda.warp_sync()
                if GROUPS:
                    for j in T.unroll(GPL):
                        gs[j] = T.float32(-INF)
                        if j * 32 + lane < G:
                            first: T.float32 = T.float32(-INF)
                            second: T.float32 = T.float32(-INF)
                            for i in T.serial(SIZE):
                                one: T.float32 = T.float32(0)
                                if BIASED:
                                    one = choice[wid, (j * 32 + lane) * SIZE + i]
                                else:
                                    one = score[wid, (j * 32 + lane) * SIZE + i]
                                second = T.max(second, T.min(first, one))
                                first = T.max(first, one)
                            gs[j] = first
                            if TOP2:
                                gs[j] = first + second
                    kept = T.alloc_local((GPL,), "int32")
                    for j in T.unroll(GPL):
                        kept[j] = 0
                    for i in T.serial(KEPT):
                        argmax(gs, GPL, G)
                        for j in T.unroll(GPL):
                            if j * 32 + lane == where:
                                kept[j] = 1
                                gs[j] = T.float32(float("nan"))
                    T.cuda.warp_sync()
                    for j in T.unroll(GPL):
                        if j * 32 + lane < G:
                            if kept[j] == 0:
                                for i in T.serial(SIZE):
                                    choice[wid, (j * 32 + lane) * SIZE + i] = T.float32(LOST)
                    T.cuda.warp_sync()
                    for i in T.unroll(VPL):
                        if i * 32 + lane < E:
                            v[i] = choice[wid, i * 32 + lane]
                if TABLE:
                    token: T.int32 = fresh(TOKEN_IDS, t)
                    my_id = -1
                    if lane < K and token >= 0 and token < VOCAB:
                        my_id = ROWS[token, lane]
                else:
                    for k in T.serial(PICKED):
                        argmax(v, VPL, FREE)
                        if lane == k:
                            my_id = where
                        # NaN compares with nothing: it is never chosen a second time
                        for i in T.unroll(VPL):
                            if i * 32 + lane == where:
                                v[i] = T.float32(float("nan"))
                    # the experts that every token passes come last
                    if lane >= PICKED and lane < K:
                        my_id = FREE + lane - PICKED
                if lane < K:
                    my_w = score[wid, T.max(T.min(my_id, E - 1), 0)]   # a table may hold anything
                if SIGMOID_W:
                    my_w = T.float32(1) / (T.float32(1) + T.exp(-my_w))
                if SOFTMAX_W:
                    acc = T.float32(-INF)
                    if lane < K:
                        acc = my_w
                    warp_max()
                    my_w = T.exp(my_w - acc)
                    acc = T.float32(0)
                    if lane < K:
                        acc = my_w
                    warp_sum()
                    my_w = my_w / acc
            if RENORM:
                acc = T.float32(0)
                if lane < K:
                    acc = my_w
                    if PNORM:
                        acc = T.pow(T.abs(my_w), T.float32(P))
                warp_sum()
                if PNORM:
                    acc = T.pow(acc, T.float32(1.0 / P))
                else:
                    if CLAMPED:
                        acc = T.max(acc, T.float32(spec.renorm_epsilon))
                    else:
                        acc = acc + T.float32(spec.renorm_epsilon)
                my_w = my_w / acc
            if lane < K:
                if SCALE != 1.0:
                    my_w = my_w * T.float32(SCALE)
                if spec.per_expert_scale:
                    my_w = my_w * EXP_SCALE[T.max(T.min(my_id, E - 1), 0)]
                if spec.global_scale:
                    my_w = my_w * GLOBAL[0]
                IDS[t * K + lane] = my_id
                W[t * K + lane] = round_to(my_w, WDT)
    # fmt: on
    logits = Buf("logits", (PerToken(), E), "float32")
    matmul = (
        Buf("x", (PerToken(), H), XDT, True),
        Buf("router", (E, H), XDT),
        Buf("router_bias", (E,), "float32"),
    )
    unread = Buf("unread", (1,), "float32")
    args = (
        *(matmul if FUSED else (logits, unread, unread)),
        Buf("selection_bias", (FREE,), "float32"),
        Buf("per_expert_scale", (E,), "float32"),
        Buf("global_scale", (1,), "float32"),
        Buf("token_ids", (PerToken(),), "int32", True),
        Buf("token_table", (VOCAB, K), "int32"),
        Buf("topk_ids", (PerToken(), K), "int32", True),
        Buf("topk_weights", (PerToken(), K), "float32", True),
        logits if FUSED else unread,
    )
    return Kernel(symbol, args, kernel)
