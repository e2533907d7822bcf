"""Families that transformers does not have: checkpoints by their published names.

The oracle is float64 NumPy, written from the published code of each model and sharing nothing
with moec. Sources: DeepSeek-MoE and Ling remote code, vLLM's step3_text.py, grok1.py and
arctic.py, mlx-lm's Klear.py and bailing_moe.py, MiniCPM-MoE remote code.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
Routing = tuple[Array, Array]
SIZES = {"a": (32, 16, 24, 8, 2), "b": (40, 24, 20, 12, 3)}  # H, I, F, E, K


@dataclass(frozen=True)
class Published:
    """One family: its config, its names, how it routes and how the parts are combined.

    `experts` are the names of gate, up and down, with {e} (or stacked, without); `shared` of
    the shared expert. `route(logits, tensors below the layer, config)` gives ids and weights;
    `combine(routed, shared, x, tensors)` the output.
    """

    config: Callable[[str], dict[str, Any]]
    layers: Callable[[str], list[int]]
    router: str
    experts: tuple[str, str, str]
    route: Callable[[Array, Tensors, dict[str, Any]], Routing]
    shared: tuple[str, str, str] | None = None
    shared_width: Callable[[str], int] = lambda v: SIZES[v][2]
    extra: dict[str, Callable[[str], tuple[int, ...]]] = field(default_factory=dict)
    combine: Callable[[Array, Array, Array, Tensors], Array] = lambda routed, shared, x, t: (
        routed + shared
    )
    act: Callable[[Array], Array] = lambda g: g * sigmoid(g)
    second_input: bool = False


def sigmoid(v: Array) -> Array:
    return 1.0 / (1.0 + np.exp(-v))


def softmax(v: Array) -> Array:
    e = np.exp(v - v.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def gelu(v: Array) -> Array:
    from math import erf

    return 0.5 * v * (1.0 + np.vectorize(erf)(v / np.sqrt(2.0)))


def largest(values: Array, k: int) -> Array:
    return np.argsort(-values, axis=1, kind="stable")[:, :k]


def pick(values: Array, ids: Array) -> Array:
    return np.take_along_axis(values, ids, 1)


def _base(v: str, **own: Any) -> dict[str, Any]:
    hidden, width, _, experts, k = SIZES[v]
    return {
        "hidden_size": hidden, "num_hidden_layers": 3, "num_experts_per_tok": k,
        "dtype": "float32", "moe_intermediate_size": width, "num_experts": experts, **own,
    }  # fmt: skip


def _without(config: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in config.items() if k not in names}


def _softmax_route(epsilon: float, norm: str) -> Callable[..., Routing]:
    def route(logits: Array, tensors: Tensors, config: dict[str, Any]) -> Routing:
        score = softmax(logits)
        ids = largest(score, config.get("num_experts_per_tok") or config["moe_top_k"])
        weights = pick(score, ids)
        if config.get(norm, norm == ""):
            weights = weights / (weights.sum(axis=1, keepdims=True) + epsilon)
        return ids, weights

    return route


def _bailing_route(logits: Array, tensors: Tensors, config: dict[str, Any]) -> Routing:
    if config["score_function"] == "softmax":
        ids, weights = _softmax_route(1e-20, "norm_topk_prob")(logits, tensors, config)
        return ids, weights * config["routed_scaling_factor"]
    score = sigmoid(logits)
    choice = score + tensors["mlp.gate.expert_bias"]
    groups, kept = config["n_group"], config["topk_group"]
    parts = choice.reshape(len(choice), groups, -1)
    worth = np.sort(parts, axis=2)[..., -2:].sum(axis=2)
    keep = np.zeros(worth.shape, bool)
    np.put_along_axis(keep, largest(worth, kept), True, 1)
    choice = np.where(np.repeat(keep, parts.shape[2], axis=1), choice, 0.0)
    ids = largest(choice, config["num_experts_per_tok"])
    weights = pick(score, ids)
    weights = weights / (weights.sum(axis=1, keepdims=True) + 1e-20)
    return ids, weights * config["routed_scaling_factor"]


def _klear_route(logits: Array, tensors: Tensors, config: dict[str, Any]) -> Routing:
    score = sigmoid(logits)
    ids = largest(score + tensors["mlp.expert_bias"], config["num_experts_per_tok"])
    weights = pick(score, ids)
    if config["norm_topk_prob"]:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return ids, weights


def _klear_combine(routed: Array, shared: Array, x: Array, tensors: Tensors) -> Array:
    c = softmax(x @ tensors["mlp.coefficient.weight"].T + tensors["mlp.coefficient.bias"])
    return c[:, :1] * routed + c[:, 1:] * shared


def _grok_route(logits: Array, tensors: Tensors, config: dict[str, Any]) -> Routing:
    cap = config.get("router_logit_softcapping", 30.0)
    return _softmax_route(0.0, "")(cap * np.tanh(logits / cap), tensors, config)


def _arctic_route(logits: Array, tensors: Tensors, config: dict[str, Any]) -> Routing:
    if config["num_experts_per_tok"] > 1:
        return _softmax_route(0.0, "")(logits, tensors, config)
    return _softmax_route(0.0, "never")(logits, tensors, config)


_PROJ = ("gate_proj", "up_proj", "down_proj")
_W = ("w1", "w3", "w2")


def _names(pattern: str, names: tuple[str, ...]) -> tuple[str, str, str]:
    gate, up, down = (pattern.replace("*", n) for n in names)
    return gate, up, down


FAMILIES: dict[str, Published] = {
    "deepseek": Published(
        lambda v: _without({
            **_base(v, model_type="deepseek", n_routed_experts=SIZES[v][3], n_shared_experts=2,
                    norm_topk_prob=v == "b", first_k_dense_replace=1, moe_layer_freq=1,
                    scoring_func="softmax", intermediate_size=48)}, "num_experts"),
        lambda v: [1, 2],
        "mlp.gate.weight",
        _names("mlp.experts.{e}.*.weight", _PROJ),
        _softmax_route(1e-20, "norm_topk_prob"),
        _names("mlp.shared_experts.*.weight", _PROJ),
        lambda v: 2 * SIZES[v][1],
    ),
    "bailing_moe": Published(
        lambda v: _base(
            v, model_type="bailing_moe" if v == "a" else "bailing_moe_v2", num_shared_experts=1,
            norm_topk_prob=True, first_k_dense_replace=int(v == "b"), intermediate_size=48,
            score_function="softmax" if v == "a" else "sigmoid",
            moe_router_enable_expert_bias=v == "b", routed_scaling_factor=1.0 if v == "a" else 2.5,
            **({} if v == "a" else {"n_group": 4, "topk_group": 2})),
        lambda v: [0, 1, 2] if v == "a" else [1, 2],
        "mlp.gate.weight",
        _names("mlp.experts.{e}.*.weight", _PROJ),
        _bailing_route,
        _names("mlp.shared_experts.*.weight", _PROJ),
        lambda v: SIZES[v][1],
        {"mlp.gate.expert_bias": lambda v: (SIZES[v][3],) if v == "b" else ()},
    ),
    "step3_text": Published(
        lambda v: _without({
            **_base(v, model_type="step3_text", moe_num_experts=SIZES[v][3], moe_top_k=SIZES[v][4],
                    share_expert_dim=SIZES[v][2], norm_expert_weight=v == "a",
                    intermediate_size=48),
            **({"moe_layers_enum": "0,2"} if v == "b" else {})},
            "num_experts", "num_experts_per_tok"),
        lambda v: [1, 2] if v == "a" else [0, 2],
        "moe.gate.weight",
        _names("moe.*.weight", _PROJ),
        _softmax_route(0.0, "norm_expert_weight"),
        _names("share_expert.*.weight", _PROJ),
    ),
    "grok_1": Published(
        lambda v: _without({
            **_base(v, model_type="grok-1", intermediate_size=SIZES[v][1], hidden_act="gelu"),
            **({"router_logit_softcapping": 1.5} if v == "b" else {})}, "moe_intermediate_size"),
        lambda v: [0, 1, 2],
        "moe_block.gate.weight",
        _names("moe_block.experts.{e}.*.weight", ("linear", "linear_v", "linear_1")),
        _grok_route,
        act=gelu,
    ),
    "arctic": Published(
        lambda v: _without({
            **_base(v, model_type="arctic", num_local_experts=SIZES[v][3],
                    intermediate_size=SIZES[v][1], moe_layer_frequency=2 if v == "a" else 1,
                    parallel_attn_mlp_res=True, use_residual=True),
            "num_experts_per_tok": 2 if v == "a" else 1},
            "num_experts", "moe_intermediate_size"),
        lambda v: [1] if v == "a" else [0, 1, 2],
        "block_sparse_moe.gate.weight",
        _names("block_sparse_moe.experts.{e}.*.weight", _W),
        _arctic_route,
        _names("residual_mlp.*.weight", _W),
        lambda v: SIZES[v][0],
        second_input=True,
    ),
    "klear": Published(
        lambda v: _base(v, model_type="Klear", n_shared_experts=1 if v == "a" else 2,
                        norm_topk_prob=v == "a", intermediate_size=48,
                        mlp_only_layers=[0] if v == "a" else [], decoder_sparse_step=1),
        lambda v: [1, 2] if v == "a" else [0, 1, 2],
        "mlp.gate.weight",
        _names("mlp.experts.{e}.*.weight", _PROJ),
        _klear_route,
        _names("mlp.shared_experts.*.weight", _PROJ),
        lambda v: SIZES[v][1] * (1 if v == "a" else 2),
        {"mlp.expert_bias": lambda v: (SIZES[v][3],),
         "mlp.coefficient.weight": lambda v: (2, SIZES[v][0]),
         "mlp.coefficient.bias": lambda v: (2,)},
        _klear_combine,
    ),
    "minicpm": Published(
        lambda v: _without({**_base(v, model_type="minicpm", intermediate_size=SIZES[v][1])},
                           "moe_intermediate_size"),
        lambda v: [0, 1, 2],
        "mlp.gate.weight",
        _names("mlp.experts.{e}.*.weight", _W),
        _softmax_route(0.0, ""),
    ),
}  # fmt: skip


def write(family: str, variant: str, path: Path) -> tuple[list[int], int, Any]:
    """Write a checkpoint of random weights: its MoE layers, its hidden size, its oracle."""
    one, (hidden, width, _, experts, _) = FAMILIES[family], SIZES[variant]
    random = np.random.default_rng(sum(map(ord, family + variant)))
    config, layers = one.config(variant), one.layers(variant)
    held: dict[int, Tensors] = {}
    for layer in layers:
        own = held[layer] = {one.router: random.normal(size=(experts, hidden)) * 2 / hidden**0.5}
        shapes = [(width, hidden), (width, hidden), (hidden, width)]
        for name, shape in zip(one.experts, shapes, strict=True):
            if "{e}" in name:
                for e in range(experts):
                    own[name.replace("{e}", str(e))] = random.normal(size=shape) * 0.3
            else:
                own[name] = random.normal(size=(experts, *shape)) * 0.3
        if one.shared is not None:
            wide = one.shared_width(variant)
            shapes = [(wide, hidden), (wide, hidden), (hidden, wide)]
            for name, shape in zip(one.shared, shapes, strict=True):
                own[name] = random.normal(size=shape) * 0.3
        for name, sized in one.extra.items():
            if sized(variant):
                own[name] = random.normal(size=sized(variant)) * 0.4
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(config))
    held = {n: {k: v.astype(np.float32) for k, v in own.items()} for n, own in held.items()}
    flat = {f"model.layers.{n}.{k}": v for n, own in held.items() for k, v in own.items()}
    save_file(flat, path / "model.safetensors")

    def run(layer: int, x: Array, _: Array, shared_x: Array) -> tuple[Array, Array, Array]:
        wide = {k: v.astype(np.float64) for k, v in held[layer].items()}
        second = shared_x if one.second_input else x
        return _block(one, wide, config, x.astype(np.float64), second.astype(np.float64))

    return layers, hidden, run


def _block(
    one: Published, tensors: Tensors, config: dict[str, Any], x: Array, second: Array
) -> tuple[Array, Array, Array]:
    ids, weights = one.route(x @ tensors[one.router].T, tensors, config)

    def expert(rows: Array, names: tuple[str, ...], e: int) -> Array:
        gate, up, down = (
            tensors[n.replace("{e}", str(e))] if "{e}" in n else tensors[n] for n in names
        )
        if gate.ndim == 3:
            gate, up, down = gate[e], up[e], down[e]
        return (one.act(rows @ gate.T) * (rows @ up.T)) @ down.T

    routed = np.zeros(x.shape)
    for t, k in np.ndindex(ids.shape):
        routed[t] += weights[t, k] * expert(x[t : t + 1], one.experts, int(ids[t, k]))[0]
    if one.shared is None:
        return routed, ids, weights
    shared = expert(second, one.shared, 0)
    return one.combine(routed, shared, x, tensors), ids, weights
