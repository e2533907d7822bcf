"""LoopExperts: the expert half becomes one op that visits the experts one at a time.

Before: the two folded grouped matmuls (activation in the first, reduce in the second).
After:  expert_loop(x, gate_up, down, ids, weights[, biases]; top_k, weighted_input, act_...).
Why: the baseline schedule needs no sort and no per-row indices, only the ids.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import expert_loop, grouped_matmul, sort
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, grouped_matmul.OP) or not attributes(call).get("reduce"):
        return None
    second = grouped_matmul.OP.bind(call)
    inner = line.producer(second["x"], grouped_matmul.OP)
    order = line.producer(second["expert_offsets"], sort.OP)
    if inner is None or order is None:
        return None
    first, attrs = grouped_matmul.OP.bind(inner), attributes(inner)
    weighted_input = "topk_weights" in first
    weights = first["topk_weights"] if weighted_input else second["topk_weights"]
    kept = {k: v for k, v in attrs.items() if k.startswith("act_") or k in ("gated", "top_k")}
    if attributes(call).get("each"):
        kept["each"] = True
    return expert_loop.OP.call(
        [first["x"], first["weight"], second["weight"], sort.OP.bind(order)["topk_ids"], weights],
        {"gate_up_bias": first.get("bias"), "down_bias": second.get("bias")},
        weighted_input=weighted_input,
        **kept,
    )


LoopExperts = straight_pass("moec.LoopExperts", _rewrite)
