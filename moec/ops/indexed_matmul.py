"""moec.indexed_matmul: each (token, expert) pair times the weight that its id names, unsorted."""

from __future__ import annotations

from typing import Any

from .define import Attrs, OpDef, Types, shape_of
from .grouped_matmul import result_type


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, top_k = shape_of(types["topk_ids"])
    return result_type("indexed_matmul", types, attrs, tokens * top_k)


OP = OpDef("indexed_matmul", __doc__, ("x", "weight", "topk_ids"), ("topk_weights", "bias"), _infer)
