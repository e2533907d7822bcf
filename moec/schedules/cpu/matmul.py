"""Pieces that every matmul kernel of the CPU shares: arguments, loops over panels, epilogues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import ActivationSpec
from ..buffers import Buf, PerToken
from .activate import activate
from .emit import Emit, i64, round_up, storage
from .kernel import loop
from .tiles import Acc, Operand, Panels, tile


@dataclass(frozen=True)
class Projection:
    """One matmul: packed weights, staged activations, and whether a bias is added."""

    panels: Panels
    operand: Operand
    bias: bool

    def args(self, name: str) -> tuple[Buf, ...]:
        """The weight argument, and the bias argument when there is one."""
        weight = Buf(name, self.panels.shape, self.panels.word)
        bias = Buf(f"{name}_bias", self.panels.bias_shape, "float32")
        return (weight, bias) if self.bias else (weight,)

    def bias_of(self, b: SimpleNamespace, name: str) -> Any | None:
        """The bias buffer of weight `name`, or None."""
        return getattr(b, f"{name}_bias") if self.bias else None


def staged(name: str, operand: Operand, copies: int) -> Buf:
    """Staged activations as a tile reads them: words of K values."""
    length, dtype = operand.words
    return Buf(name, (PerToken(copies), length), dtype)


def hidden(name: str, operand: Operand, copies: int) -> Buf:
    """Staged activations as an epilogue writes them: single values."""
    return Buf(name, (PerToken(copies), operand.stride), storage(operand.dtype))


def accumulator(name: str, width: int, em_panel: int, copies: int = 1) -> Buf:
    """[T * copies, width rounded up to panels] float32."""
    return Buf(name, (PerToken(copies), round_up(width, em_panel)), "float32")


def k_blocks(panels: Panels, limit: int) -> list[tuple[int, int]]:
    """Split K into blocks of words, so that a block of a panel stays in the L2 cache."""
    if panels.depth <= limit + limit // 4:
        return [(0, panels.depth)]
    edges = [*range(0, panels.depth, limit), panels.depth]
    return list(zip(edges[:-1], edges[1:], strict=True))


def store_activated(
    em: Emit, spec: ActivationSpec, panels: Panels, operand: Operand, target: Any, panel: Any
) -> Callable[[Sequence[Any], Acc], None]:
    """Epilogue: activation of the accumulators into rows `target[row]` (positions given)."""

    def epilogue(positions: Sequence[Any], acc: Acc) -> None:
        vectors = em.isa.vectors // 2 if panels.gated else em.isa.vectors
        for row, values in zip(positions, acc, strict=True):
            for j in range(vectors):
                up = values[j + vectors] if panels.gated else None
                value = activate(em, spec, values[j], up)
                column = panel * panels.step + j * em.lanes
                em.store(target, value, [row, column], operand.dtype)

    return epilogue


def accumulate(em: Emit, target: Any, row: Any, panel: Any, values: Sequence[Any], w: Any) -> None:
    """target[row, panel columns] += w * values (w None = 1)."""
    for j, value in enumerate(values):
        at = [row, em.ramp(panel * em.isa.panel + j * em.lanes)]
        old = tirx.BufferLoad(target, at)
        new = old + value if w is None else em.fma(value, w, old)
        T.buffer_store(target, new, at)


def zero_columns(em: Emit, target: Any, tokens: Any, begin: Any, end: Any) -> None:
    """target[:, panels begin to end] = 0."""
    width = em.isa.panel
    with loop(tokens) as t, loop(end, begin) as p:
        for j in range(em.isa.vectors):
            at = em.ramp(p * width + j * em.lanes)
            T.buffer_store(target, em.splat(0.0), [t, at])


def run_tile(
    em: Emit,
    proj: Projection,
    b: SimpleNamespace,
    name: str,
    group: Any,
    panel: Any,
    source: Any,
    rows: Sequence[Any],
    epilogue: Callable[[Sequence[Any], Acc], None],
    positions: Sequence[Any],
    block: tuple[int, int] | None = None,
) -> None:
    """One register tile of weight `name`, over all of K or one block of it.

    The bias enters with the first block only. `positions` (not `rows`) go to the epilogue:
    where the results belong, against where the activations came from.
    """
    begin, end = block or (0, proj.panels.depth)
    bias = proj.bias_of(b, name) if begin == 0 else None
    tile(
        em,
        proj.panels,
        proj.operand,
        getattr(b, name),
        group,
        panel,
        source,
        rows,
        bias,
        i64(begin),
        i64(end),
        lambda _, acc: epilogue(positions, acc),
    )
