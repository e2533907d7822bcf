"""FoldCombine: a combine with nothing to add becomes the rounding of the matmul before it.

Before: combine(matmul(..., reduce); dtype, scale), matmul grouped or indexed.
After:  matmul(..., reduce; dtype, out_scale).
Why: the routed sum [T, H] in float32 is then neither written nor read again.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import combine, grouped_matmul, indexed_matmul
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, combine.OP):
        return None
    args, own = combine.OP.bind(call), attributes(call)
    if len(args) > 1 or own.get("inner"):
        return None
    for op in (grouped_matmul.OP, indexed_matmul.OP):
        matmul = line.producer(args["routed"], op)
        if matmul is None or not attributes(matmul).get("reduce"):
            continue
        found = op.bind(matmul)
        attrs = {k: v for k, v in attributes(matmul).items() if k not in ("extra", "dtype")}
        extra = {k: found[k] for k in op.optional if k in found}
        operands = [found[k] for k in op.operands]
        return op.call(operands, extra, **attrs, dtype=own["dtype"], out_scale=own["scale"])
    return None


FoldCombine = straight_pass("moec.FoldCombine", _rewrite)
