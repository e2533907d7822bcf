"""Type inference: results, and operands that do not fit (op, operand and both shapes)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import tvm
from tvm import relax, tirx
from tvm.script import from_source

from moec import ops
from moec.errors import BadSpec
from moec.ops import (
    activation,
    combine,
    expert_loop,
    gather_rows,
    grouped_matmul,
    indexed_matmul,
    linear,
    pass_weight,
    reduce,
    rms_norm,
    route,
    sort,
    sum_rows,
)
from moec.ops.define import dtype_of, shape_of, tensor, text
from moec.spec import ActivationSpec, NormSpec, RouterSpec

E, K, H, I = 6, 2, 20, 12
ROUTER = RouterSpec(E, K, selection_bias=True)
FOLDED = grouped_matmul.activation_attrs(ActivationSpec(), True)

Make = Callable[..., relax.Call]
Row = tuple[Make, dict[str, tuple[Any, ...]], str]


def _grouped(**attrs: Any) -> Make:
    names = ("x", "weight", "expert_offsets")

    def make(**o: Any) -> relax.Call:
        extra = {k: v for k, v in o.items() if k not in names}
        return grouped_matmul.OP.call([o[n] for n in names], extra, **attrs)

    return make


def _indexed(**attrs: Any) -> Make:
    def make(x: Any, weight: Any, topk_ids: Any, **extra: Any) -> relax.Call:
        return indexed_matmul.OP.call([x, weight, topk_ids], extra, **attrs)

    return make


def _loop(x: Any, gate_up: Any, down: Any, topk_ids: Any, topk_weights: Any, **extra: Any) -> Any:
    operands = [x, gate_up, down, topk_ids, topk_weights]
    return expert_loop.OP.call(operands, extra, weighted_input=False, top_k=K, **FOLDED)


# A dimension "T" is the symbolic number of tokens, "S" that of rows; a dtype may come last.
IDS = {"topk_ids": ("T", K, "int32")}
WEIGHTS = {"topk_weights": ("T", K)}
ORDER = {"row_order": ("S", "int32")}
OFFSETS = {"expert_offsets": (E + 1, "int32")}
GATE_UP = {"weight": (E, 2 * I, H), "bias": (E, 2 * I)}
GOOD: dict[str, Row] = {
    "linear": (linear.linear, {"x": ("T", H), "weight": (I, H), "bias": (I,)}, "[T, 12]"),
    "rms_norm": (
        lambda x, weight: rms_norm.rms_norm(x, weight, NormSpec(), "float32"),
        {"x": ("T", H), "weight": (H,)},
        "[T, 20]",
    ),
    "route": (
        lambda logits, **extra: route.route(logits, extra, ROUTER, "float32"),
        {"logits": ("T", E), "selection_bias": (E,)},
        "[T, 2] int32, [T, 2] float32",
    ),
    "sort": (lambda topk_ids: sort.sort(topk_ids, E), IDS, "[S] int32, [7] int32"),
    "gather_rows": (
        lambda x, row_order, topk_weights: gather_rows.gather_rows(x, row_order, K, topk_weights),
        {"x": ("T", H), **ORDER, **WEIGHTS},
        "[S, 20]",
    ),
    "grouped_matmul": (
        grouped_matmul.grouped_matmul, {"x": ("S", H), **GATE_UP, **OFFSETS}, "[S, 24]"
    ),
    "grouped_matmul gather": (
        _grouped(gather=True, top_k=K, **FOLDED),
        {"x": ("T", H), **GATE_UP, **OFFSETS, **ORDER, **WEIGHTS},
        "[S, 12]",
    ),
    "grouped_matmul reduce": (
        _grouped(reduce=True, top_k=K),
        {"x": ("S", I), "weight": (E, H, I), "bias": (E, H), **OFFSETS, **ORDER, **WEIGHTS},
        "[T, 20]",
    ),
    "indexed_matmul gather": (
        _indexed(gather=True, top_k=K, **FOLDED),
        {"x": ("T", H), **GATE_UP, **IDS, **WEIGHTS},
        "[S, 12]",
    ),
    "indexed_matmul reduce": (
        _indexed(reduce=True, top_k=K),
        {"x": ("S", I), "weight": (E, H, I), "bias": (E, H), **IDS, **WEIGHTS},
        "[T, 20]",
    ),
    "expert_loop": (
        _loop,
        {"x": ("T", H), "gate_up": (E, 2 * I, H), "down": (E, H, I), **IDS, **WEIGHTS,
         "gate_up_bias": (E, 2 * I), "down_bias": (E, H)},
        "[T, 20]",
    ),
    "activation": (
        lambda x: activation.activation(x, ActivationSpec(), True, "float32"),
        {"x": ("S", 2 * I)},
        "[S, 12]",
    ),
    "reduce": (
        lambda rows, row_order, topk_weights: reduce.reduce(rows, row_order, K, topk_weights),
        {"rows": ("S", H), **ORDER, **WEIGHTS},
        "[T, 20]",
    ),
    "sum_rows": (
        lambda rows, topk_weights: sum_rows.OP.call(
            [rows], {"topk_weights": topk_weights}, top_k=K),
        {"rows": ("S", H), **WEIGHTS},
        "[T, 20]",
    ),
    "pass_weight": (
        lambda topk_ids, topk_weights: pass_weight.pass_weight(topk_ids, topk_weights, E, 2),
        {**IDS, **WEIGHTS},
        "[T, 1]",
    ),
    "combine": (
        lambda **o: combine.combine(o.pop("routed"), "float32", **o),
        {"routed": ("T", H), "shared": ("T", H), "gate": ("T", 1), "residual": ("T", H)},
        "[T, 20]",
    ),
}  # fmt: skip

# op, operand, its wrong type, what the message says of it, what it says was needed
BAD: list[tuple[str, str, tuple[Any, ...], str, str]] = [
    ("linear", "x", (H,), "[20]", "[T, K]"),
    ("linear", "weight", (I, H + 1), "[12, 21]", "[N, 20]"),
    ("linear", "weight", (E, I, H), "[6, 12, 20]", "[N, 20]"),
    ("linear", "bias", (H,), "[20]", "[12]"),
    ("rms_norm", "weight", (H - 1,), "[19]", "[20]"),
    ("rms_norm", "x", ("T", H, 1), "[T, 20, 1]", "[T, H]"),
    ("route", "logits", ("T", E + 1), "[T, 7]", "[T, 6]"),
    ("route", "selection_bias", (E - 1,), "[5]", "[6]"),
    ("sum_rows", "topk_weights", ("T", K + 1), "[T, 3] float32", "[T, 2] float32"),
    ("pass_weight", "topk_ids", ("T", K), "[T, 2] float32", "[T, K] int32"),
    ("pass_weight", "topk_weights", ("T", K + 1), "[T, 3] float32", "[T, 2] float32"),
    ("sort", "topk_ids", ("T", K), "[T, 2] float32", "[T, K] int32"),
    ("sort", "topk_ids", ("T", "int32"), "[T] int32", "[T, K] int32"),
    ("gather_rows", "row_order", ("T", "int32"), "[T] int32", "[S] int32"),
    ("gather_rows", "topk_weights", ("T", K + 1), "[T, 3] float32", "[T, 2] float32"),
    ("grouped_matmul", "weight", (E, 2 * I, H + 1), "[6, 24, 21]", "[E, N, 20]"),
    ("grouped_matmul", "weight", (2 * I, H), "[24, 20]", "[E, N, width]"),
    ("grouped_matmul", "bias", (E, H), "[6, 20]", "[6, 24]"),
    ("grouped_matmul", "expert_offsets", (E, "int32"), "[6] int32", "[7] int32"),
    ("grouped_matmul gather", "x", ("S", H), "[S, 20]", "[T, width]"),
    ("grouped_matmul gather", "row_order", ("S",), "[S] float32", "[S] int32"),
    ("grouped_matmul reduce", "topk_weights", ("T", 3), "[T, 3] float32", "[T, 2] float32"),
    ("grouped_matmul reduce", "x", ("T", I), "[T, 12]", "[S, width]"),
    ("indexed_matmul gather", "topk_ids", ("T", K), "[T, 2] float32", "[T, K] int32"),
    ("indexed_matmul gather", "x", ("S", H), "[S, 20]", "[T, width]"),
    ("indexed_matmul reduce", "weight", (E, H, H), "[6, 20, 20]", "[E, N, 12]"),
    ("expert_loop", "down", (E, H, 2 * I), "[6, 20, 24]", "[6, 20, 12]"),
    ("expert_loop", "gate_up", (E, 2 * I, I), "[6, 24, 12]", "[E, N, 20]"),
    ("expert_loop", "topk_weights", ("T", 3), "[T, 3] float32", "[T, 2] float32"),
    ("expert_loop", "topk_ids", ("S", K, "int32"), "[S, 2] int32", "[T, K] int32"),
    ("expert_loop", "gate_up_bias", (E, H), "[6, 20]", "[6, 24]"),
    ("expert_loop", "down_bias", (E, I), "[6, 12]", "[6, 20]"),
    ("activation", "x", ("S", 2 * I + 1), "[S, 25]", "[rows, 2I], gate then up"),
    ("reduce", "row_order", ("T", "int32"), "[T] int32", "[S] int32"),
    ("reduce", "topk_weights", ("T", 3), "[T, 3] float32", "[T, 2] float32"),
    ("combine", "shared", ("T", I), "[T, 12]", "[T, 20]"),
    ("combine", "gate", ("T", K), "[T, 2]", "[T, 1]"),
    ("combine", "residual", ("S", H), "[S, 20]", "[T, 20]"),
]


@pytest.fixture(autouse=True)
def registered() -> None:
    ops.register()


class Sizes:
    """The symbolic T, and S = T * K, as types and as text."""

    def __init__(self) -> None:
        self.tokens = tirx.Var("tokens", "int64")

    def type(self, dims: tuple[Any, ...]) -> relax.TensorType:
        *shape, dtype = (*dims, "float32") if dims[-1] != "int32" else dims
        table = {"T": self.tokens, "S": self.tokens * K}
        return tensor([table.get(d, d) for d in shape], dtype)

    @staticmethod
    def plain(written: str) -> str:
        """A text as TVM writes it, with T for tokens and S for T * K."""
        return written.replace("tokens * 2", "S").replace("tokens", "T")


def build(row: Row, **changed: tuple[Any, ...]) -> tuple[relax.Function, Sizes]:
    """A function of one call, with some operands of another type."""
    make, operands, _ = row
    sizes = Sizes()
    params = {n: relax.Var(n, sizes.type(t)) for n, t in {**operands, **changed}.items()}
    # Built by hand, as a block builder that fails complains when it is destroyed.
    normalize = relax.BlockBuilder().normalize
    call = normalize(make(**params))
    body = relax.SeqExpr([], call)
    return relax.Function(list(params.values()), body, ret_ty=call.ty), sizes


def describe(ty: Any, sizes: Sizes) -> str:
    fields = list(ty.fields) if isinstance(ty, relax.TupleType) else [ty]
    many = len(fields) > 1
    return ", ".join(
        sizes.plain(text(shape_of(f))) + (f" {dtype_of(f)}" if many else "") for f in fields
    )


@pytest.mark.parametrize("name", GOOD)
def test_result(name: str) -> None:
    function, sizes = build(GOOD[name])
    assert describe(function.ret_ty, sizes) == GOOD[name][2]


def test_every_op_has_a_row() -> None:
    assert {op.name for op in ops.ALL} == {name.split()[0] for name in GOOD}
    assert {op.name for op in ops.ALL} == {name.split()[0] for name, *_ in BAD}


@pytest.mark.parametrize(
    ("name", "operand", "wrong", "got", "need"), BAD, ids=[f"{r[0]}-{r[1]}-{r[3]}" for r in BAD]
)
def test_an_operand_that_does_not_fit(
    name: str, operand: str, wrong: tuple[Any, ...], got: str, need: str
) -> None:
    with pytest.raises(BadSpec) as caught:
        build(GOOD[name], **{operand: wrong})
    message = Sizes.plain(caught.value.message)
    assert message == f"moec.{name.split()[0]}: operand '{operand}' is {got}, needed {need}"
    assert caught.value.exit_code == 3


def test_operands_that_must_be_there() -> None:
    spec = RouterSpec(E, K)
    make: Make = lambda logits, **extra: route.route(logits, extra, spec, "float32")  # noqa: E731
    with pytest.raises(BadSpec, match="operand 'selection_bias' is given, needed none"):
        build((make, GOOD["route"][1], ""))
    row = (lambda logits: route.route(logits, {}, ROUTER, "float32"), {"logits": ("T", E)})
    with pytest.raises(BadSpec, match=r"operand 'selection_bias' is missing, needed \[6\]"):
        build((*row, ""))
    with pytest.raises(BadSpec, match="operand 'row_order' is missing"):
        build((_grouped(gather=True, top_k=K), {"x": ("T", H), "weight": (E, I, H), **OFFSETS}, ""))
    with pytest.raises(BadSpec, match="has no operand 'speed'"):
        linear.OP.call([], {"speed": None})


def test_text_with_wrong_shapes_is_refused() -> None:
    text = """
# from tvm.script import ir as I
# from tvm.script import relax as R
@R.function
def f(x: R.Tensor((3, 20), "float32"), w: R.Tensor((12, 21), "float32")):
    y = R.moec.linear(x, w)
    return y
"""
    assert isinstance(from_source(text.replace("21", "20")), relax.Function)
    with pytest.raises(tvm.error.DiagnosticError):
        from_source(text)
