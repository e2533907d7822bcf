"""moec.expert_loop: the whole expert half, one expert at a time."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, expect, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, hidden = expect("expert_loop", types, "x", "T", "H")
    experts, rows, _ = expect("expert_loop", types, "gate_up", "E", "N", hidden)
    width = simplify(tirx.floordiv(rows, 2)) if attrs["gated"] else rows
    expect("expert_loop", types, "down", experts, hidden, width)
    _, top_k = expect("expert_loop", types, "topk_ids", tokens, "K", dtype="int32")
    expect("expert_loop", types, "topk_weights", tokens, top_k, dtype="float32")
    for name, columns in (("gate_up_bias", rows), ("down_bias", hidden)):
        if name in types:
            expect("expert_loop", types, name, experts, columns)
    count = tokens * top_k if attrs.get("each") else tokens
    return tensor([count, hidden], "float32")


OP = OpDef(
    "expert_loop",
    __doc__,
    ("x", "gate_up", "down", "topk_ids", "topk_weights"),
    ("gate_up_bias", "down_bias"),
    _infer,
)
