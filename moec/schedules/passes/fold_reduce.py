"""FoldReduce: the weighted sum over a token's experts moves into the second grouped matmul.

Before: reduce(grouped_matmul(h, down, offsets), row_order, topk_weights).
After:  grouped_matmul(h, down, offsets, row_order, topk_weights; reduce=True, top_k=K).
With an RMSNorm of the rows in between, the rows stay but in the order of their pairs:
        sum_rows(rms_norm(grouped_matmul(...; reduce=True, each=True)), topk_weights; top_k=K).
Why: the rows [S, H] in float32 are the largest intermediate of the layer; summed where they
are produced, only [T, H] is written. The sum keeps a fixed order (see ops/reduce.py).
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import grouped_matmul, reduce, rms_norm, sum_rows
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, reduce.OP):
        return None
    own = reduce.OP.bind(call)
    norm = line.producer(own["rows"], rms_norm.OP)
    rows = own["rows"] if norm is None else rms_norm.OP.bind(norm)["x"]
    matmul = line.producer(rows, grouped_matmul.OP)
    if matmul is None:
        return None
    args = grouped_matmul.OP.bind(matmul)
    attrs = {k: v for k, v in attributes(matmul).items() if k != "extra"}
    extra = {k: args[k] for k in ("bias",) if k in args}
    extra["row_order"] = own["row_order"]
    if "topk_weights" in own:
        extra["topk_weights"] = own["topk_weights"]
    top_k = attributes(call)["top_k"]
    operands = [args["x"], args["weight"], args["expert_offsets"]]
    folded = {**attrs, "reduce": True, "top_k": top_k}
    if norm is None:
        return grouped_matmul.OP.call(operands, extra, **folded)
    each = grouped_matmul.OP.call(operands, extra, **folded, each=True)
    normed = rms_norm.OP.bind(norm)
    kept = {k: v for k, v in attributes(norm).items() if k != "extra"}
    scaled = rms_norm.OP.call([each], {"weight": normed.get("weight")}, **kept)
    return sum_rows.OP.call([scaled], {"topk_weights": own.get("topk_weights")}, top_k=top_k)


FoldReduce = straight_pass("moec.FoldReduce", _rewrite)
