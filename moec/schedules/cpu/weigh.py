"""The weights of the selected experts: source, renormalisation, scale, rounding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import Precision, Renorm, RouterSpec, ScaleOn, Selection, WeightSource
from .emit import Emit, f32
from .kernel import loop, scalar
from .stage import round_scalar


def weigh(em: Emit, b: SimpleNamespace, t: Any, spec: RouterSpec, dtype: str) -> None:
    """topk_weights[t] from the scores (in b.logits) of topk_ids[t].

    sparsemixer has written its weights already; for the other sources they are read here.
    """

    def weight(k: Any) -> Any:
        return tirx.BufferLoad(b.topk_weights, [t, k])

    def write(k: Any, value: Any) -> None:
        T.buffer_store(b.topk_weights, value, [t, k])

    if spec.weight_source is not WeightSource.SPARSEMIXER:
        with loop(spec.top_k) as k:
            value = em.bind(tirx.BufferLoad(b.logits, [t, _expert(b, t, k, spec)]))
            if spec.weight_source is WeightSource.SIGMOID_SELECTED:
                value = f32(1.0) / (f32(1.0) + T.exp(f32(0.0) - value))
            write(k, value)
    if spec.weight_source is WeightSource.SOFTMAX_SELECTED:
        _softmax(em, weight, write, spec.top_k)
    _renormalise(em, weight, write, spec)
    with loop(spec.top_k) as k:
        value = weight(k)
        if spec.scale != 1.0 and spec.scale_on is ScaleOn.WEIGHTS:
            value = value * f32(spec.scale)
        if spec.per_expert_scale:
            value = value * tirx.BufferLoad(b.per_expert_scale, [_expert(b, t, k, spec)])
        if spec.global_scale:
            value = value * tirx.BufferLoad(b.global_scale, [0])
        if spec.weights_dtype is Precision.MODEL:
            value = round_scalar(value, dtype)
        write(k, value)


def _expert(b: SimpleNamespace, t: Any, k: Any, spec: RouterSpec) -> Any:
    e = tirx.BufferLoad(b.topk_ids, [t, k])
    if spec.selection is Selection.TOKEN_TABLE:  # a table may hold anything
        e = tirx.Min(tirx.Max(e, tirx.const(0, "int32")), tirx.const(spec.num_experts - 1, "int32"))
    return tirx.Cast("int64", e)


def _softmax(em: Emit, weight: Any, write: Any, top_k: int) -> None:
    top = scalar("float32", f32(float("-inf")))
    with loop(top_k) as k:
        T.buffer_store(top, tirx.Max(tirx.BufferLoad(top, [0]), weight(k)), [0])
    total = scalar("float32", f32(0.0))
    with loop(top_k) as k:
        value = em.bind(T.exp(weight(k) - tirx.BufferLoad(top, [0])))
        T.buffer_store(total, tirx.BufferLoad(total, [0]) + value, [0])
        write(k, value)
    with loop(top_k) as k:
        write(k, weight(k) / tirx.BufferLoad(total, [0]))


def _renormalise(em: Emit, weight: Any, write: Any, spec: RouterSpec) -> None:
    if spec.renorm is Renorm.NONE:
        return
    total = scalar("float32", f32(0.0))
    with loop(spec.top_k) as k:
        term = weight(k)
        if spec.renorm is Renorm.P_NORM:
            term = T.pow(T.abs(term), f32(spec.renorm_p))
        T.buffer_store(total, tirx.BufferLoad(total, [0]) + term, [0])
    sum_ = em.bind(tirx.BufferLoad(total, [0]))
    if spec.renorm is Renorm.SUM:
        # The epsilon of the DeepSeek kin (1e-20) is far below float32 resolution unless the
        # sum itself is zero, which is exactly when it matters.
        sum_ = em.bind(sum_ + f32(spec.renorm_epsilon))
    elif spec.renorm is Renorm.CLAMPED_SUM:
        sum_ = em.bind(tirx.Max(sum_, f32(spec.renorm_epsilon)))
    else:
        sum_ = em.bind(T.pow(sum_, f32(1.0 / spec.renorm_p)))
    with loop(spec.top_k) as k:
        write(k, weight(k) / sum_)
