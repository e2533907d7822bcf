"""FoldActivation: the activation after a matmul moves into its epilogue.

Before: activation(grouped_matmul(...)) or activation(linear(...)).
After:  grouped_matmul(...; activation=True, act_...) / linear(...; activation=True, act_...).
Why: gate and up of one column are computed together, so [S, 2I] never reaches memory.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from ...ops import activation, grouped_matmul, linear
from ...ops.define import attributes, is_call
from .straight import Line, straight_pass


def _rewrite(line: Line, call: relax.Call) -> Any:
    if not is_call(call, activation.OP):
        return None
    own = attributes(call)
    folded = grouped_matmul.activation_attrs(activation.spec_of(own), own["gated"])
    for op in (grouped_matmul.OP, linear.OP):
        matmul = line.producer(activation.OP.bind(call)["x"], op)
        if matmul is None:
            continue
        args = op.bind(matmul)
        attrs = {k: v for k, v in attributes(matmul).items() if k != "extra"}
        extra = {k: args[k] for k in op.optional if k in args}
        operands = [args[k] for k in op.operands]
        return op.call(operands, extra, **attrs, **folded, dtype=own["dtype"])
    return None


FoldActivation = straight_pass("moec.FoldActivation", _rewrite)
