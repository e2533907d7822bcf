"""moec.route: router logits to the chosen experts and their weights (RouterSpec)."""

from __future__ import annotations

from typing import Any

from tvm import relax

from ..spec import RouterSpec
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, expect, require, tensor, text


def _infer(types: Types, attrs: Attrs) -> Any:
    spec = spec_of(attrs)
    tokens, experts = expect("route", types, "logits", "T", spec.num_experts)
    for name in ("selection_bias", "per_expert_scale"):
        given, wanted = name in types, bool(getattr(spec, name))
        state, need = ("given", "none") if given else ("missing", text([experts]))
        require("route", given == wanted, name, state, need)
        if given:
            expect("route", types, name, experts)
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
