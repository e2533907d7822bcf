"""Combine float32 accumulators into the block's output, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

from ...spec import SharedGate
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
    mix: tuple[SharedGate, float],
    model_dtype: str,
) -> Kernel:
    """y = scale * (routed [+ pass_weight * passed]) [+ mix of shared] [+ residual] [+ bias].

    `present` names the optional operands in the order of ops.combine.EXTRA. routed and shared
    are float32 [T, width rounded up to panels]; gate is float32 [T, panel], columns 0 (and 1);
    residual and passed are [T, width] of the model's dtype, pass_weight [T, 1] and bias [width]
    float32. How shared enters is said in ops.combine. A `padded` result has the rows of an
    accumulator.
    """
    stride = round_up(width, isa.panel)
    optional = {
        "shared": Buf("shared", (PerToken(), stride), "float32"),
        "gate": Buf("gate", (PerToken(), isa.panel), "float32"),
        "residual": Buf("residual", (PerToken(), width), storage(model_dtype), True),
        "bias": Buf("bias", (width,), "float32"),
        "passed": Buf("passed", (PerToken(), width), storage(model_dtype), True),
        "pass_weight": Buf("pass_weight", (PerToken(), 1), "float32"),
    }
    args = (
        Buf("routed", (PerToken(), stride), "float32"),
        *(optional[name] for name in present),
        Buf("y", (PerToken(), stride if padded else width), storage(dtype), True),
    )
    passing = "passed" in present

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(tokens, threads) as (begin, end), loop(end, begin) as t:
            shares = _shares(em, b, t, mix, "gate" in present)
            weight = em.bind(tirx.BufferLoad(b.pass_weight, [t, i64(0)])) if passing else None
            parts = _Parts(present, model_dtype, scale, shares, weight)

            def at(name: str, column: Any) -> list[Any]:
                return [column] if name == "bias" else [t, column]

            full = width // em.lanes
            with loop(full) as c:
                first = c * em.lanes
                out = parts.sum(
                    lambda name, kind: em.load(getattr(b, name), at(name, first), kind), em.splat
                )
                em.store(b.y, em.bind(out), [t, first], dtype)
            for column in range(full * em.lanes, width):
                spot = i64(column)

                def one(name: str, kind: str, spot: Any = spot) -> Any:
                    return load_scalar(getattr(b, name), at(name, spot), kind)

                store_scalar(b.y, parts.sum(one, _scalar), [t, spot], dtype)

    return build(symbol, isa, args, body)


@dataclass(frozen=True)
class _Parts:
    """What is added up, and the factors of it; factors of 1 are None."""

    present: tuple[str, ...]
    model_dtype: str
    scale: float
    shares: tuple[Any, Any]
    pass_weight: Any

    def sum(self, load: Callable[[str, str], Any], splat: Callable[[Any], Any]) -> Any:
        """The sum, of vectors or of single values as `load` gives them."""
        ours, theirs = self.shares
        out = load("routed", "float32")
        if self.pass_weight is not None:
            out = out + splat(self.pass_weight) * load("passed", self.model_dtype)
        for factor in (self.scale if self.scale != 1.0 else None, ours):
            out = out if factor is None else out * splat(factor)
        if "shared" in self.present:
            own = load("shared", "float32")
            out = out + (own if theirs is None else own * splat(theirs))
        if "residual" in self.present:
            out = out + load("residual", self.model_dtype)
        return out + load("bias", "float32") if "bias" in self.present else out


def _shares(
    em: Emit, b: SimpleNamespace, t: Any, mix: tuple[SharedGate, float], gated: bool
) -> tuple[Any, Any]:
    """The factors of the routed and of the shared part of a token; None = 1."""
    kind, factor = mix
    if not gated:
        return None, (factor if factor != 1.0 else None)
    logit = tirx.BufferLoad(b.gate, [t, i64(0)])
    if kind is SharedGate.SOFTMAX:  # softmax of two: a sigmoid of their difference
        logit = tirx.BufferLoad(b.gate, [t, i64(1)]) - logit
    lanes = em.sigmoid(tirx.Broadcast(logit, em.lanes))
    share = em.bind(tirx.Shuffle([lanes], [tirx.const(0, "int32")]))
    theirs = share if factor == 1.0 else em.bind(share * tirx.const(factor, "float32"))
    if kind is not SharedGate.SOFTMAX:
        return None, theirs
    other = em.sigmoid(tirx.Broadcast(tirx.const(0.0, "float32") - logit, em.lanes))
    return em.bind(tirx.Shuffle([other], [tirx.const(0, "int32")])), theirs


def _scalar(value: Any) -> Any:
    return tirx.const(value, "float32") if isinstance(value, (int, float)) else value
