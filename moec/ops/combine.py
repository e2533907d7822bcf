"""moec.combine: routed sum, shared expert and residual into the block's output."""

from __future__ import annotations

from typing import Any

from .define import Attrs, OpDef, Types, require, same, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    routed = shape_of(types["routed"])
    for name in ("shared", "residual"):
        if name in types:
            shape = shape_of(types[name])
            ok = same(shape[0], routed[0]) and same(shape[1], routed[1])
            require("combine", ok, name, shape, str(routed))
    return tensor(routed, str(attrs["dtype"]))


OP = OpDef("combine", __doc__, ("routed",), ("shared", "gate", "residual"), _infer)


def combine(
    routed: Any,
    dtype: str,
    scale: float = 1.0,
    shared: Any | None = None,
    gate: Any | None = None,
    residual: Any | None = None,
    inner: bool = False,
) -> Any:
    """scale * routed + sigmoid(gate) * shared + residual -> [T, H] of `dtype`, rounded once.

    routed and shared are [T, H] float32, gate [T, 1] float32, residual [T, H] of the model.
    `inner` marks a sum that another op of the block reads, as against the block's result.
    """
    extra = {"shared": shared, "gate": gate, "residual": residual}
    return OP.call([routed], extra, dtype=dtype, scale=scale, inner=inner)
