"""FoldGather: grouped_matmul(gather_rows(x, order)) reads the rows of x through `order` itself.

Before: rows = gather_rows(x, row_order); grouped_matmul(rows, w, offsets).
After:  grouped_matmul(x, w, offsets, row_order; gather=True, top_k=K).
Why: the gathered copy [S, H] is K times the size of x and is read exactly once.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import gather_rows, grouped_matmul
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, grouped_matmul.OP):
        return None
    args = grouped_matmul.OP.bind(call)
    gather = line.producer(args["x"], gather_rows.OP)
    if gather is None:
        return None
    source = gather_rows.OP.bind(gather)
    attrs = {k: v for k, v in attributes(call).items() if k != "extra"}
    extra = {k: args[k] for k in ("bias",) if k in args}
    extra["row_order"] = source["row_order"]
    if "topk_weights" in source:  # the routing weight multiplies the expert's input
        extra["topk_weights"] = source["topk_weights"]
    return grouped_matmul.OP.call(
        [source["x"], args["weight"], args["expert_offsets"]],
        extra,
        **attrs,
        gather=True,
        top_k=attributes(gather)["top_k"],
    )


FoldGather = straight_pass("moec.FoldGather", _rewrite)
