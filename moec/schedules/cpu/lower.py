"""Legalize the ops of a block for the CPU: each op becomes calls of kernels of this folder."""

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
    pass_weight,
    rms_norm,
    route,
    sort,
    sum_rows,
)
from ...ops.define import OpDef, attributes, dtype_of
from ...spec import MoESpec, SharedGate
from ..base import Packed
from ..buffers import Kernel, PerToken
from ..program import Legalize, Lowering
from . import compact, dense, each, finish, fused, gather, norm, pack, rows, stage
from . import route as route_kernel
from . import sort as sort_kernel
from .emit import round_up
from .isa import Isa
from .matmul import Projection
from .tiles import Operand, Panels


@dataclass(frozen=True)
class CpuConfig:
    """Tunable choices: `block_words` of K that a panel of the second matmul is split into."""

    block_words: int = 1024


class CpuLowering(Lowering):
    """Legalization of one block with one instruction set."""

    def __init__(self, spec: MoESpec, isa: Isa, prefix: str) -> None:
        super().__init__(prefix)
        self.spec, self.isa, self.config = spec, isa, CpuConfig()
        self.panels = weight_panels(spec, isa)
        self._staged: dict[Any, Any] = {}

    def table(self, config: CpuConfig) -> Mapping[str, Legalize]:
        """The legalize map: Relax op name -> function."""
        self.config, self._staged = config, {}
        pairs: tuple[tuple[OpDef, Legalize], ...] = (
            (rms_norm.OP, self._norm),
            (linear.OP, self._linear),
            (route.OP, self._route),
            (sort.OP, self._sort),
            (grouped_matmul.OP, self._grouped),
            (indexed_matmul.OP, self._indexed),
            (expert_loop.OP, self._loop),
            (sum_rows.OP, self._sum_rows),
            (pass_weight.OP, self._pass_weight),
            (combine.OP, self._combine),
        )
        return {op.full_name: function for op, function in pairs}

    # -- helpers ----------------------------------------------------------------------------
    def _projection(self, name: str, bias: bool, source_dtype: str) -> Projection:
        panels = self.panels[name]
        operand = Operand.of(self.isa, panels.dtype, source_dtype, panels.cols)
        return Projection(panels, operand, bias)

    def _stage(
        self, bb: relax.BlockBuilder, x: Any, operand: Operand, weights: Any | None = None
    ) -> Any:
        """x as a matmul reads it; values made by a matmul epilogue are staged already."""
        made = self.buffer(bb, x)
        if made is not None and made.name == "h":
            return x
        stride = operand.width if made is None else int(made.shape[1])  # type: ignore[arg-type]
        dtype, top_k = dtype_of(x.ty), self.spec.experts.top_k if weights is not None else None
        key = (dtype, operand, top_k, stride)
        seen = (x, weights, key)
        if seen not in self._staged:
            kernel = self.kernel(
                "stage", key,
                lambda s: stage.stage_rows(s, self.isa, dtype, operand, top_k, stride),
            )  # fmt: skip
            args = [x] if weights is None else [x, weights]
            self._staged[seen] = self.call(bb, kernel, args, x.ty.shape[0])[0]
        return self._staged[seen]

    def _hidden(self, next_weight: str) -> Operand:
        """How the first matmul of a pair leaves its result for the second one."""
        panels = self.panels[next_weight]
        return Operand.of(self.isa, panels.dtype, self.spec.dtype, panels.cols)

    # -- ops --------------------------------------------------------------------------------
    def _norm(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = rms_norm.OP.bind(call), attributes(call)
        spec, width = rms_norm.spec_of(attrs), int(call.ty.shape[1])
        x, out = args["x"], str(attrs["dtype"])
        made = self.buffer(bb, x)
        stride = width if made is None else int(made.shape[1])  # type: ignore[arg-type]
        lead = None if made is None else made.shape[0]
        copies = lead.count if isinstance(lead, PerToken) else 1
        key = (spec, width, dtype_of(x.ty), out, stride, copies)
        kernel = self.kernel(
            "norm", key,
            lambda s: norm.rms_norm(
                s, self.isa, spec, width, dtype_of(x.ty), out, stride, copies
            ),
        )  # fmt: skip
        operands = [x, args["weight"]] if "weight" in args else [x]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _linear(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = linear.OP.bind(call), attributes(call)
        name = args["weight"].name
        made = self.buffer(bb, args["x"])
        source = (
            self.spec.dtype if made is not None and made.name == "h" else dtype_of(args["x"].ty)
        )
        proj = self._projection(name, "bias" in args, source)
        staged = self._stage(bb, args["x"], proj.operand)
        operands = [staged, args["weight"], *([args["bias"]] if proj.bias else [])]
        if attrs.get("activation"):
            act, _ = grouped_matmul.activation_of(attrs)
            out = self._hidden(name.replace("gate_up", "down"))
            kernel = self.kernel(
                name, (proj, act, out), lambda s: dense.gate_up(s, self.isa, proj, act, out)
            )
        else:
            blocks = self.config.block_words
            kernel = self.kernel(
                name, (proj, blocks), lambda s: dense.linear(s, self.isa, proj, blocks)
            )
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _route(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = route.OP.bind(call), attributes(call)
        spec, dtype = route.spec_of(attrs), str(attrs["dtype"])
        columns = round_up(spec.num_experts, self.isa.panel)
        kernel = self.kernel(
            "route", (spec,),
            lambda s: route_kernel.route(s, self.isa, spec, dtype, columns),
        )  # fmt: skip
        operands = [args[n] for n in ("logits", *route.EXTRA) if n in args]
        outs = self.call(bb, kernel, operands, args["logits"].ty.shape[0], call.ty)
        return relax.Tuple(outs[:2])

    def _sort(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        ids = sort.OP.bind(call)["topk_ids"]
        e = self.spec.experts
        kernel = self.kernel(
            "sort", (), lambda s: sort_kernel.sort(s, self.isa, e.num_experts, e.top_k)
        )
        return relax.Tuple(self.call(bb, kernel, [ids], ids.ty.shape[0], call.ty)[:2])

    def _grouped(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = grouped_matmul.OP.bind(call), attributes(call)
        order = [args["row_order"], args["expert_offsets"]]
        return self._experts(bb, call, args, attrs, order, fused, "grouped")

    def _indexed(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = indexed_matmul.OP.bind(call), attributes(call)
        return self._experts(bb, call, args, attrs, [args["topk_ids"]], gather, "indexed")

    def _experts(
        self,
        bb: relax.BlockBuilder,
        call: relax.Call,
        args: dict[str, Any],
        attrs: dict[str, Any],
        order: list[Any],
        kernels: Any,
        role: str,
    ) -> Any:
        """Either expert matmul of the `fused` or `gather` kernels, which have one signature."""
        top_k, weighted = self.spec.experts.top_k, "topk_weights" in args
        bias = [args["bias"]] if "bias" in args else []
        if attrs.get("reduce"):
            rows_out = bool(attrs.get("each"))
            weighted &= not rows_out
            proj = self._projection("down", bool(bias), self.spec.dtype)
            words = self.config.block_words
            kernel = self.kernel(
                f"{role}_down", (proj, weighted, rows_out, words),
                lambda s: kernels.down(s, self.isa, proj, top_k, weighted, rows_out, words),
            )  # fmt: skip
            weights = [args["topk_weights"]] if weighted else []
            operands = [args["x"], *order, *weights, args["weight"], *bias]
            return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]
        proj = self._projection("gate_up", bool(bias), dtype_of(args["x"].ty))
        staged = self._stage(bb, args["x"], proj.operand, args.get("topk_weights"))
        act, _ = grouped_matmul.activation_of(attrs)
        out = self._hidden("down")
        kernel = self.kernel(
            f"{role}_gate_up", (proj, act, out, weighted),
            lambda s: kernels.gate_up(s, self.isa, proj, act, out, top_k, weighted),
        )  # fmt: skip
        operands = [staged, *order, args["weight"], *bias]
        return self.call(bb, kernel, operands, args["x"].ty.shape[0], call.ty)[0]

    def _loop(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = expert_loop.OP.bind(call), attributes(call)
        weighted, rows_out = bool(attrs["weighted_input"]), bool(attrs.get("each"))
        first = self._projection("gate_up", "gate_up_bias" in args, dtype_of(args["x"].ty))
        second = self._projection("down", "down_bias" in args, self.spec.dtype)
        staged = self._stage(
            bb, args["x"], first.operand, args["topk_weights"] if weighted else None
        )
        act, _ = grouped_matmul.activation_of(attrs)
        out, top_k, words = self._hidden("down"), self.spec.experts.top_k, self.config.block_words
        kernel = self.kernel(
            "expert_loop", (first, second, act, out, weighted, rows_out, words),
            lambda s: each.expert_loop(
                s, self.isa, first, second, act, out, top_k, weighted, rows_out, words
            ),
        )  # fmt: skip
        names = ("topk_ids", "topk_weights", "gate_up", "gate_up_bias", "down", "down_bias")
        operands = [staged, *(args[n] for n in names if n in args)]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _combine(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = combine.OP.bind(call), attributes(call)
        dtype, scale = str(attrs["dtype"]), float(attrs["scale"])
        width = int(call.ty.shape[1])
        present = tuple(n for n in combine.OP.optional if n in args)
        padded = bool(attrs.get("inner"))
        # A gate without `mix` is the usual one, a sigmoid.
        kind = SharedGate(attrs.get("mix", SharedGate.SIGMOID.value))
        mix = (kind, float(attrs.get("shared_scale", 1.0)))
        model = self.spec.dtype
        kernel = self.kernel(
            "combine", (width, dtype, scale, present, padded, mix),
            lambda s: finish.combine(
                s, self.isa, width, dtype, scale, present, padded, mix, model
            ),
        )  # fmt: skip
        operands = [args["routed"], *(args[n] for n in present)]
        return self.call(bb, kernel, operands, call.ty.shape[0], call.ty)[0]

    def _sum_rows(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, top_k = sum_rows.OP.bind(call), self.spec.experts.top_k
        width, weighted = int(call.ty.shape[1]), "topk_weights" in args
        kernel = self.kernel(
            "sum_rows", (width, weighted),
            lambda s: rows.sum_rows(s, self.isa, width, top_k, weighted),
        )  # fmt: skip
        return self.call(bb, kernel, list(args.values()), call.ty.shape[0], call.ty)[0]

    def _pass_weight(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = pass_weight.OP.bind(call), attributes(call)
        first, count = int(attrs["first"]), int(attrs["count"])
        kernel = self.kernel(
            "pass_weight", (first, count),
            lambda s: rows.pass_weight(s, self.isa, self.spec.experts.top_k, first, count),
        )  # fmt: skip
        return self.call(bb, kernel, list(args.values()), call.ty.shape[0], call.ty)[0]


def weight_panels(spec: MoESpec, isa: Isa) -> dict[str, Panels]:
    """The packed form of every matrix parameter of a block."""
    out = {}
    for name, parameter in spec.parameters().items():
        if name not in MATRICES:
            continue
        *groups, rows, cols = parameter.shape
        gated = name == "gate_up" and spec.experts.gated
        gated |= name == "shared_gate_up" and spec.shared is not None and spec.shared.gated
        count, dtype = groups[0] if groups else 1, parameter.dtype
        short = name not in _SMALL and compact.fits(isa, dtype)
        out[name] = Panels(count, rows, cols, dtype, gated, isa.panel, short)
    return out


MATRICES = (
    "router", "gate_up", "down", "latent_in", "latent_out", "shared_gate_up", "shared_down",
    "shared_router",
)  # fmt: skip
# Nothing is gained by reading less of these, and code for two forms takes its time to generate.
_SMALL = ("router", "shared_router")
# Bias vectors are packed in the order of their matrix's panel columns.
BIASES = {
    "router_bias": "router",
    "gate_up_bias": "gate_up",
    "down_bias": "down",
    "shared_router_bias": "shared_router",
}


def packing(spec: MoESpec, isa: Isa, prefix: str) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    """(how each parameter is bound, the packing kernels by symbol)."""
    panels = weight_panels(spec, isa)
    packed: dict[str, Packed] = {}
    kernels = {}
    for name, parameter in spec.parameters().items():
        symbol = f"{prefix}_pack_{name}"
        if name in panels:
            own = panels[name]
            per_expert = len(parameter.shape) == 3
            kernels[symbol] = pack.pack_matrix(symbol, isa, own, per_expert)
            packed[name] = Packed(name, own.shape, own.word, symbol, per_expert)
        elif name in BIASES:
            own = panels[BIASES[name]]
            kernels[symbol] = pack.pack_bias(symbol, isa, own, len(parameter.shape) == 2)
            packed[name] = Packed(name, own.bias_shape, "float32", symbol, False)
        else:
            packed[name] = Packed(name, parameter.shape, parameter.dtype, None, False)
    return packed, kernels
