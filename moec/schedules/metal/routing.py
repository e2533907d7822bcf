"""Kernels of the routing: router logits to ids and weights, and the counting sort of pairs."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from ...spec import Precision, RouterSpec
from ..buffers import Buf, Kernel, PerToken
from .kernel import Stage, build, ceil_div
from .source import router

# A token's scores, choices and group scores are in threadgroup memory: 3 E + 128 floats.
MAX_EXPERTS = 2048
_SIZES = (128, 512, MAX_EXPERTS)
_NUMPY = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def route(symbol: str, spec: RouterSpec, dtype: str) -> Kernel:
    """logits [T, E] float32 -> topk_ids [T, K] int32, topk_weights [T, K] float32.

    `dtype` is the model's dtype (Precision.MODEL).
    """
    present = {
        "selection_bias": spec.selection_bias,
        "per_expert_scale": spec.per_expert_scale,
    }
    args = (
        Buf("logits", (PerToken(), spec.num_experts), "float32"),
        *(Buf(n, (spec.num_experts,), "float32") for n, there in present.items() if there),
        Buf("topk_ids", (PerToken(), spec.top_k), "int32", True),
        Buf("topk_weights", (PerToken(), spec.top_k), "float32", True),
    )
    logits = dtype if spec.logits_dtype is Precision.MODEL else "float32"
    threshold = float(np.asarray(2.0 * spec.sparsemixer_eps).astype(_NUMPY[logits]))
    room = next(size for size in _SIZES if size >= spec.num_experts)
    stage = Stage(
        ("route",), router(spec, dtype, threshold),
        "moec::route_token<Router>(logits, selection_bias, per_expert_scale, topk_ids, "
        "topk_weights, experts, top_k, groups, kept, scratch, bx, tid);",
        lambda t, c: (t,), 32, (3 * room + 128) // 4,
        tuple(name for name, there in present.items() if not there),
    )  # fmt: skip
    groups = spec.groups
    constants = {
        "experts": spec.num_experts,
        "top_k": spec.top_k,
        "groups": groups.count if groups else 0,
        "kept": groups.kept if groups else 0,
    }
    return build(symbol, args, len(args) - 2, constants, [stage])


def sort(symbol: str, experts: int, top_k: int) -> Kernel:
    """topk_ids [T, K] -> row_order [S], expert_offsets [E+1].

    Pairs of one expert keep their order. Ids outside [0, E) sort behind expert_offsets[E].
    """
    args = (
        Buf("topk_ids", (PerToken(top_k),), "int32", True),
        Buf("row_order", (PerToken(top_k),), "int32"),
        Buf("expert_offsets", (experts + 1,), "int32"),
    )
    stage = Stage(
        ("sort",), "",
        "moec::sort_pairs(topk_ids, row_order, expert_offsets, experts, tokens * top_k, scratch, "
        "bx, tid);",
        lambda t, c: (ceil_div(c.experts + 1, 8),), 256, 256,
    )  # fmt: skip
    return build(symbol, args, 1, {"experts": experts, "top_k": top_k}, [stage])
