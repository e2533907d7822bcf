"""moec.route: router logits to the chosen experts and their weights (RouterSpec)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import relax

from ..spec import RouterSpec, Selection
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, require, same, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, experts = shape_of(types["logits"])
    spec = spec_of(attrs)
    logits = f"[{tokens}, {experts}]"
    require("route", same(experts, spec.num_experts), "logits", logits, f"[T, {spec.num_experts}]")
    for name, shape in _operands(spec).items():
        require("route", (name in types) == (shape is not None), name, "given or missing",
                f"{shape or 'none'}")  # fmt: skip
        if shape is not None:
            got = shape_of(types[name])
            fits = len(got) == len(shape) and all(map(same, got, shape))
            require("route", fits, name, got, f"{list(shape)}")
    if spec.selection is Selection.TOKEN_TABLE:
        got = shape_of(types["token_ids"])
        require("route", same(got[0], tokens), "token_ids", got, f"[{tokens}]")
    return relax.TupleType(
        [tensor([tokens, spec.top_k], "int32"), tensor([tokens, spec.top_k], "float32")]
    )


def _operands(spec: RouterSpec) -> dict[str, tuple[int, ...] | None]:
    """The shapes of the stored operands that a spec asks for (None: not asked for)."""
    table = spec.selection is Selection.TOKEN_TABLE
    return {
        "selection_bias": (spec.selectable,) if spec.selection_bias else None,
        "per_expert_scale": (spec.num_experts,) if spec.per_expert_scale else None,
        "global_scale": (1,) if spec.global_scale else None,
        "token_table": (spec.vocab_size, spec.top_k) if table else None,
    }


EXTRA = ("selection_bias", "per_expert_scale", "global_scale", "token_ids", "token_table")
OP = OpDef("route", __doc__, ("logits",), EXTRA, _infer)


def route(logits: Any, extra: Mapping[str, Any], spec: RouterSpec, dtype: str) -> Any:
    """logits [T, E] float32 -> (topk_ids [T, K] int32, topk_weights [T, K] float32).

    `extra` holds what `spec` asks for: selection_bias [E], per_expert_scale [E], global_scale
    [1], and of a token table token_ids [T] and token_table [V, K], both int32. `dtype` is the
    model's dtype, to which Precision.MODEL rounds.
    """
    return OP.call([logits], extra, dtype=dtype, **to_attrs(spec))


def spec_of(attrs: Attrs) -> RouterSpec:
    """The RouterSpec behind a call's attributes."""
    return from_attrs(RouterSpec, attrs, ("groups",))
