"""Build the Relax graph of one block: `route`, `experts` and `moe`, spelled out op by op.

The module before any pass reads like the definition of the layer. Parameters carry the
canonical names and shapes of `MoESpec.parameters()`; T is the symbolic dimension `tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from .. import ops
from ..ops.activation import activation
from ..ops.combine import combine
from ..ops.define import tensor
from ..ops.gather_rows import gather_rows
from ..ops.grouped_matmul import grouped_matmul
from ..ops.linear import linear
from ..ops.pass_weight import pass_weight
from ..ops.reduce import reduce
from ..ops.rms_norm import rms_norm
from ..ops.route import EXTRA as ROUTE_OPERANDS
from ..ops.route import route
from ..ops.sort import sort
from ..spec import ApplyTo, MoESpec, ScaleOn, Selection, SharedGate

ROUTE_PARAMETERS = (
    "router", "router_bias", "selection_bias", "per_expert_scale", "global_scale", "token_table",
    "norm_router_input",
)  # fmt: skip
EXPERT_PARAMETERS = (
    "gate_up", "gate_up_bias", "down", "down_bias", "latent_in", "latent_out",
    "norm_latent_input", "norm_expert_output",
)  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """A function of the block: its inputs, its parameters and its results, by name."""

    name: str
    inputs: tuple[str, ...]
    parameters: tuple[str, ...]
    outputs: tuple[str, ...]


def signatures(spec: MoESpec) -> tuple[Signature, ...]:
    """The functions of a block and the canonical parameters that each one reads."""
    names = tuple(spec.parameters())
    experts = tuple(n for n in names if n in EXPERT_PARAMETERS)
    routing = tuple(n for n in names if n in ROUTE_PARAMETERS)
    table = spec.router.selection is Selection.TOKEN_TABLE
    token_ids = ("token_ids",) if table else ()
    shared_x = ("shared_x",) if spec.shared is not None and spec.shared.own_input else ()
    return (
        Signature("route", ("x", *token_ids), routing, ("topk_ids", "topk_weights")),
        Signature("experts", ("x", "topk_ids", "topk_weights"), experts, ("y",)),
        Signature("moe", ("x", *token_ids, *shared_x), names, ("y",)),
    )


def tensor_types(spec: MoESpec, tokens: Any) -> dict[str, Any]:
    """The types of inputs, outputs and canonical parameters, by name."""
    hidden, top_k = spec.experts.hidden_size, spec.experts.top_k
    types = {
        "x": tensor([tokens, hidden], spec.dtype),
        "topk_ids": tensor([tokens, top_k], "int32"),
        "topk_weights": tensor([tokens, top_k], "float32"),
        "y": tensor([tokens, hidden], spec.dtype),
        "token_ids": tensor([tokens], "int32"),
        "shared_x": tensor([tokens, hidden], spec.dtype),
    }
    for name, parameter in spec.parameters().items():
        types[name] = tensor(parameter.shape, parameter.dtype)
    return types


def build_graph(spec: MoESpec) -> tvm.IRModule:
    """The IRModule of a block, before any pass."""
    ops.register()
    builder = relax.BlockBuilder()
    for signature in signatures(spec):
        _function(builder, spec, signature)
    return builder.get()


def _function(builder: relax.BlockBuilder, spec: MoESpec, signature: Signature) -> None:
    types = tensor_types(spec, tirx.Var("tokens", "int64"))
    names = (*signature.inputs, *signature.parameters)
    params = {name: relax.Var(name, types[name]) for name in names}
    with builder.function(signature.name, list(params.values())):
        with builder.dataflow():
            body = _Body(builder, spec, params)
            if signature.name == "route":
                ids, weights = body.route(params["x"])
                out = relax.Tuple([ids, weights])
            elif signature.name == "experts":
                x, ids, weights = (params[name] for name in signature.inputs)
                routed = body.experts(x, ids, weights)
                passed = body.passed(x, ids, weights)
                out = combine(routed, spec.dtype, body.routed_scale(), **passed)
            else:
                out = body.moe(params["x"])
            result = builder.emit_output(out, "out")
        builder.emit_func_output(result)


@dataclass(frozen=True)
class _Body:
    """Emits the halves of a block into the function under construction."""

    builder: relax.BlockBuilder
    spec: MoESpec
    params: dict[str, Any]

    def emit(self, expr: Any, name: str) -> Any:
        return self.builder.emit(expr, name)

    def norm(self, position: str, x: Any, dtype: str) -> Any:
        """RMSNorm at a position of the block, or x itself."""
        norm = getattr(self.spec.norms, position)
        if norm is None:
            return x
        return self.emit(rms_norm(x, self.params.get(f"norm_{position}"), norm, dtype), position)

    def routed_scale(self) -> float:
        router = self.spec.router
        return router.scale if router.scale_on is ScaleOn.ROUTED_SUM else 1.0

    def route(self, x: Any) -> tuple[Any, Any]:
        p = self.params
        x = self.norm("router_input", x, self.spec.dtype)
        logits = self.emit(linear(x, p["router"], p.get("router_bias")), "logits")
        extra = {name: p.get(name) for name in ROUTE_OPERANDS}
        chosen = self.emit(route(logits, extra, self.spec.router, self.spec.dtype), "chosen")
        return self.emit(chosen[0], "topk_ids"), self.emit(chosen[1], "topk_weights")

    def experts(self, x: Any, ids: Any, weights: Any) -> Any:
        p, experts = self.params, self.spec.experts
        on_input = self.spec.router.apply_to is ApplyTo.INPUT
        if experts.latent_size is not None:
            latent = self.emit(linear(x, p["latent_in"]), "latent")
            if self.spec.norms.latent_input is None:
                x = self.emit(combine(latent, self.spec.dtype), "latent_x")
            else:
                x = self.norm("latent_input", latent, self.spec.dtype)
        order = self.emit(sort(ids, experts.num_experts), "order")
        row_order = self.emit(order[0], "row_order")
        offsets = self.emit(order[1], "expert_offsets")
        rows = gather_rows(x, row_order, experts.top_k, weights if on_input else None)
        rows = self.emit(rows, "rows")
        h = grouped_matmul(rows, p["gate_up"], offsets, p.get("gate_up_bias"))
        h = self.emit(h, "gate_up_rows")
        h = self.emit(activation(h, experts.activation, experts.gated, self.spec.dtype), "h")
        h = self.emit(grouped_matmul(h, p["down"], offsets, p.get("down_bias")), "down_rows")
        h = self.norm("expert_output", h, "float32")
        out_weights = None if on_input else weights
        routed = self.emit(reduce(h, row_order, experts.top_k, out_weights), "routed")
        if experts.latent_size is None:
            return routed
        return self.emit(linear(routed, p["latent_out"]), "routed_out")

    def passed(self, x: Any, ids: Any, weights: Any) -> dict[str, Any]:
        """What the zero experts add, as operands of combine."""
        experts = self.spec.experts
        if not experts.zero_experts:
            return {}
        own = pass_weight(ids, weights, experts.num_experts, experts.zero_experts)
        return {"passed": x, "pass_weight": self.emit(own, "pass_weight")}

    def shared(self, x: Any) -> dict[str, Any]:
        """The shared expert's output and its gate logits, as operands of combine."""
        shared = self.spec.shared
        if shared is None:
            return {}
        p = self.params
        own = p["shared_x"] if shared.own_input else x
        inner = self.norm("shared_input", own, self.spec.dtype)
        h = self.emit(linear(inner, p["shared_gate_up"]), "shared_gate_up_rows")
        h = activation(h, shared.activation, shared.gated, self.spec.dtype)
        h = self.emit(h, "shared_h")
        out = self.emit(linear(h, p["shared_down"]), "shared")
        out = self.norm("shared_output", out, "float32")
        parts = {"shared": out, "mix": (shared.gate, shared.scale)}
        if shared.gate is not SharedGate.NONE:
            gate = linear(x, p["shared_router"], p.get("shared_router_bias"))
            parts["gate"] = self.emit(gate, "shared_gate")
        return parts

    def moe(self, x: Any) -> Any:
        spec = self.spec
        ids, weights = self.route(x)
        inner = self.norm("experts_input", x, spec.dtype)
        routed = self.norm("experts_output", self.experts(inner, ids, weights), "float32")
        parts = {**self.passed(inner, ids, weights), **self.shared(x)}
        last: dict[str, Any] = {
            "residual": x if spec.norms.residual else None,
            "bias": self.params.get("output_bias"),
        }
        scale = self.routed_scale()
        if spec.norms.block_output is None:
            return combine(routed, spec.dtype, scale, **parts, **last)
        total = self.emit(combine(routed, "float32", scale, inner=True, **parts), "total")
        total = self.norm("block_output", total, "float32")
        return combine(total, spec.dtype, **last)
