"""moec.combine: routed sum, shared expert, zero experts and residual into the block's output."""

from __future__ import annotations

from typing import Any

from ..spec import SharedGate
from .define import Attrs, OpDef, Types, expect, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, width = expect("combine", types, "routed", "T", "H")
    gates = 2 if attrs.get("mix") == SharedGate.SOFTMAX.value else 1
    columns_of = {"shared": width, "gate": gates, "residual": width, "passed": width}
    for name, columns in {**columns_of, "pass_weight": 1}.items():
        if name in types:
            expect("combine", types, name, tokens, columns)
    if "bias" in types:
        expect("combine", types, "bias", width)
    return tensor([tokens, width], str(attrs["dtype"]))


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
