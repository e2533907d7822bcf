"""moec.combine: routed sum, shared expert and residual into the block's output."""

from __future__ import annotations

from typing import Any

from .define import Attrs, OpDef, Types, expect, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, width = expect("combine", types, "routed", "T", "H")
    for name, columns in (("shared", width), ("gate", 1), ("residual", width)):
        if name in types:
            expect("combine", types, name, tokens, columns)
    return tensor([tokens, width], str(attrs["dtype"]))


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
