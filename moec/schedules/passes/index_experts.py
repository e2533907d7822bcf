"""IndexExperts: folded grouped matmuls become indexed ones, and the sort disappears.

Before: order = sort(ids); grouped_matmul(x, w, offsets, order; gather) and
        grouped_matmul(h, w, offsets, order; reduce), as the folding passes leave them.
After:  indexed_matmul(x, w, ids; gather) and indexed_matmul(h, w, ids; reduce).
Why: with a handful of tokens each weight is read once whether rows are sorted or not, and
the sort is latency before the first weight byte.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import grouped_matmul, indexed_matmul, sort
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, grouped_matmul.OP):
        return None
    args, attrs = grouped_matmul.OP.bind(call), attributes(call)
    order = line.producer(args["expert_offsets"], sort.OP)
    if order is None or not (attrs.get("gather") or attrs.get("reduce")):
        return None
    attrs.pop("extra", None)
    extra: dict[str, Any] = {k: args[k] for k in ("topk_weights", "bias") if k in args}
    ids = sort.OP.bind(order)["topk_ids"]
    return indexed_matmul.OP.call([args["x"], args["weight"], ids], extra, **attrs)


IndexExperts = straight_pass("moec.IndexExperts", _rewrite)
