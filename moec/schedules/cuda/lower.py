"""Legalize the ops of a block for CUDA: each op becomes calls of kernels of this folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm import relax

from ...ops import combine, grouped_matmul, indexed_matmul, linear, rms_norm, route, sort
from ...ops.define import OpDef, attributes, dtype_of
from ...spec import ActivationSpec, MoESpec
from ..buffers import Kernel
from ..program import Legalize, Lowering, origin
from . import decode, dense, finish, prefill, simple, stream
from . import route as route_kernel
from . import sort as sort_kernel
from .shapes import Matmul

SMS = 132  # multiprocessors of an H100 SXM and an H200; fewer run the same grid in more waves

_DECODE_RINGS = 176, 192  # KiB of shared memory for weights in flight, by kernel


@dataclass(frozen=True)
class CudaConfig:
    """Which family of kernels multiplies, and its tiles for the first and second matmul.

    `blocks`: the sort runs in two launches of several blocks instead of one of one. `few`:
    the dense matmuls of the block are those of at most 8 tokens.
    """

    family: str
    first: Any = None
    second: Any = None
    tile_rows: int = 64
    grain: int = 0
    blocks: bool = False
    few: bool = False


@dataclass
class _Made:
    """What legalization remembers of the values it made, by the kernel call behind them."""

    tiles: dict[Any, list[Any]] = field(default_factory=dict)  # sort -> its results
    ids: dict[Any, Any] = field(default_factory=dict)  # sort -> topk_ids
    rows: dict[Any, tuple[Any, Any, float]] = field(default_factory=dict)  # -> ids, weights, scale


class CudaLowering(Lowering):
    """Legalization of one block."""

    def __init__(self, spec: MoESpec, prefix: str) -> None:
        super().__init__(prefix)
        self.spec = spec

    def table(self, config: Any) -> Mapping[str, Legalize]:
        """The legalize map of one schedule."""
        return _Table(self, config).table()


class _Table:
    """The legalization functions of one schedule of one block."""

    def __init__(self, lowering: CudaLowering, config: CudaConfig) -> None:
        self.own, self.config, self.spec = lowering, config, lowering.spec
        self.made = _Made()

    def table(self) -> Mapping[str, Legalize]:
        pairs: tuple[tuple[OpDef, Legalize], ...] = (
            (rms_norm.OP, self._norm),
            (linear.OP, self._linear),
            (route.OP, self._route),
            (sort.OP, self._sort),
            (grouped_matmul.OP, self._grouped),
            (indexed_matmul.OP, self._indexed),
            (combine.OP, self._combine),
        )
        return {op.full_name: function for op, function in pairs}

    # -- helpers ----------------------------------------------------------------------------
    def _call(
        self, bb: relax.BlockBuilder, kernel: Kernel, args: list[Any], like: Any, ty: Any
    ) -> list[Any]:
        return self.own.call(bb, kernel, args, like.ty.shape[0], ty)

    def _behind(self, bb: relax.BlockBuilder, value: Any) -> Any:
        found = origin(lambda v: bb.lookup_binding(v), value)
        return None if found is None else found[0]

    def _whole(self, bb: relax.BlockBuilder, value: Any) -> Any:
        """A routed sum as [T, H] float32; what only waits to be summed is summed here."""
        pending = self.made.rows.get(self._behind(bb, value))
        if pending is None:
            return value
        return self._finish(bb, value, pending, "float32", value.ty, {})

    def _finish(
        self,
        bb: relax.BlockBuilder,
        rows: Any,
        pending: tuple[Any, Any, float],
        out: str,
        ty: Any,
        extra: dict[str, Any],
        scale: float = 1.0,
    ) -> Any:
        ids, weights, own_scale = pending
        e, residual = self.spec.experts, extra.get("residual")
        spec = finish.Finish(
            e.num_experts, e.top_k, e.hidden_size, self.spec.dtype, out, weights is not None,
            own_scale * scale, "shared" in extra, "gate" in extra,
            None if residual is None else dtype_of(residual.ty),
        )  # fmt: skip
        kernel = self.own.kernel("finish", (spec,), lambda s: finish.finish(s, spec))
        args = [rows, ids, *(v if v is not None else ids for v in
                (weights, extra.get("shared"), extra.get("gate"), residual))]  # fmt: skip
        return self._call(bb, kernel, args, ids, ty)[0]

    # -- ops --------------------------------------------------------------------------------
    def _norm(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = rms_norm.OP.bind(call), attributes(call)
        spec, width = rms_norm.spec_of(attrs), self.spec.experts.hidden_size
        x, out = self._whole(bb, args["x"]), str(attrs["dtype"])
        kernel = self.own.kernel(
            "norm", (spec, dtype_of(x.ty), out),
            lambda s: dense.rms_norm(s, spec, width, dtype_of(x.ty), out),
        )  # fmt: skip
        return self._call(bb, kernel, [x, args.get("weight", x)], call, call.ty)[0]

    def _linear(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = linear.OP.bind(call), attributes(call)
        x, weight, bias = args["x"], args["weight"], args.get("bias")
        act, gated = _activation(attrs)
        rows, inner = (int(d) for d in weight.ty.shape)
        outer = rows // 2 if gated else rows
        out, x_dtype = dtype_of(call.ty), dtype_of(x.ty)
        if self.config.few and inner % 8 == 0:
            few = dense.Few(inner, outer, x_dtype, dtype_of(weight.ty), out, bias is not None,
                            gated, act)  # fmt: skip
            kernel = self.own.kernel(weight.name, (few,), lambda s: dense.few(s, few))
            operands = [x, weight, weight if bias is None else bias]
        else:
            spec = simple.Simple(
                0, self.spec.experts.top_k, inner, outer, x_dtype, dtype_of(weight.ty), out,
                bias is not None, gated, act,
            )  # fmt: skip
            kernel = self.own.kernel(weight.name, (spec,), lambda s: simple.matmul(s, spec, SMS))
            operands = [x, x, x, x, x, weight, weight if bias is None else bias]
        return self._call(bb, kernel, operands, call, call.ty)[0]

    def _route(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = route.OP.bind(call), attributes(call)
        spec, dtype, logits = route.spec_of(attrs), str(attrs["dtype"]), args["logits"]
        kernel = self.own.kernel("route", (spec,), lambda s: route_kernel.route(s, spec, dtype))
        vectors = [args.get(n, logits) for n in ("selection_bias", "per_expert_scale")]
        return relax.Tuple(self._call(bb, kernel, [logits, *vectors], logits, call.ty)[:2])

    def _sort(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        ids, e, config = sort.OP.bind(call)["topk_ids"], self.spec.experts, self.config
        counts = ids
        if config.blocks:
            counter = self.own.kernel(
                "count", (), lambda s: sort_kernel.count(s, e.num_experts, e.top_k)
            )
            counts = self.own.call(bb, counter, [ids], ids.ty.shape[0])[0]
        key = (config.tile_rows, config.blocks, config.grain)
        kernel = self.own.kernel(
            "sort", key, lambda s: sort_kernel.sort(s, e.num_experts, e.top_k, *key)
        )
        outs = self._call(bb, kernel, [ids, counts], ids, call.ty)
        behind = self._behind(bb, outs[0])
        self.made.tiles[behind], self.made.ids[behind] = outs, ids
        return relax.Tuple(outs[:2])

    def _grouped(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = grouped_matmul.OP.bind(call), attributes(call)
        sorting = self._behind(bb, args["expert_offsets"])
        order, _, tiles, count = self.made.tiles[sorting]
        reduce = bool(attrs.get("reduce"))
        kernel = self._matmul(args, attrs, reduce)
        bias = args.get("bias", args["weight"])
        ids = self.made.ids[sorting]
        weights = args.get("topk_weights", ids)
        simple_ones = [weights] if self.config.family == "simple" else []
        operands = [args["x"], order, tiles, count, *simple_ones, args["weight"], bias]
        rows = self._call(bb, kernel, operands, ids, call.ty)[0]
        if not reduce:
            return rows
        pending = (ids, args.get("topk_weights"), float(attrs.get("out_scale", 1.0)))
        if "out_scale" in attrs:  # the block's result: nothing else will sum the rows
            return self._finish(bb, rows, pending, dtype_of(call.ty), call.ty, {})
        self.made.rows[self._behind(bb, rows)] = pending
        return rows

    def _matmul(self, args: dict[str, Any], attrs: dict[str, Any], reduce: bool) -> Kernel:
        """The grouped kernel of one of the two expert matmuls."""
        e, config, dtype = self.spec.experts, self.config, self.spec.dtype
        widths = (e.intermediate_size, e.hidden_size) if reduce else (
            e.hidden_size, e.intermediate_size)  # fmt: skip
        act, gated = _activation(attrs)
        role, biased = ("down" if reduce else "gate_up"), "bias" in args
        if config.family == "simple":
            spec = simple.Simple(
                e.num_experts, e.top_k, *widths, dtype_of(args["x"].ty),
                dtype_of(args["weight"].ty), dtype, biased, gated, act, not reduce, reduce,
                not reduce and "topk_weights" in args,
            )  # fmt: skip
            return self.own.kernel(role, (spec,), lambda s: simple.matmul(s, spec, 2 * SMS))
        shape = Matmul(e.num_experts, e.top_k, *widths, gated, biased, dtype)
        module: Any = stream if config.family == "stream" else prefill
        if reduce:
            return self.own.kernel(
                role, (shape, config.second), lambda s: module.down(s, shape, config.second, SMS)
            )
        return self.own.kernel(
            role, (shape, act, config.first),
            lambda s: module.gate_up(s, shape, act, config.first, SMS),
        )  # fmt: skip

    def _indexed(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = indexed_matmul.OP.bind(call), attributes(call)
        e, dtype, ids = self.spec.experts, self.spec.dtype, args["topk_ids"]
        biased, bias = "bias" in args, args.get("bias", args["weight"])
        if attrs.get("reduce"):
            out, scale = dtype_of(call.ty), float(attrs.get("out_scale", 1.0))
            shape = Matmul(e.num_experts, e.top_k, e.intermediate_size, e.hidden_size, False,
                           biased, dtype)  # fmt: skip
            config = self.config.second or decode.fitting(e.intermediate_size, _DECODE_RINGS[1])
            kernel = self.own.kernel(
                "down", (shape, config, out, scale),
                lambda s: decode.down(s, shape, config, SMS, out, scale),
            )  # fmt: skip
            operands = [args["x"], ids, args["topk_weights"], args["weight"], bias]
            return self._call(bb, kernel, operands, ids, call.ty)[0]
        act, gated = _activation(attrs)
        assert act is not None
        shape = Matmul(e.num_experts, e.top_k, e.hidden_size, e.intermediate_size, gated, biased,
                       dtype)  # fmt: skip
        first = self.config.first or decode.fitting(e.hidden_size, _DECODE_RINGS[0])
        kernel = self.own.kernel(
            "gate_up", (shape, act, first),
            lambda s: decode.gate_up(s, shape, act, first, SMS),
        )  # fmt: skip
        return self._call(bb, kernel, [args["x"], ids, args["weight"], bias], ids, call.ty)[0]

    def _combine(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = combine.OP.bind(call), attributes(call)
        out, scale, routed = str(attrs["dtype"]), float(attrs["scale"]), args["routed"]
        extra = {n: args[n] for n in combine.OP.optional if n in args}
        pending = self.made.rows.get(self._behind(bb, routed))
        if pending is not None:
            return self._finish(bb, routed, pending, out, call.ty, extra, scale)
        residual = extra.get("residual")
        spec = finish.Finish(
            0, 1, self.spec.experts.hidden_size, "float32", out, False, scale, "shared" in extra,
            "gate" in extra, None if residual is None else dtype_of(residual.ty),
        )  # fmt: skip
        kernel = self.own.kernel("combine", (spec,), lambda s: finish.finish(s, spec))
        args_ = [routed, routed, routed, *(extra.get(n, routed) for n in
                 ("shared", "gate", "residual"))]  # fmt: skip
        return self._call(bb, kernel, args_, call, call.ty)[0]


def _activation(attrs: Mapping[str, Any]) -> tuple[ActivationSpec | None, bool]:
    if not attrs.get("activation"):
        return None, False
    return grouped_matmul.activation_of(attrs)
