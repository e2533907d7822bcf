"""Legalize the ops of a block for Metal: each op becomes calls of kernels of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tvm import relax

from ...ops import (
    combine,
    expert_loop,
    grouped_matmul,
    indexed_matmul,
    linear,
    rms_norm,
    route,
    sort,
)
from ...ops.define import OpDef, attributes, dtype_of
from ...spec import MoESpec
from ..base import Packed
from ..buffers import Kernel
from ..program import Legalize, Lowering
from . import dense, experts, routing
from .experts import STORAGE, Projection
from .tile import Tile


@dataclass(frozen=True)
class MetalConfig:
    """`tile`: of all matmuls on simdgroup matrices; None: every matmul is a mat-vec."""

    tile: Tile | None


class MetalLowering(Lowering):
    """Legalization of one block."""

    def __init__(self, spec: MoESpec, prefix: str) -> None:
        super().__init__(prefix)
        self.spec, self.config = spec, MetalConfig(None)

    def table(self, config: MetalConfig) -> Mapping[str, Legalize]:
        """The legalize map: Relax op name -> function."""
        self.config = config
        pairs: tuple[tuple[OpDef, Legalize], ...] = (
            (rms_norm.OP, self._norm),
            (linear.OP, self._linear),
            (route.OP, self._route),
            (sort.OP, self._sort),
            (grouped_matmul.OP, self._grouped),
            (indexed_matmul.OP, self._indexed),
            (expert_loop.OP, self._loop),
            (combine.OP, self._combine),
        )
        return {op.full_name: function for op, function in pairs}

    def _projection(self, name: str, rows: str, bias: bool, gated: bool) -> Projection:
        parameter = self.spec.parameters()[name]
        *lead, outputs, width = parameter.shape
        columns = outputs // 2 if gated else outputs
        return Projection(
            parameter.dtype, rows, columns, width, gated, bias, lead[0] if lead else None
        )

    def _norm(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = rms_norm.OP.bind(call), attributes(call)
        spec, width = rms_norm.spec_of(attrs), self.spec.experts.hidden_size
        dtype, out = dtype_of(args["x"].ty), str(attrs["dtype"])
        kernel = self.kernel(
            "norm", (spec, dtype, out), lambda s: dense.rms_norm(s, spec, width, dtype, out)
        )
        operands = [x for x in (args["x"], args.get("weight")) if x is not None]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _linear(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = linear.OP.bind(call), attributes(call)
        name, rows, tile = args["weight"].name, dtype_of(args["x"].ty), self.config.tile
        role = f"{name}_{'tiles' if tile else 'vector'}"
        activated = bool(attrs.get("activation"))
        proj = self._projection(name, rows, "bias" in args, activated)
        if activated:
            act, _ = grouped_matmul.activation_of(attrs)
            hidden = dtype_of(call.ty)
            kernel = self.kernel(
                role,
                (proj, act, hidden, tile),
                lambda s: dense.gate_up(s, proj, act, hidden, tile),
            )
        else:
            kernel = self.kernel(role, (proj, tile), lambda s: dense.linear(s, proj, tile))
        operands = [args["x"], args["weight"], *([args["bias"]] if proj.bias else [])]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _route(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = route.OP.bind(call), attributes(call)
        spec, dtype = route.spec_of(attrs), str(attrs["dtype"])
        kernel = self.kernel("route", (spec,), lambda s: routing.route(s, spec, dtype))
        names = ("logits", "selection_bias", "per_expert_scale")
        operands = [args[n] for n in names if n in args]
        return relax.Tuple(self.call(bb, kernel, operands, args["logits"].ty.shape[0], call.ty))

    def _sort(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        ids, e = sort.OP.bind(call)["topk_ids"], self.spec.experts
        kernel = self.kernel("sort", (), lambda s: routing.sort(s, e.num_experts, e.top_k))
        return relax.Tuple(self.call(bb, kernel, [ids], ids.ty.shape[0], call.ty))

    def _grouped(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = grouped_matmul.OP.bind(call), attributes(call)
        e, weighted, tile = self.spec.experts, "topk_weights" in args, self.config.tile
        assert tile is not None
        bias = [args["bias"]] if "bias" in args else []
        weights = [args["topk_weights"]] if weighted else []
        order = [args["row_order"], args["expert_offsets"]]
        rows = dtype_of(args["x"].ty)
        if not attrs.get("reduce"):
            proj = self._projection("gate_up", rows, bool(bias), e.gated)
            act, _ = grouped_matmul.activation_of(attrs)
            hidden = dtype_of(call.ty)
            kernel = self.kernel(
                "grouped_gate_up", (proj, act, hidden, weighted, tile),
                lambda s: experts.grouped_gate_up(s, proj, act, hidden, e.top_k, weighted, tile),
            )  # fmt: skip
            operands = [args["x"], *order, *weights, args["weight"], *bias]
            return self.call(bb, kernel, operands, args["x"].ty.shape[0], call.ty)[0]
        proj = self._projection("down", rows, bool(bias), False)
        tokens = call.ty.shape[0]
        down = self.kernel(
            "grouped_down", (proj, tile), lambda s: experts.grouped_down(s, proj, e.top_k, tile)
        )
        parts = self.call(bb, down, [args["x"], *order, args["weight"], *bias], tokens)[0]
        total = self.kernel(
            "reduce", (weighted,),
            lambda s: dense.reduce_rows(s, proj.columns, e.top_k, weighted),
        )  # fmt: skip
        return self.call(bb, total, [parts, *weights], tokens, call.ty)[0]

    def _indexed(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = indexed_matmul.OP.bind(call), attributes(call)
        e, weighted = self.spec.experts, "topk_weights" in args
        names = ("x", "topk_ids", "topk_weights", "weight", "bias")
        operands, rows = [args[n] for n in names if n in args], dtype_of(args["x"].ty)
        if attrs.get("reduce"):
            proj = self._projection("down", rows, "bias" in args, False)
            kernel = self.kernel(
                "indexed_down", (proj, weighted),
                lambda s: experts.indexed_down(s, proj, e.top_k, weighted),
            )  # fmt: skip
            return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]
        proj = self._projection("gate_up", rows, "bias" in args, e.gated)
        act, _ = grouped_matmul.activation_of(attrs)
        hidden = dtype_of(call.ty)
        kernel = self.kernel(
            "indexed_gate_up", (proj, act, hidden, weighted),
            lambda s: experts.indexed_gate_up(s, proj, act, hidden, e.top_k, weighted),
        )  # fmt: skip
        return self.call(bb, kernel, operands, args["x"].ty.shape[0], call.ty)[0]

    def _loop(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = expert_loop.OP.bind(call), attributes(call)
        weighted, e = bool(attrs["weighted_input"]), self.spec.experts
        rows = dtype_of(args["x"].ty)
        first = self._projection("gate_up", rows, "gate_up_bias" in args, e.gated)
        second = self._projection("down", self.spec.dtype, "down_bias" in args, False)
        act, _ = grouped_matmul.activation_of(attrs)
        kernel = self.kernel(
            "expert_loop", (first, second, act, weighted),
            lambda s: experts.expert_loop(s, first, second, act, e.top_k, weighted),
        )  # fmt: skip
        names = ("x", "topk_ids", "topk_weights", "gate_up", "gate_up_bias", "down", "down_bias")
        operands = [args[n] for n in names if n in args]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _combine(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = combine.OP.bind(call), attributes(call)
        dtype, scale = str(attrs["dtype"]), float(attrs["scale"])
        width = self.spec.experts.hidden_size
        present = tuple(n for n in combine.OP.optional if n in args)
        residual = dtype_of(args["residual"].ty) if "residual" in args else self.spec.dtype
        kernel = self.kernel(
            "combine", (dtype, residual, scale, present),
            lambda s: dense.combine(s, width, dtype, residual, scale, present),
        )  # fmt: skip
        operands = [args["routed"], *(args[n] for n in present)]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]


def packing(spec: MoESpec) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    """Parameters are bound in their canonical form: a row of a weight is what a SIMD group of
    the mat-vec reads, and the tiles stage runs of it."""
    packed = {
        name: Packed(name, p.shape, STORAGE[p.dtype], None, len(p.shape) == 3)
        for name, p in spec.parameters().items()
    }
    return packed, {}
