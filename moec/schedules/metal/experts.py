"""Kernels of the routed experts: grouped on simdgroup matrices, indexed as mat-vecs, looped."""

from __future__ import annotations

from dataclasses import dataclass

from ...spec import ActivationSpec
from ..buffers import Buf, Kernel, PerToken
from .kernel import Stage, build, ceil_div
from .source import FORMATS, activation, flag
from .tile import Tile

STORAGE = {"float32": "float32", "float16": "float16", "bfloat16": "uint16"}
VECTOR4 = 512  # float4s of the staged input


@dataclass(frozen=True)
class Projection:
    """A matrix parameter as a kernel reads it: `columns` outputs, of which a gated one has two
    rows (gate, then up `columns` further down), `width` inputs, and the dtypes of both sides."""

    weight: str  # dtype of the weight
    rows: str  # dtype of the rows
    columns: int
    width: int
    gated: bool
    bias: bool
    experts: int | None = None  # None: a plain matrix

    @property
    def vector(self) -> int:
        """Elements of one load: rows of a width that 4 divides can be read 4 at a time."""
        return 4 if self.width % 4 == 0 else 1

    @property
    def formats(self) -> str:
        """The first three template arguments of every kernel: W, X, and elements a load."""
        return f"{FORMATS[self.weight]}, {FORMATS[self.rows]}"

    def args(self, name: str = "weight") -> tuple[Buf, ...]:
        """The weight, and its bias when it has one."""
        lead = () if self.experts is None else (self.experts,)
        rows = self.columns * (2 if self.gated else 1)
        weight = Buf(name, (*lead, rows, self.width), STORAGE[self.weight])
        bias_name = "bias" if name == "weight" else f"{name}_bias"
        return (weight, Buf(bias_name, (*lead, rows), "float32")) if self.bias else (weight,)

    def input(self, name: str, rows: int) -> Buf:
        """The rows it multiplies, `rows` of them a token."""
        return Buf(name, (PerToken(rows), self.width), STORAGE[self.rows], True)


def _sorting(experts: int, top_k: int) -> tuple[Buf, Buf]:
    return (
        Buf("row_order", (PerToken(top_k),), "int32"),
        Buf("expert_offsets", (experts + 1,), "int32"),
    )


def _weights(weighted: bool, top_k: int) -> tuple[Buf, ...]:
    return (Buf("topk_weights", (PerToken(top_k),), "float32", True),) if weighted else ()


def _absent(**present: bool) -> tuple[str, ...]:
    return tuple(name for name, there in present.items() if not there)


def grouped_gate_up(
    symbol: str,
    p: Projection,
    act: ActivationSpec,
    hidden: str,
    top_k: int,
    weighted: bool,
    tile: Tile,
) -> Kernel:
    """x [T, H], row_order [S], expert_offsets [E+1], (weights), gate_up -> h [S, I] sorted."""
    assert p.experts is not None
    args = (
        p.input("x", 1),
        *_sorting(p.experts, top_k),
        *_weights(weighted, top_k),
        *p.args(),
        Buf("h", (PerToken(top_k), p.columns), STORAGE[hidden]),
    )
    body = (
        f"moec::grouped_gate_up<{tile.type}, {p.formats}, {FORMATS[hidden]}, Act, {p.vector}, "
        f"{flag(p.gated)}, {flag(p.bias)}, {flag(weighted)}>(x, row_order, expert_offsets, "
        "topk_weights, weight, bias, h, experts, top_k, columns, width, tokens * top_k, scratch, "
        "bx, by, tid);"
    )
    stage = Stage(
        ("tiles",), activation(act, p.gated), body,
        lambda t, c: (ceil_div(c.columns, tile.outputs(p.gated)), tile.count(t, c)),
        tile.threads, tile.scratch4, _absent(topk_weights=weighted, bias=p.bias),
    )  # fmt: skip
    constants = {"experts": p.experts, "top_k": top_k, "columns": p.columns, "width": p.width}
    return build(symbol, args, len(args) - 1, constants, [stage])


def grouped_down(symbol: str, p: Projection, top_k: int, tile: Tile) -> Kernel:
    """h [S, I] sorted, row_order, expert_offsets, down -> rows [S, H] in the order of pairs."""
    assert p.experts is not None
    args = (
        p.input("h", top_k),
        *_sorting(p.experts, top_k),
        *p.args(),
        Buf("rows", (PerToken(top_k), p.columns), "float32"),
    )
    body = (
        f"moec::grouped_down<{tile.type}, {p.formats}, {p.vector}, {flag(p.bias)}>(h, row_order, "
        "expert_offsets, weight, bias, rows, experts, columns, width, tokens * top_k, scratch, "
        "bx, by, tid);"
    )
    stage = Stage(
        ("tiles",), "", body,
        lambda t, c: (ceil_div(c.columns, tile.columns), tile.count(t, c)),
        tile.threads, tile.scratch4, _absent(bias=p.bias),
    )  # fmt: skip
    constants = {"experts": p.experts, "top_k": top_k, "columns": p.columns, "width": p.width}
    return build(symbol, args, len(args) - 1, constants, [stage])


def _pair_body(p: Projection, hidden: str, weighted: bool, only: str, names: str) -> str:
    weight, bias, columns, width = names.split()
    return (
        f"moec::vector_pair<{p.formats}, {FORMATS[hidden]}, Act, {p.vector}, {flag(p.gated)}, "
        f"{flag(p.bias)}, {flag(weighted)}>(x, topk_ids, topk_weights, {weight}, {bias}, h, "
        f"experts, top_k, {columns}, {width}, {only}, scratch, bx, by, tid);"
    )


def _down_body(p: Projection, weighted: bool, only: str, names: str) -> str:
    weight, bias, columns, width = names.split()
    return (
        f"moec::vector_down<{p.formats}, {p.vector}, {flag(p.bias)}, {flag(weighted)}>(h, "
        f"topk_ids, topk_weights, {weight}, {bias}, y, experts, top_k, {columns}, {width}, {only}, "
        "scratch, bx, by, tid);"
    )


def _ids(top_k: int) -> Buf:
    return Buf("topk_ids", (PerToken(top_k),), "int32", True)


def indexed_gate_up(
    symbol: str, p: Projection, act: ActivationSpec, hidden: str, top_k: int, weighted: bool
) -> Kernel:
    """x [T, H], topk_ids [T, K], (weights), gate_up -> h [S, I]: row t*K+k of the pair (t, k)."""
    assert p.experts is not None
    args = (
        p.input("x", 1),
        _ids(top_k),
        *_weights(weighted, top_k),
        *p.args(),
        Buf("h", (PerToken(top_k), p.columns), STORAGE[hidden]),
    )
    own = 8 if p.gated else 16
    stage = Stage(
        ("vector",), activation(act, p.gated),
        _pair_body(p, hidden, weighted, "-1", "weight bias columns width"),
        lambda t, c: (ceil_div(c.columns, own), t * c.top_k),
        128, VECTOR4, _absent(topk_weights=weighted, bias=p.bias),
    )  # fmt: skip
    constants = {"experts": p.experts, "top_k": top_k, "columns": p.columns, "width": p.width}
    return build(symbol, args, len(args) - 1, constants, [stage])


def indexed_down(symbol: str, p: Projection, top_k: int, weighted: bool) -> Kernel:
    """h [S, I], topk_ids, (weights), down -> y [T, H] float32, summed in the order of k."""
    assert p.experts is not None
    args = (
        p.input("h", top_k),
        _ids(top_k),
        *_weights(weighted, top_k),
        *p.args(),
        Buf("y", (PerToken(), p.columns), "float32"),
    )
    stage = Stage(
        ("vector",), "", _down_body(p, weighted, "-1", "weight bias columns width"),
        lambda t, c: (ceil_div(c.columns, 16), t),
        128, VECTOR4, _absent(topk_weights=weighted, bias=p.bias),
    )  # fmt: skip
    constants = {"experts": p.experts, "top_k": top_k, "columns": p.columns, "width": p.width}
    return build(symbol, args, len(args) - 1, constants, [stage])


def expert_loop(
    symbol: str,
    first: Projection,
    second: Projection,
    act: ActivationSpec,
    top_k: int,
    weighted_input: bool,
) -> Kernel:
    """x, topk_ids, topk_weights, gate_up, down -> y [T, H]: two launches for every expert."""
    assert first.experts is not None
    args = (
        first.input("x", 1),
        _ids(top_k),
        *_weights(True, top_k),
        *first.args("gate_up"),
        *second.args("down"),
        Buf("y", (PerToken(), second.columns), "float32"),
        Buf("h", (PerToken(top_k), first.columns), STORAGE[second.rows]),
    )
    own = 8 if first.gated else 16
    stages = [
        Stage(
            ("vector",), activation(act, first.gated),
            _pair_body(first, second.rows, weighted_input, "only",
                       "gate_up gate_up_bias inner width"),
            lambda t, c: (ceil_div(c.inner, own), t * c.top_k),
            128, VECTOR4, _absent(gate_up_bias=first.bias),
        ),
        Stage(
            ("vector",), "",
            _down_body(second, not weighted_input, "only", "down down_bias width inner"),
            lambda t, c: (ceil_div(c.width, 16), t),
            128, VECTOR4, _absent(down_bias=second.bias),
        ),
    ]  # fmt: skip
    constants = {"experts": first.experts, "top_k": top_k, "inner": first.columns,
                 "width": first.width}  # fmt: skip
    return build(symbol, args, len(args) - 2, constants, stages, repeat="experts")
