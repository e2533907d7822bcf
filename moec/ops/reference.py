"""What a block means: the functions of a block in float64 NumPy, from canonical parameters.

Independent of the graph and of every schedule: written from the definitions in `spec`, for
quickstart and tests. Roundings to the model's dtype that a router applies (Precision.MODEL)
are applied, because they decide which experts are chosen; all else is exact to float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ..spec import (
    ActivationSpec,
    ApplyTo,
    Clamp,
    GroupScore,
    Masked,
    MoESpec,
    Nonlinearity,
    NormSpec,
    Precision,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    SharedGate,
    WeightSource,
)

Array = np.ndarray[Any, np.dtype[Any]]
Parameters = Mapping[str, Array]

_DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def route(
    spec: MoESpec, parameters: Parameters, x: Array, token_ids: Array | None = None
) -> tuple[Array, Array]:
    """x [T, H] -> (topk_ids int32 [T, K], topk_weights float64 [T, K]).

    Among equal values the lowest expert id is chosen. `token_ids` [T] is needed for a token
    table.
    """
    router = spec.router
    x = _norm(spec, parameters, "router_input", x)
    logits = x.astype(np.float64) @ parameters["router"].astype(np.float64).T
    if router.logit_bias:
        logits = logits + parameters["router_bias"].astype(np.float64)
    precision = spec.dtype if router.logits_dtype is Precision.MODEL else "float32"
    logits = _round(logits, precision)
    if router.logit_scale != 1.0:
        logits = _round(logits * router.logit_scale, precision)
    if router.logit_cap is not None:
        logits = _round(router.logit_cap * np.tanh(logits / router.logit_cap), precision)
    if router.selection is Selection.SPARSEMIXER:
        ids, weights = _sparsemixer(router, logits, precision)
    else:
        score = _score(router, logits)
        if router.selection is Selection.TOKEN_TABLE:
            assert token_ids is not None
            ids = parameters["token_table"][token_ids].astype(np.int64)
        else:
            ids = _select(router, score[:, : router.selectable], parameters)
        always = np.arange(router.selectable, router.num_experts)
        ids = np.concatenate([ids, np.broadcast_to(always, (len(ids), router.always))], axis=1)
        weights = _weights(router, np.take_along_axis(score, ids, 1))
    weights = _finish(router, weights, ids, parameters)
    if router.weights_dtype is Precision.MODEL:
        weights = _round(weights, spec.dtype)
    return ids.astype(np.int32), weights


def experts(spec: MoESpec, parameters: Parameters, x: Array, ids: Array, weights: Array) -> Array:
    """The routed sum [T, H] in float64; repeated ids add up.

    Ids of zero experts pass x; ids outside all of them contribute 0.
    """
    gate_up, down = parameters["gate_up"], parameters["down"]
    own, given = spec.experts, x.astype(np.float64)
    if own.latent_size is not None:
        x = given @ parameters["latent_in"].astype(np.float64).T
        x = _norm(spec, parameters, "latent_input", x)
    out: Array = np.zeros((len(x), own.width), np.float64)
    for e in range(own.num_experts):
        tokens, slots = np.nonzero(ids == e)
        if not tokens.size:
            continue
        weight = weights[tokens, slots][:, None].astype(np.float64)
        rows = x[tokens].astype(np.float64)
        if spec.router.apply_to is ApplyTo.INPUT:
            rows, weight = rows * weight, np.float64(1.0)
        h = rows @ gate_up[e].astype(np.float64).T
        if own.gate_up_bias:
            h = h + parameters["gate_up_bias"][e].astype(np.float64)
        h = activation(own.activation, h, own.gated) @ down[e].astype(np.float64).T
        if own.down_bias:
            h = h + parameters["down_bias"][e].astype(np.float64)
        h = _norm(spec, parameters, "expert_output", h)
        np.add.at(out, tokens, weight * h)
    if own.latent_size is not None:
        out = out @ parameters["latent_out"].astype(np.float64).T
    zero = (ids >= own.num_experts) & (ids < own.num_experts + own.zero_experts)
    out = out + np.where(zero, weights, 0.0).sum(axis=1, keepdims=True) * given
    if spec.router.scale_on is ScaleOn.ROUTED_SUM:
        out = out * spec.router.scale
    return out


def moe(
    spec: MoESpec,
    parameters: Parameters,
    x: Array,
    routing: tuple[Array, Array] | None = None,
    token_ids: Array | None = None,
    shared_x: Array | None = None,
) -> Array:
    """The whole block [T, H] in float64; `routing` replaces what `route` would choose.

    `token_ids` [T] and `shared_x` [T, H] are needed by the few blocks that read them.
    """
    ids, weights = routing if routing is not None else route(spec, parameters, x, token_ids)
    inner = _norm(spec, parameters, "experts_input", x)
    total = _norm(
        spec, parameters, "experts_output", experts(spec, parameters, inner, ids, weights)
    )
    if spec.shared is not None:
        total = _add_shared(spec, parameters, total, x, shared_x)
    total = _norm(spec, parameters, "block_output", total)
    if spec.output_bias:
        total = total + parameters["output_bias"].astype(np.float64)
    return total + x.astype(np.float64) if spec.norms.residual else total


def _add_shared(
    spec: MoESpec, parameters: Parameters, routed: Array, x: Array, shared_x: Array | None
) -> Array:
    shared = spec.shared
    assert shared is not None
    inner = shared_x if shared.own_input else x
    assert inner is not None
    inner = _norm(spec, parameters, "shared_input", inner).astype(np.float64)
    h = inner @ parameters["shared_gate_up"].astype(np.float64).T
    h = activation(shared.activation, h, shared.gated)
    out = h @ parameters["shared_down"].astype(np.float64).T
    out = _norm(spec, parameters, "shared_output", out) * shared.scale
    if shared.gate is SharedGate.NONE:
        return routed + out
    gate = x.astype(np.float64) @ parameters["shared_router"].astype(np.float64).T
    if shared.gate is SharedGate.SIGMOID:
        return routed + out * _sigmoid(gate)
    share = _softmax(gate + parameters["shared_router_bias"].astype(np.float64))
    return routed * share[:, :1] + out * share[:, 1:]


def activation(spec: ActivationSpec, h: Array, gated: bool) -> Array:
    """act(gate) * (up + offset) of rows [gate | up], or act of the whole row without gate."""
    gate, up = (h[:, : h.shape[1] // 2], h[:, h.shape[1] // 2 :]) if gated else (h, None)
    if spec.clamp is Clamp.BEFORE:
        gate = np.minimum(gate, spec.limit)
    value = _nonlinearity(spec, gate)
    if spec.clamp is Clamp.AFTER:
        value = np.minimum(value, spec.limit)
    if up is None:
        return value
    if spec.clamp is not Clamp.NONE:
        up = np.clip(up, -spec.limit, spec.limit)
    if spec.up_cap is not None:
        up = spec.up_cap * np.tanh(up / spec.up_cap)
    return value * (up + spec.up_offset)


_erf = np.vectorize(math.erf, otypes=[np.float64])


def _nonlinearity(spec: ActivationSpec, g: Array) -> Array:
    if spec.kind is Nonlinearity.SILU:
        cap = spec.gate_cap
        linear: Array = g if cap is None else cap * np.tanh(g / cap)
        out: Array = linear * _sigmoid(spec.alpha * g)
        return out
    if spec.kind is Nonlinearity.GELU_ERF:
        exact: Array = 0.5 * g * (1.0 + _erf(g / math.sqrt(2.0)))
        return exact
    if spec.kind is Nonlinearity.GELU_TANH:
        inner = math.sqrt(2.0 / math.pi) * (g + 0.044715 * g**3)
        return 0.5 * g * (1.0 + np.tanh(inner))
    positive: Array = np.maximum(g, 0.0)
    return positive if spec.kind is Nonlinearity.RELU else positive**2


def _sigmoid(v: Array) -> Array:
    with np.errstate(over="ignore"):  # e^-v = inf gives the right 0
        return 1.0 / (1.0 + np.exp(-v))


def _round(values: Array, dtype: str) -> Array:
    return values.astype(np.float32).astype(_DTYPES[dtype]).astype(np.float64)


def _norm(spec: MoESpec, parameters: Parameters, position: str, x: Array) -> Array:
    norm: NormSpec | None = getattr(spec.norms, position)
    if norm is None:
        return x
    wide = x.astype(np.float64)
    vector: Array = np.ones(1)
    if norm.weighted:
        vector = parameters[f"norm_{position}"].astype(np.float64) + norm.offset
    if norm.vector_first:
        wide, vector = wide * vector, np.ones(1)
    out: Array = wide / np.sqrt((wide**2).mean(axis=1, keepdims=True) + norm.eps)
    out = out * vector * norm.scale
    return out


def _score(router: RouterSpec, logits: Array) -> Array:
    if router.score is Score.SOFTMAX:
        return _softmax(logits)
    if router.score is Score.SIGMOID:
        return _sigmoid(logits)
    if router.score is Score.SQRT_SOFTPLUS:
        root: Array = np.sqrt(np.logaddexp(logits, 0.0))
        return root
    return logits


def _softmax(values: Array) -> Array:
    top: Array = np.exp(values - values.max(axis=1, keepdims=True, initial=-np.inf))
    top = top / top.sum(axis=1, keepdims=True)
    return top


def _select(router: RouterSpec, score: Array, parameters: Parameters) -> Array:
    choice = score
    if router.selection_bias:
        choice = score + parameters["selection_bias"].astype(np.float64)
    if router.groups is not None:
        groups = router.groups
        ranked = choice if groups.biased else score
        size = router.selectable // groups.count
        parts = np.sort(ranked.reshape(len(score), groups.count, size), axis=2)
        value = parts[..., -1]
        if groups.score is GroupScore.SUM_TOP2:
            value = value + parts[..., -2]
        kept = np.zeros(value.shape, bool)
        np.put_along_axis(kept, _best(value, groups.kept), True, 1)
        mask = np.repeat(kept, size, axis=1)
        choice = np.where(mask, choice, -np.inf if groups.masked is Masked.MINUS_INF else 0.0)
    return _best(choice, router.selected)


def _best(values: Array, count: int) -> Array:
    """The indices of the largest values, lowest index first among equals."""
    return np.argsort(-values, axis=1, kind="stable")[:, :count]


def _weights(router: RouterSpec, selected: Array) -> Array:
    if router.weight_source is WeightSource.SOFTMAX_SELECTED:
        return _softmax(selected)
    if router.weight_source is WeightSource.SIGMOID_SELECTED:
        return _sigmoid(selected)
    return selected


def _finish(router: RouterSpec, weights: Array, ids: Array, parameters: Parameters) -> Array:
    if router.renorm is Renorm.SUM:
        weights = weights / (weights.sum(axis=1, keepdims=True) + router.renorm_epsilon)
    elif router.renorm is Renorm.CLAMPED_SUM:
        total = weights.sum(axis=1, keepdims=True)
        weights = weights / np.maximum(total, router.renorm_epsilon)
    elif router.renorm is Renorm.P_NORM:
        powers = (np.abs(weights) ** router.renorm_p).sum(axis=1, keepdims=True)
        weights = weights / powers ** (1.0 / router.renorm_p)
    if router.scale_on is ScaleOn.WEIGHTS:
        weights = weights * router.scale
    if router.global_scale:
        weights = weights * parameters["global_scale"].astype(np.float64)
    if router.per_expert_scale:
        weights = weights * parameters["per_expert_scale"].astype(np.float64)[ids]
    return weights


def _sparsemixer(router: RouterSpec, logits: Array, precision: str) -> tuple[Array, Array]:
    """Two rounds of arXiv 2409.12136 at inference, with the roundings of the published code."""
    threshold = _round(np.asarray(2.0 * router.sparsemixer_eps), precision)
    taken = np.zeros(logits.shape, bool)
    ids, weights, rows = [], [], np.arange(len(logits))
    for _ in range(2):
        left = np.where(taken, -np.inf, logits)
        best = left.argmax(axis=1) if len(left) else np.zeros(0, np.int64)
        top = left[rows, best][:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = np.maximum(np.abs(logits), top)
            gap = _round(_round(top - logits, precision) / factor, precision)
        near = ~taken & ~(gap > threshold)
        share = np.where(near, np.exp(logits - top), 0.0).sum(axis=1)
        ids.append(best)
        weights.append(_round(1.0 / share, precision))
        taken[rows, best] = True
    return np.stack(ids, 1), np.stack(weights, 1)
