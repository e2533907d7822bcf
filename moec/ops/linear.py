"""moec.linear: a dense matmul x @ weight^T (+ bias), float32, with an activation once folded."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, expect, simplify, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, width = expect("linear", types, "x", "T", "K")
    columns, _ = expect("linear", types, "weight", "N", width)
    if "bias" in types:
        expect("linear", types, "bias", columns)
    if attrs.get("activation") and attrs["gated"]:
        columns = simplify(tirx.floordiv(columns, 2))
    return tensor([tokens, columns], str(attrs.get("dtype", "float32")))


OP = OpDef("linear", __doc__, ("x", "weight"), ("bias",), _infer)


def linear(x: Any, weight: Any, bias: Any | None = None) -> Any:
    """x [T, K], weight [N, K], bias [N] float32 or None -> [T, N] float32."""
    return OP.call([x, weight], {"bias": bias})
