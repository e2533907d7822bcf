"""moec.combine: routed sum, shared expert, zero experts and residual into the block's output."""

from __future__ import annotations

from typing import Any

from ..spec import SharedGate
from .define import Attrs, OpDef, Types, require, same, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    routed = shape_of(types["routed"])
    for name in ("shared", "residual", "passed"):
        if name in types:
            shape = shape_of(types[name])
            ok = same(shape[0], routed[0]) and same(shape[1], routed[1])
            require("combine", ok, name, shape, str(routed))
    if "bias" in types:
        shape = shape_of(types["bias"])
        ok = len(shape) == 1 and same(shape[0], routed[1])
        require("combine", ok, "bias", shape, f"[{routed[1]}]")
    return tensor(routed, str(attrs["dtype"]))


EXTRA = ("shared", "gate", "residual", "bias", "passed", "pass_weight")
OP = OpDef("combine", __doc__, ("routed",), EXTRA, _infer)


def combine(
    routed: Any,
    dtype: str,
    scale: float = 1.0,
    inner: bool = False,
    mix: tuple[SharedGate, float] = (SharedGate.NONE, 1.0),
    **extra: Any | None,
) -> Any:
    """scale * (routed + pass_weight * passed) + shared + residual + bias -> [T, H], rounded once.

    routed and shared are [T, H] float32, residual and passed [T, H] of the model, pass_weight
    [T, 1] and bias [H] float32. `mix` is how shared enters: times a constant, and times
    sigmoid(gate) for gate [T, 1], or, for gate [T, 2], with c = softmax(gate) as c0 * the first
    term + c1 * shared. `inner` marks a sum that another op of the block reads, as against the
    block's result.
    """
    kind, factor = mix
    attrs = {} if kind is not SharedGate.SOFTMAX else {"mix": kind.value}
    if factor != 1.0:
        attrs["shared_scale"] = factor
    return OP.call([routed], extra, dtype=dtype, scale=scale, inner=inner, **attrs)
