"""Kernels of everything that is not an expert: plain matmuls, norms, sums of rows."""

from __future__ import annotations

from ...spec import ActivationSpec, NormSpec
from ..buffers import Buf, Kernel, PerToken
from .experts import STORAGE, VECTOR4, Projection
from .kernel import Stage, build, ceil_div
from .source import FORMATS, activation, flag, number
from .tile import Tile


def linear(symbol: str, p: Projection, tile: Tile | None) -> Kernel:
    """x [T, K] times weight [N, K] (+ bias) -> y [T, N] float32, by tiles, or None: by mat-vecs."""
    args = (p.input("x", 1), *p.args(), Buf("y", (PerToken(), p.columns), "float32"))
    options = f"{p.formats}, {p.vector}, {flag(p.bias)}"
    absent = () if p.bias else ("bias",)
    if tile:
        stage = Stage(
            ("tiles",), "",
            f"moec::dense_linear<{tile.type}, {options}>(x, weight, bias, y, columns, width, "
            "tokens, scratch, bx, by, tid);",
            lambda t, c: (ceil_div(c.columns, tile.columns), ceil_div(t, tile.rows)),
            tile.threads, tile.scratch4, absent,
        )  # fmt: skip
    else:
        stage = Stage(
            ("vector",), "",
            f"moec::vector_linear<{options}>(x, weight, bias, y, columns, width, scratch, bx, by, "
            "tid);",
            lambda t, c: (ceil_div(c.columns, 16), t), 128, VECTOR4, absent,
        )  # fmt: skip
    return build(symbol, args, len(args) - 1, {"columns": p.columns, "width": p.width}, [stage])


def gate_up(
    symbol: str, p: Projection, act: ActivationSpec, hidden: str, tile: Tile | None
) -> Kernel:
    """x [T, H] times gate_up [2F, H] -> activated h [T, F]: the shared expert's first half."""
    args = (p.input("x", 1), *p.args(), Buf("h", (PerToken(), p.columns), STORAGE[hidden]))
    kinds = f"{p.formats}, {FORMATS[hidden]}, Act, {p.vector}, true"
    if tile:
        body = (
            f"moec::dense_gate_up<{tile.type}, {kinds}>(x, weight, h, columns, width, tokens, "
            "scratch, bx, by, tid);"
        )
        stage = Stage(
            ("tiles",), activation(act, True), body,
            lambda t, c: (ceil_div(c.columns, tile.outputs(True)), ceil_div(t, tile.rows)),
            tile.threads, tile.scratch4,
        )  # fmt: skip
    else:
        body = (
            f"moec::vector_activated<{kinds}, false, false>(x + long(by) * width, weight, bias, "
            "1.0f, h + long(by) * columns, columns, width, scratch, bx, tid);"
        )
        stage = Stage(
            ("vector",), activation(act, True), body,
            lambda t, c: (ceil_div(c.columns, 8), t), 128, VECTOR4, ("bias",),
        )  # fmt: skip
    return build(symbol, args, len(args) - 1, {"columns": p.columns, "width": p.width}, [stage])


def rms_norm(symbol: str, spec: NormSpec, width: int, dtype: str, out: str) -> Kernel:
    """x [T, width] of `dtype` -> x * (mean(x^2) + eps)^-0.5 [* weight] [* scale] of `out`."""
    weight = (Buf("weight", (width,), "float32"),) if spec.weighted else ()
    args = (
        Buf("x", (PerToken(), width), STORAGE[dtype], True),
        *weight,
        Buf("y", (PerToken(), width), STORAGE[out]),
    )
    kinds = f"{FORMATS[dtype]}, {FORMATS[out]}, {flag(spec.weighted)}, {flag(spec.scale != 1.0)}"
    body = (
        f"moec::rms_norm<{kinds}>(x, weight, y, width, {number(spec.eps)}, {number(spec.scale)}, "
        "scratch, bx, tid);"
    )
    absent = () if spec.weighted else ("weight",)
    stage = Stage(("rows",), "", body, lambda t, c: (t,), 128, 1, absent)
    return build(symbol, args, len(args) - 1, {"width": width}, [stage])


def reduce_rows(symbol: str, width: int, top_k: int, weighted: bool) -> Kernel:
    """rows [S, width] in the order of pairs, (weights) -> y [T, width], summed in order of k."""
    weights = (Buf("topk_weights", (PerToken(top_k),), "float32", True),) if weighted else ()
    args = (
        Buf("rows", (PerToken(top_k), width), "float32"),
        *weights,
        Buf("y", (PerToken(), width), "float32"),
    )
    body = f"moec::reduce_rows<{flag(weighted)}>(rows, topk_weights, y, width, top_k, bx, by, tid);"
    absent = () if weighted else ("topk_weights",)
    stage = Stage(("rows",), "", body, lambda t, c: (ceil_div(c.width, 128), t), 128, 0, absent)
    return build(symbol, args, len(args) - 1, {"width": width, "top_k": top_k}, [stage])


def combine(
    symbol: str, width: int, dtype: str, residual: str, scale: float, present: tuple[str, ...]
) -> Kernel:
    """scale * routed [+ sigmoid(gate) * shared] [+ residual] -> y [T, width] of `dtype`.

    `present` names the optional operands ("shared", "gate", "residual") in this order.
    """
    optional = {
        "shared": Buf("shared", (PerToken(), width), "float32"),
        "gate": Buf("gate", (PerToken(), 1), "float32"),
        "residual": Buf("residual", (PerToken(), width), STORAGE[residual], True),
    }
    args = (
        Buf("routed", (PerToken(), width), "float32"),
        *(optional[name] for name in present),
        Buf("y", (PerToken(), width), STORAGE[dtype], True),
    )
    flags = ", ".join(flag(name in present) for name in optional)
    has_residual = "residual" in present
    kinds = f"{FORMATS[dtype]}, {FORMATS[residual] if has_residual else 'moec::f32'}, {flags}"
    body = (
        f"moec::combine<{kinds}>(routed, shared, gate, residual, y, width, {number(scale)}, bx, "
        "by, tid);"
    )
    absent = tuple(name for name in optional if name not in present)
    stage = Stage(("rows",), "", body, lambda t, c: (ceil_div(c.width, 128), t), 128, 0, absent)
    return build(symbol, args, len(args) - 1, {"width": width}, [stage])
