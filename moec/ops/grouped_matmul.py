"""moec.grouped_matmul: each sorted row times the weight of its expert.

Before any pass it is the plain matmul. Passes fold what surrounds it into its attributes:
`gather` (rows are read through row_order), `activation` (applied in the epilogue), `reduce`
(rows weighted and summed into their tokens; with `each` they are written one by one, in the
order of their pairs and without weight).
"""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..spec import ActivationSpec
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, require, same, shape_of, simplify, tensor

EXTRA = ("row_order", "topk_weights", "bias")


def result_type(name: str, types: Types, attrs: Attrs, rows: Any) -> Any:
    """The type of a (grouped or indexed) matmul with what was folded into it."""
    width = shape_of(types["x"])[1]
    weight = shape_of(types["weight"])
    ok = len(weight) == 3 and same(weight[2], width)
    require(name, ok, "weight", weight, f"[E, N, {width}]")
    if "bias" in types:
        bias = shape_of(types["bias"])
        ok = len(bias) == 2 and same(bias[0], weight[0]) and same(bias[1], weight[1])
        require(name, ok, "bias", bias, f"[{weight[0]}, {weight[1]}]")
    columns = weight[1]
    if attrs.get("activation") and attrs["gated"]:
        columns = tirx.floordiv(columns, 2)
    if attrs.get("reduce") and not attrs.get("each"):
        rows = tirx.floordiv(rows, int(attrs["top_k"]))
    return tensor([simplify(rows), simplify(columns)], str(attrs.get("dtype", "float32")))


def _infer(types: Types, attrs: Attrs) -> Any:
    rows = shape_of(types["x"])[0]
    if attrs.get("gather"):
        require("grouped_matmul", "row_order" in types, "row_order", "missing", "[S]")
        rows = shape_of(types["row_order"])[0]
    return result_type("grouped_matmul", types, attrs, rows)


OP = OpDef("grouped_matmul", __doc__, ("x", "weight", "expert_offsets"), EXTRA, _infer)


def grouped_matmul(x: Any, weight: Any, expert_offsets: Any, bias: Any | None = None) -> Any:
    """x [S, K] sorted by expert, weight [E, N, K], expert_offsets [E+1] -> [S, N] float32."""
    return OP.call([x, weight, expert_offsets], {"bias": bias})


def activation_of(attrs: Attrs) -> tuple[ActivationSpec, bool]:
    """(ActivationSpec, gated) folded into a call."""
    inner = {k.removeprefix("act_"): v for k, v in attrs.items() if k.startswith("act_")}
    return from_attrs(ActivationSpec, inner), bool(attrs["gated"])


def activation_attrs(spec: ActivationSpec, gated: bool) -> dict[str, Any]:
    """The attributes that fold an activation into a call."""
    return {"activation": True, "gated": gated, **to_attrs(spec, "act_")}
