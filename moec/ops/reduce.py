"""moec.reduce: the weighted sum of the K rows of each token, in float32.

Bitwise deterministic: the order of the sum is fixed by the lowering (ascending expert id or
ascending k), never by the number of threads or the other tokens.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, expect, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    top_k = int(attrs["top_k"])
    rows, width = expect("reduce", types, "rows", "S", "H")
    expect("reduce", types, "row_order", rows, dtype="int32")
    tokens = simplify(tirx.floordiv(rows, top_k))
    if "topk_weights" in types:
        expect("reduce", types, "topk_weights", tokens, top_k, dtype="float32")
    return tensor([tokens, width], "float32")


OP = OpDef("reduce", __doc__, ("rows", "row_order"), ("topk_weights",), _infer)


def reduce(rows: Any, row_order: Any, top_k: int, topk_weights: Any | None) -> Any:
    """rows [S, H] in sorted order, row_order [S], topk_weights [T, K] -> [T, H] float32.

    Without `topk_weights` the rows are summed as they are (weights went into the input).
    """
    return OP.call([rows, row_order], {"topk_weights": topk_weights}, top_k=top_k)
