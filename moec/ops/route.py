"""moec.route: router logits to the chosen experts and their weights (RouterSpec)."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..spec import RouterSpec
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, require, same, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, experts = shape_of(types["logits"])
    spec = spec_of(attrs)
    logits = f"[{tokens}, {experts}]"
    require("route", same(experts, spec.num_experts), "logits", logits, f"[T, {spec.num_experts}]")
    for name in ("selection_bias", "per_expert_scale"):
        require("route", (name in types) == getattr(spec, name), name, "given or missing",
                f"{name}={getattr(spec, name)}")  # fmt: skip
        if name in types:
            shape = shape_of(types[name])
            require("route", same(shape[0], experts), name, shape, f"[{experts}]")
    return relax.TupleType(
        [tensor([tokens, spec.top_k], "int32"), tensor([tokens, spec.top_k], "float32")]
    )


OP = OpDef("route", __doc__, ("logits",), ("selection_bias", "per_expert_scale"), _infer)


def route(
    logits: Any,
    selection_bias: Any | None,
    per_expert_scale: Any | None,
    spec: RouterSpec,
    dtype: str,
) -> Any:
    """logits [T, E] float32 -> (topk_ids [T, K] int32, topk_weights [T, K] float32).

    `dtype` is the model's dtype, to which Precision.MODEL rounds.
    """
    extra = {"selection_bias": selection_bias, "per_expert_scale": per_expert_scale}
    return OP.call([logits], extra, dtype=dtype, **to_attrs(spec))


def spec_of(attrs: Attrs) -> RouterSpec:
    """The RouterSpec behind a call's attributes."""
    return from_attrs(RouterSpec, attrs, ("groups",))
