"""moec.linear: a dense matmul x @ weight^T (+ bias), float32, with an activation once folded."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, require, same, shape_of, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, width = shape_of(types["x"])
    weight = shape_of(types["weight"])
    ok = len(weight) == 2 and same(weight[1], width)
    require("linear", ok, "weight", weight, f"[N, {width}]")
    if "bias" in types:
        bias = shape_of(types["bias"])
        require("linear", same(bias[0], weight[0]), "bias", bias, f"[{weight[0]}]")
    columns = weight[0]
    if attrs.get("activation") and attrs["gated"]:
        columns = simplify(tirx.floordiv(columns, 2))
    return tensor([tokens, columns], str(attrs.get("dtype", "float32")))


OP = OpDef("linear", __doc__, ("x", "weight"), ("bias",), _infer)


def linear(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """x [T, K], weight [N, K], bias [N] float32 or None -> [T, N] float32."""
    return OP.call([x, weight], {"bias": bias})
