"""Legalize the ops of a block for CUDA: each op becomes calls of kernels of this folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
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
from ...spec import ActivationSpec, MoESpec, SharedGate
from ...target import Form
from ..buffers import Kernel
from ..program import Legalize, Lowering, origin
from . import compact, decode, dense, finish, loop, mma, simple, stream, thin
from . import route as route_kernel
from . import sort as sort_kernel
from .config import CudaConfig
from .decode_config import first_config, second_config
from .script import quick_macros
from .shapes import Matmul

SMS = 132  # multiprocessors of an H100 SXM and an H200; fewer run the same grid in more waves

# What tensor cores multiply; float32 weights are multiplied by float32 FMA, not rounded to TF32.
TENSOR_DTYPES = ("bfloat16", "float16")
# A dense weight with so few rows is read by warps, an output each: tiles would be too few to
# occupy the GPU. Up to _NARROW while there are few tokens, up to _THIN however many there are.
_NARROW, _THIN = 1024, 64


@dataclass
class _Made:
    """What legalization remembers of the values it made, by the kernel call behind them."""

    tiles: dict[Any, list[Any]] = field(default_factory=dict)  # sort -> its results
    ids: dict[Any, Any] = field(default_factory=dict)  # sort -> topk_ids
    rows: dict[Any, tuple[Any, Any, float]] = field(default_factory=dict)  # -> ids, weights, scale
    thin: dict[Any, tuple[Any, list[Any]]] = field(default_factory=dict)  # -> spec, operands
    each: dict[Any, Any] = field(default_factory=dict)  # rows that sum_rows will sum -> ids


class CudaLowering(Lowering):
    """Legalization of one block; `clusters`: the GPU has clusters of blocks (Hopper)."""

    def __init__(self, spec: MoESpec, prefix: str, clusters: bool, form: Form) -> None:
        super().__init__(prefix)
        self.spec, self.clusters, self.form = spec, clusters, form

    def kernel(self, role: str, key: tuple[Any, ...], make: Callable[[str], Kernel]) -> Kernel:
        """As every lowering has it."""
        with quick_macros():
            return super().kernel(role, key, make)

    def table(self, config: Any) -> Mapping[str, Legalize]:
        """The legalize map of one schedule."""
        return _Table(self, config, config.reads(self.form)).table()

    def names(self, config: Any) -> Mapping[str, str]:
        """As every lowering has it."""
        return compact.names(self.form) if config.reads(self.form) is Form.COMPACT else {}


class _Table:
    """The legalization functions of one schedule of one block."""

    def __init__(self, lowering: CudaLowering, config: CudaConfig, form: Form) -> None:
        self.own, self.config, self.spec = lowering, config.of(form), lowering.spec
        self.form = form
        self.made = _Made()

    def table(self) -> Mapping[str, Legalize]:
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

    def _dtype(self, bb: relax.BlockBuilder, value: Any) -> str:
        """What a value is stored as: rows of the experts are narrower than the graph says."""
        made = self.own.buffer(bb, value)
        return dtype_of(value.ty) if made is None else made.dtype

    def _finish(
        self,
        bb: relax.BlockBuilder,
        rows: Any,
        pending: tuple[Any, Any, float] | None,
        out: str,
        ty: Any,
        extra: dict[str, Any],
        attrs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The kernel that sums `pending` rows (None: rows [T, width] as they are) and adds."""
        attrs = attrs or {}
        ids, weights, own_scale = pending or (rows, None, 1.0)
        e, gate = self.spec.experts, SharedGate.NONE
        if "gate" in extra:  # without `mix` it is the usual one
            gate = SharedGate(attrs.get("mix", SharedGate.SIGMOID.value))
        stored = {n: dtype_of(extra[n].ty) for n in ("residual", "passed") if n in extra}
        spec = finish.Finish(
            e.num_experts if pending else 0, e.top_k if pending else 1, int(ty.shape[1]),
            self._dtype(bb, rows), out, weights is not None,
            own_scale * float(attrs.get("scale", 1.0)), "shared" in extra, gate,
            float(attrs.get("shared_scale", 1.0)), stored.get("residual"), stored.get("passed"),
            "bias" in extra,
        )  # fmt: skip
        role = "finish" if pending else "combine"
        kernel = self.own.kernel(role, (spec,), lambda s: finish.finish(s, spec))
        present = [weights, *(extra.get(name) for name in finish.OPTIONAL)]
        args = [rows, ids, *(ids if v is None else v for v in present)]
        return self._call(bb, kernel, args, ids, ty)[0]

    # -- ops --------------------------------------------------------------------------------
    def _norm(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = rms_norm.OP.bind(call), attributes(call)
        spec, width = rms_norm.spec_of(attrs), int(call.ty.shape[1])
        x, out = self._whole(bb, args["x"]), str(attrs["dtype"])
        ids = self.made.each.get(self._behind(bb, x))
        copies = 1 if ids is None else self.spec.experts.top_k
        key = (spec, width, self._dtype(bb, x), out, copies)
        kernel = self.own.kernel("norm", key, lambda s: dense.rms_norm(s, *key))
        y = self._call(
            bb, kernel, [x, args.get("weight", x)], call if ids is None else ids, call.ty
        )[0]
        if ids is not None:
            self.made.each[self._behind(bb, y)] = ids
        return y

    def _linear(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = linear.OP.bind(call), attributes(call)
        x, weight, bias = self._whole(bb, args["x"]), args["weight"], args.get("bias")
        act, gated = _activation(attrs)
        rows, inner = (int(d) for d in weight.ty.shape)
        outer = rows // 2 if gated else rows
        out, x_dtype, w_dtype = dtype_of(call.ty), self._dtype(bb, x), dtype_of(weight.ty)
        given = [weight, weight if bias is None else bias]
        epilogue = (out, bias is not None, gated, act)
        top_k, rows_a_tile = self.spec.experts.top_k, self.config.tile_rows
        narrow = outer <= _THIN or (not gated and outer <= _NARROW and rows_a_tile <= 64)
        tensor_cores = x_dtype == w_dtype and x_dtype in TENSOR_DTYPES and inner % 8 == 0
        if tensor_cores and (self.config.few or narrow):
            slim = thin.Thin(inner, outer, x_dtype, *epilogue)
            kernel = self.own.kernel(weight.name, (slim,), lambda s: thin.few(s, slim))
            operands = [x, *given]
            result = self._call(bb, kernel, operands, call, call.ty)[0]
            if self.own.clusters and act is None and out == "float32":
                self.made.thin[self._behind(bb, result)] = slim, operands
            return result
        if inner % 8 == 0 and (self.config.few or narrow):
            few = dense.Few(inner, outer, x_dtype, w_dtype, *epilogue)
            kernel = self.own.kernel(weight.name, (few,), lambda s: dense.few(s, few))
            operands = [x, *given]
        elif tensor_cores and self.config.family != "simple" and outer % 2 == 0:
            tiles = mma.SMALL if rows_a_tile <= 32 else mma.LARGE
            tensor = mma.Mma(0, top_k, inner, outer, x_dtype, *epilogue)
            kernel = self.own.kernel(
                weight.name, (tensor, tiles), lambda s: mma.matmul(s, tensor, tiles, SMS)
            )
            operands = [x, x, x, x, *given]
        else:
            spec = simple.Simple(0, top_k, inner, outer, x_dtype, w_dtype, *epilogue)
            kernel = self.own.kernel(weight.name, (spec,), lambda s: simple.matmul(s, spec, SMS))
            operands = [x, x, x, x, x, *given]
        return self._call(bb, kernel, operands, call, call.ty)[0]

    def _route(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = route.OP.bind(call), attributes(call)
        spec, dtype, logits = route.spec_of(attrs), str(attrs["dtype"]), args["logits"]
        # The router's matmul moves into this launch; what computed the logits is dropped.
        linear, matmul = self.made.thin.get(self._behind(bb, logits), (None, [logits] * 3))
        kernel = self.own.kernel(
            "route", (spec, linear), lambda s: route_kernel.route(s, spec, dtype, linear)
        )
        operands = [*matmul, *(args.get(name, matmul[0]) for name in route_kernel.OPERANDS)]
        return relax.Tuple(self._call(bb, kernel, operands, logits, call.ty)[:2])

    def _sort(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        return relax.Tuple(self._sorted(bb, sort.OP.bind(call)["topk_ids"], call.ty)[:2])

    def _sorted(self, bb: relax.BlockBuilder, ids: Any, ty: Any | None = None) -> list[Any]:
        """row_order, expert_offsets, tiles and tile_count of topk_ids."""
        e, config, counts = self.spec.experts, self.config, ids
        if config.sorted_by is sort_kernel.Grid.COUNTED:
            counter = self.own.kernel(
                "count", (), lambda s: sort_kernel.count(s, e.num_experts, e.top_k)
            )
            counts = self.own.call(bb, counter, [ids], ids.ty.shape[0])[0]
        key = (config.tile_rows, config.sorted_by, config.grain)
        kernel = self.own.kernel(
            "sort", key, lambda s: sort_kernel.sort(s, e.num_experts, e.top_k, *key)
        )
        outs = self._call(bb, kernel, [ids, counts], ids, ty)
        behind = self._behind(bb, outs[0])
        self.made.tiles[behind], self.made.ids[behind] = outs, ids
        return outs

    def _grouped(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = grouped_matmul.OP.bind(call), attributes(call)
        sorting = self._behind(bb, args["expert_offsets"])
        order, _, tiles, count = self.made.tiles[sorting]
        reduce, ids = bool(attrs.get("reduce")), self.made.ids[sorting]
        x, weights = self._weighted(bb, args, ids) if not reduce else (args["x"], ids)
        kernel = self._matmul(args, attrs, reduce)
        bias = args.get("bias", args["weight"])
        simple_ones = [weights] if self.config.family == "simple" else []
        operands = [x, order, tiles, count, *simple_ones, args["weight"], bias]
        rows = self._call(bb, kernel, operands, ids, call.ty)[0]
        if not reduce:
            return rows
        if attrs.get("each"):
            self.made.each[self._behind(bb, rows)] = ids
            return rows
        pending = (ids, args.get("topk_weights"), float(attrs.get("out_scale", 1.0)))
        if "out_scale" in attrs:  # the block's result: nothing else will sum the rows
            return self._finish(bb, rows, pending, dtype_of(call.ty), call.ty, {})
        self.made.rows[self._behind(bb, rows)] = pending
        return rows

    def _weighted(self, bb: relax.BlockBuilder, args: dict[str, Any], ids: Any) -> tuple[Any, Any]:
        """(x, weights) of the first matmul where the routing weight may multiply its input.

        The plain kernel multiplies by itself; tensor cores read rows that are multiplied
        already, of which there is one a token with top_k = 1 (see this folder's __init__).
        """
        x, weights = args["x"], args.get("topk_weights")
        if weights is None or self.config.family == "simple":
            return x, ids if weights is None else weights
        key = (self.spec.experts.width, self.spec.dtype)
        kernel = self.own.kernel("weigh", key, lambda s: dense.weigh(s, *key))
        return self._call(bb, kernel, [x, weights], ids, x.ty)[0], ids

    def _matmul(self, args: dict[str, Any], attrs: dict[str, Any], reduce: bool) -> Kernel:
        """The grouped kernel of one of the two expert matmuls."""
        e, config, dtype = self.spec.experts, self.config, self.spec.dtype
        widths = (e.intermediate_size, e.width) if reduce else (e.width, e.intermediate_size)
        act, gated = _activation(attrs)
        role, biased = ("down" if reduce else "gate_up"), "bias" in args
        if config.family == "simple":
            spec = simple.Simple(
                e.num_experts, e.top_k, *widths, dtype_of(args["x"].ty),
                dtype_of(args["weight"].ty), "float32" if attrs.get("each") else dtype, biased,
                gated, act, not reduce, reduce, not reduce and "topk_weights" in args,
            )  # fmt: skip
            return self.own.kernel(role, (spec,), lambda s: simple.matmul(s, spec, 2 * SMS))
        if config.family == "mma":
            tensor = mma.Mma(e.num_experts, e.top_k, *widths, dtype, dtype, biased, gated, act,
                             not reduce, reduce)  # fmt: skip
            return self.own.kernel(
                role, (tensor, config.tiles),
                lambda s: mma.matmul(s, tensor, config.tiles, 2 * SMS),
            )  # fmt: skip
        shape = Matmul(e.num_experts, e.top_k, *widths, gated, biased, dtype, self.form)
        if reduce:
            return self.own.kernel(
                role, (shape, config.tiles), lambda s: stream.down(s, shape, config.tiles, SMS)
            )
        key = (shape, act or ActivationSpec(), config.tiles)  # the first matmul always has one
        return self.own.kernel(role, key, lambda s: stream.gate_up(s, *key, SMS))

    def _indexed(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = indexed_matmul.OP.bind(call), attributes(call)
        e, dtype, ids = self.spec.experts, self.spec.dtype, args["topk_ids"]
        biased, bias, form = "bias" in args, args.get("bias", args["weight"]), self.form
        if attrs.get("reduce"):
            out, scale = dtype_of(call.ty), float(attrs.get("out_scale", 1.0))
            shape = Matmul(e.num_experts, e.top_k, e.intermediate_size, e.width, False,
                           biased, dtype, form)  # fmt: skip
            config = second_config(e.intermediate_size, e.width, SMS, form)
            kernel = self.own.kernel(
                "down", (shape, config, out, scale),
                lambda s: decode.down(s, shape, config, SMS, out, scale),
            )  # fmt: skip
            operands = [args["x"], ids, args["topk_weights"], args["weight"], bias]
            return self._call(bb, kernel, operands, ids, call.ty)[0]
        act, gated = _activation(attrs)
        assert act is not None
        shape = Matmul(e.num_experts, e.top_k, e.width, e.intermediate_size, gated, biased,
                       dtype, form)  # fmt: skip
        first = first_config(e.width, form)
        kernel = self.own.kernel(
            "gate_up", (shape, act, first),
            lambda s: decode.gate_up(s, shape, act, first, SMS),
        )  # fmt: skip
        return self._call(bb, kernel, [args["x"], ids, args["weight"], bias], ids, call.ty)[0]

    def _combine(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = combine.OP.bind(call), attributes(call)
        routed = args["routed"]
        extra = {n: args[n] for n in combine.OP.optional if n in args}
        pending = self.made.rows.get(self._behind(bb, routed))
        return self._finish(bb, routed, pending, str(attrs["dtype"]), call.ty, extra, attrs)

    def _sum_rows(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args = sum_rows.OP.bind(call)
        rows = args["rows"]
        pending = (self.made.each[self._behind(bb, rows)], args.get("topk_weights"), 1.0)
        return self._finish(bb, rows, pending, "float32", call.ty, {})

    def _pass_weight(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = pass_weight.OP.bind(call), attributes(call)
        key = (self.spec.experts.top_k, int(attrs["first"]), int(attrs["count"]))
        kernel = self.own.kernel("pass_weight", key, lambda s: finish.pass_weight(s, *key))
        return self._call(bb, kernel, list(args.values()), call, call.ty)[0]

    def _loop(self, bb: relax.BlockBuilder, call: relax.Call) -> Any:
        args, attrs = expert_loop.OP.bind(call), attributes(call)
        e, dtype, each = self.spec.experts, self.spec.dtype, bool(attrs.get("each"))
        weighted = bool(attrs["weighted_input"])
        ids, weights = args["topk_ids"], args["topk_weights"]
        order, offsets, _, count = self._sorted(bb, ids)
        act, gated = grouped_matmul.activation_of(attrs)
        specs = (
            simple.Simple(
                e.num_experts, e.top_k, e.width, e.intermediate_size, dtype_of(args["x"].ty),
                dtype_of(args["gate_up"].ty), dtype, "gate_up_bias" in args, gated, act, True,
                False, weighted, True,
            ),
            simple.Simple(
                e.num_experts, e.top_k, e.intermediate_size, e.width, dtype,
                dtype_of(args["down"].ty), "float32" if each else dtype, "down_bias" in args,
                scatter=True, single=True,
            ),
        )  # fmt: skip
        kernel = self.own.kernel("loop", specs, lambda s: self._each_expert(s, *specs))
        operands = [args["x"], order, offsets, count, weights, args["gate_up"],
                    args.get("gate_up_bias", args["gate_up"]), args["down"],
                    args.get("down_bias", args["down"])]  # fmt: skip
        rows = self._call(bb, kernel, operands, ids, call.ty)[0]
        if each:
            self.made.each[self._behind(bb, rows)] = ids
        else:
            self.made.rows[self._behind(bb, rows)] = (ids, None if weighted else weights, 1.0)
        return rows

    def _each_expert(self, symbol: str, first: simple.Simple, second: simple.Simple) -> Kernel:
        one = self.own.kernel("one_gate_up", (first,), lambda s: simple.matmul(s, first, 2 * SMS))
        two = self.own.kernel("one_down", (second,), lambda s: simple.matmul(s, second, 2 * SMS))
        *shared, gate_up, gate_up_bias, h = one.args
        _, *_, down, down_bias, rows = two.args
        operands = [*shared, gate_up, gate_up_bias, down, down_bias]
        steps = [(one, (0, 1, 2, 3, 4, 5, 6, 10)), (two, (10, 1, 2, 3, 4, 7, 8, 9))]
        return loop.expert_loop(symbol, operands, [rows, h], steps, first.experts)


def _activation(attrs: Mapping[str, Any]) -> tuple[ActivationSpec | None, bool]:
    if not attrs.get("activation"):
        return None, False
    return grouped_matmul.activation_of(attrs)
