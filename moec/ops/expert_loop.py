"""moec.expert_loop: the whole expert half, one expert at a time."""

from __future__ import annotations

from typing import Any

from .define import Attrs, OpDef, Types, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, top_k = shape_of(types["topk_ids"])
    rows = tokens * top_k if attrs.get("each") else tokens
    return tensor([rows, shape_of(types["down"])[1]], "float32")


OP = OpDef(
    "expert_loop",
    __doc__,
    ("x", "gate_up", "down", "topk_ids", "topk_weights"),
    ("gate_up_bias", "down_bias"),
    _infer,
)
