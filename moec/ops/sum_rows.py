"""moec.sum_rows: the weighted sum of each token's K rows, which lie together (unsorted).

What becomes of moec.reduce when something stands between the second matmul and the sum, so
that the rows must exist. Float32, in the order of k.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, shape_of, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    rows, width = shape_of(types["rows"])
    return tensor([simplify(tirx.floordiv(rows, int(attrs["top_k"]))), width], "float32")


OP = OpDef("sum_rows", __doc__, ("rows",), ("topk_weights",), _infer)
