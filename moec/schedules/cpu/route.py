"""From router logits to topk_ids and topk_weights: every variant of RouterSpec, one token a row.

The order of operations and the roundings are those of `ops.reference.route`. Among equal
values the lowest expert id wins. Ids are always in [0, E), whatever the logits hold.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import GroupScore, Masked, Precision, RouterSpec, Score, Selection
from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, f32, i64, round_up
from .isa import Isa
from .kernel import build, chunk, loop, scalar, when
from .sparsemixer import sparsemixer
from .topk import argmax, take
from .weigh import weigh

MINUS_INF = float("-inf")


def route(symbol: str, isa: Isa, spec: RouterSpec, dtype: str, columns: int) -> Kernel:
    """logits [T, columns] f32 -> topk_ids [T, K] int32, topk_weights [T, K] f32.

    `logits` holds E values a row (and padding) and is overwritten with the scores; `choice`
    and `group_score` are scratch. `dtype` is the model's dtype (Precision.MODEL).
    """
    width = round_up(spec.num_experts, isa.lanes)
    groups = round_up(spec.groups.count if spec.groups else 1, isa.lanes)
    args = [Buf("logits", (PerToken(), columns), "float32")]
    if spec.selection_bias:
        args.append(Buf("selection_bias", (spec.selectable,), "float32"))
    if spec.per_expert_scale:
        args.append(Buf("per_expert_scale", (spec.num_experts,), "float32"))
    if spec.global_scale:
        args.append(Buf("global_scale", (1,), "float32"))
    if spec.selection is Selection.TOKEN_TABLE:
        args.append(Buf("token_ids", (PerToken(),), "int32", True))
        args.append(Buf("token_table", (spec.vocab_size, spec.top_k), "int32"))
    args += [
        Buf("topk_ids", (PerToken(), spec.top_k), "int32", True),
        Buf("topk_weights", (PerToken(), spec.top_k), "float32", True),
        Buf("choice", (PerToken(), width), "float32"),
        Buf("group_score", (PerToken(), groups), "float32"),
    ]
    logits_dtype = dtype if spec.logits_dtype is Precision.MODEL else "float32"

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            _logits(em, b.logits, t, width, spec, logits_dtype)
            if spec.selection is Selection.SPARSEMIXER:
                sparsemixer(em, b, t, spec, logits_dtype)
            else:
                _score(em, b.logits, t, width, spec)
                if spec.selection is Selection.TOKEN_TABLE:
                    _look_up(em, b, t, spec)
                else:
                    _select(em, b, t, width, groups, spec)
            weigh(em, b, t, spec, dtype)

    return build(symbol, isa, tuple(args), body)


def _select(
    em: Emit, b: SimpleNamespace, t: Any, width: int, groups: int, spec: RouterSpec
) -> None:
    """The best of the selectable experts, then the experts that every token passes."""
    _choice(em, b, t, width, spec)
    if spec.groups is not None:
        _groups(em, b, t, groups, spec)
    with loop(spec.selected) as k:
        best = argmax(em, b.choice, t, width, spec.selectable)
        take(b.choice, t, best)
        T.buffer_store(b.topk_ids, tirx.Cast("int32", best), [t, k])
    for k in range(spec.always):
        last = tirx.const(spec.selectable + k, "int32")
        T.buffer_store(b.topk_ids, last, [t, i64(spec.selected + k)])


def _look_up(em: Emit, b: SimpleNamespace, t: Any, spec: RouterSpec) -> None:
    """The table's row of the input token; a token outside the table gets ids of -1."""
    token = em.bind(tirx.BufferLoad(b.token_ids, [t]))
    inside = tirx.And(token >= tirx.const(0, "int32"), token < tirx.const(spec.vocab_size, "int32"))
    row = em.bind(tirx.Cast("int64", tirx.Select(inside, token, tirx.const(0, "int32"))))
    with loop(spec.top_k) as k:
        entry = tirx.BufferLoad(b.token_table, [row, k])
        T.buffer_store(b.topk_ids, tirx.Select(inside, entry, tirx.const(-1, "int32")), [t, k])


def _logits(em: Emit, logits: Any, t: Any, width: int, spec: RouterSpec, dtype: str) -> None:
    """Scale, cap and round the logits in place; padding lanes become -inf."""
    with loop(width // em.lanes) as c:
        value = em.load(logits, [t, c * em.lanes], "float32")
        value = em.round_to(value, dtype)
        if spec.logit_scale != 1.0:
            value = em.round_to(value * em.splat(spec.logit_scale), dtype)
        if spec.logit_cap is not None:
            value = em.round_to(em.soft_cap(value, spec.logit_cap), dtype)
        em.store(logits, value, [t, c * em.lanes], "float32")
    for e in range(spec.num_experts, width):
        T.buffer_store(logits, f32(MINUS_INF), [t, i64(e)])


def _score(em: Emit, logits: Any, t: Any, width: int, spec: RouterSpec) -> None:
    """The score function over all experts, in place."""
    vectors = width // em.lanes
    if spec.score is Score.SOFTMAX:
        top = T.alloc_buffer((1,), em.f32v)
        T.buffer_store(top, em.splat(MINUS_INF), [0])
        with loop(vectors) as c:
            value = em.load(logits, [t, c * em.lanes], "float32")
            T.buffer_store(top, tirx.Max(tirx.BufferLoad(top, [0]), value), [0])
        best = em.bind(tirx.Broadcast(em.reduce_max(tirx.BufferLoad(top, [0])), em.lanes))
        total = T.alloc_buffer((1,), em.f32v)
        T.buffer_store(total, em.splat(0.0), [0])
        with loop(vectors) as c:
            value = em.exp(em.load(logits, [t, c * em.lanes], "float32") - best)
            T.buffer_store(total, tirx.BufferLoad(total, [0]) + value, [0])
            em.store(logits, value, [t, c * em.lanes], "float32")
        lanes_sum = em.reduce_add(tirx.BufferLoad(total, [0]))
        scale = em.bind(tirx.Broadcast(lanes_sum, em.lanes))
        with loop(vectors) as c:
            value = em.load(logits, [t, c * em.lanes], "float32") / scale
            em.store(logits, value, [t, c * em.lanes], "float32")
    elif spec.score is Score.SIGMOID:
        with loop(vectors) as c:
            value = em.sigmoid(em.load(logits, [t, c * em.lanes], "float32"))
            em.store(logits, value, [t, c * em.lanes], "float32")
    elif spec.score is Score.SQRT_SOFTPLUS:
        with loop(spec.num_experts) as e:
            value = em.bind(tirx.BufferLoad(logits, [t, e]))
            # softplus(v) = max(v, 0) + log1p(e^-|v|): neither side overflows
            soft = tirx.Max(value, f32(0.0)) + T.log1p(T.exp(f32(0.0) - T.abs(value)))
            T.buffer_store(logits, T.sqrt(soft), [t, e])


def _choice(em: Emit, b: SimpleNamespace, t: Any, width: int, spec: RouterSpec) -> None:
    """choice = score (+ selection bias); what cannot be selected is -inf."""
    full = spec.selectable // em.lanes
    with loop(full) as c:
        value = em.load(b.logits, [t, c * em.lanes], "float32")
        if spec.selection_bias:
            value = value + em.load(b.selection_bias, [c * em.lanes], "float32")
        em.store(b.choice, value, [t, c * em.lanes], "float32")
    for e in range(full * em.lanes, spec.selectable):
        value = tirx.BufferLoad(b.logits, [t, i64(e)])
        if spec.selection_bias:
            value = value + tirx.BufferLoad(b.selection_bias, [i64(e)])
        T.buffer_store(b.choice, value, [t, i64(e)])
    for e in range(spec.selectable, width):
        T.buffer_store(b.choice, f32(MINUS_INF), [t, i64(e)])


def _groups(em: Emit, b: SimpleNamespace, t: Any, width: int, spec: RouterSpec) -> None:
    """Score the groups, keep the best, and mask the experts of the others in `choice`."""
    groups = spec.groups
    assert groups is not None
    size = spec.selectable // groups.count
    values = b.choice if groups.biased else b.logits
    for g in range(groups.count, width):
        T.buffer_store(b.group_score, f32(MINUS_INF), [t, i64(g)])
    with loop(groups.count) as g:
        first, second = scalar("float32", f32(MINUS_INF)), scalar("float32", f32(MINUS_INF))
        with loop(size) as j:
            value = em.bind(tirx.BufferLoad(values, [t, g * size + j]))
            top = em.bind(tirx.BufferLoad(first, [0]))
            T.buffer_store(first, tirx.Max(top, value), [0])
            runner = tirx.Max(tirx.BufferLoad(second, [0]), tirx.Min(top, value))
            T.buffer_store(second, runner, [0])
        total = tirx.BufferLoad(first, [0])
        if groups.score is GroupScore.SUM_TOP2:
            total = total + tirx.BufferLoad(second, [0])
        T.buffer_store(b.group_score, total, [t, g])
    # A kept group is marked by +inf, so that one pass can mask all the others.
    with loop(groups.kept):
        best = argmax(em, b.group_score, t, width, groups.count, below=float("inf"))
        T.buffer_store(b.group_score, f32(float("inf")), [t, best])
    masked = f32(MINUS_INF if groups.masked is Masked.MINUS_INF else 0.0)
    with loop(groups.count) as g:
        kept = tirx.BufferLoad(b.group_score, [t, g])
        with when(kept < f32(float("inf"))), loop(size) as j:
            T.buffer_store(b.choice, masked, [t, g * size + j])
