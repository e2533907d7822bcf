"""Combine float32 accumulators into the block's output, rounded once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from tvm import tirx

from ..buffers import Buf, Kernel, PerToken
from .emit import Emit, i64, round_up, storage
from .isa import Isa
from .kernel import build, chunk, loop
from .stage import load_scalar, store_scalar


def combine(
    symbol: str,
    isa: Isa,
    width: int,
    dtype: str,
    scale: float,
    present: tuple[str, ...],
    padded: bool,
) -> Kernel:
    """y = scale * routed [+ sigmoid(gate) * shared] [+ residual], [T, width] of `dtype`.

    `present` names the optional operands ("shared", "gate", "residual") in this order. routed
    and shared are float32 [T, width rounded up to panels]; gate is float32 [T, panel], column
    0; residual is [T, width] of `dtype`. A `padded` result has the rows of an accumulator.
    """
    stride = round_up(width, isa.panel)
    optional = {
        "shared": Buf("shared", (PerToken(), stride), "float32"),
        "gate": Buf("gate", (PerToken(), isa.panel), "float32"),
        "residual": Buf("residual", (PerToken(), width), storage(dtype), True),
    }
    args = (
        Buf("routed", (PerToken(), stride), "float32"),
        *(optional[name] for name in present),
        Buf("y", (PerToken(), stride if padded else width), storage(dtype), True),
    )
    shared, gated, residual = (name in present for name in ("shared", "gate", "residual"))

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            gate: Any = None
            if gated:
                first = tirx.Broadcast(tirx.BufferLoad(b.gate, [t, i64(0)]), em.lanes)
                vector = em.sigmoid(first)
                gate = tirx.Shuffle([vector], [tirx.const(0, "int32")])
                gate = em.bind(gate)

            def value(load: Any, splat: Any) -> Any:
                out = load("routed")
                if scale != 1.0:
                    out = out * splat(scale)
                if shared:
                    out = out + (load("shared") * splat(gate) if gated else load("shared"))
                return out

            full = width // em.lanes
            with loop(full) as c:
                at = [t, c * em.lanes]
                out = value(lambda n: em.load(getattr(b, n), at, "float32"), em.splat)
                if residual:
                    out = out + em.load(b.residual, at, dtype)
                em.store(b.y, em.bind(out), at, dtype)
            for c in range(full * em.lanes, width):
                spot = [t, i64(c)]
                out = value(lambda n, spot=spot: tirx.BufferLoad(getattr(b, n), spot), _scalar)
                if residual:
                    out = out + load_scalar(b.residual, spot, dtype)
                store_scalar(b.y, out, spot, dtype)

    return build(symbol, isa, args, body)


def _scalar(value: Any) -> Any:
    return tirx.const(value, "float32") if isinstance(value, (int, float)) else value
