"""moec.sum_rows: the weighted sum of each token's K rows, which lie together (unsorted).

What becomes of moec.reduce when something stands between the second matmul and the sum, so
that the rows must exist. Float32, in the order of k.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, expect, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    rows, width = expect("sum_rows", types, "rows", "S", "H", dtype="float32")
    top_k = int(attrs["top_k"])
    tokens = simplify(tirx.floordiv(rows, top_k))
    if "topk_weights" in types:
        expect("sum_rows", types, "topk_weights", tokens, top_k, dtype="float32")
    return tensor([tokens, width], "float32")


OP = OpDef("sum_rows", __doc__, ("rows",), ("topk_weights",), _infer)
