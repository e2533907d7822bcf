"""moec.gather_rows: the row of x behind every sorted (token, expert) pair."""

from __future__ import annotations

from typing import Any

from .define import Attrs, OpDef, Types, dtype_of, expect, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    top_k = int(attrs["top_k"])
    tokens, hidden = expect("gather_rows", types, "x", "T", "H")
    (rows,) = expect("gather_rows", types, "row_order", simplify(tokens * top_k), dtype="int32")
    if "topk_weights" in types:
        expect("gather_rows", types, "topk_weights", tokens, top_k, dtype="float32")
    return tensor([rows, hidden], dtype_of(types["x"]))


OP = OpDef("gather_rows", __doc__, ("x", "row_order"), ("topk_weights",), _infer)


def gather_rows(x: Any, row_order: Any, top_k: int, topk_weights: Any | None = None) -> Any:
    """x [T, H], row_order [S] -> rows [S, H]: x[row_order // K] (times the weight of the pair).

    With `topk_weights` [T, K] the routing weight multiplies the expert's input.
    """
    return OP.call([x, row_order], {"topk_weights": topk_weights}, top_k=top_k)
