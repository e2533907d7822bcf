"""Pieces that every matmul kernel of the CPU shares: arguments, loops over panels, epilogues."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from ...spec import ActivationSpec
from ..buffers import Buf, PerToken
from .activate import activate
from .cover import Finish, Rows, cover
from .emit import Emit, i64, round_up, storage
from .kernel import loop
from .tiles import Matrix, Operand, Panels


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
    return list(itertools.pairwise(edges))


def store_activated(
    em: Emit, spec: ActivationSpec, panels: Panels, operand: Operand, target: Any
) -> Finish:
    """Finish: the activation of the sums into target[row]."""

    def finish(row: Any, panel: Any, values: Sequence[Any]) -> None:
        half = em.isa.vectors // 2 if panels.gated else em.isa.vectors
        for j in range(half):
            up = values[j + half] if panels.gated else None
            value = activate(em, spec, values[j], up)
            em.store(target, value, [row, panel * panels.step + j * em.lanes], operand.dtype)

    return finish


def accumulate(em: Emit, target: Any, row: Any, panel: Any, values: Sequence[Any], w: Any) -> None:
    """target[row, panel columns] += w * values (w None = 1)."""
    for j, value in enumerate(values):
        at = [row, em.ramp(panel * em.isa.panel + j * em.lanes)]
        old = tirx.BufferLoad(target, at)
        new = old + value if w is None else em.fma(value, w, old)
        T.buffer_store(target, new, at)


def weighted_sum(em: Emit, b: SimpleNamespace, top_k: int, weighted: bool, pair: Any) -> Finish:
    """Finish: y[t] += w * sums, where pair(row) is t * K + k."""

    def finish(row: Any, panel: Any, values: Sequence[Any]) -> None:
        at = em.bind(pair(row))
        t = em.bind(tirx.floordiv(at, i64(top_k)))
        w: Any = None
        if weighted:
            k = tirx.floormod(at, i64(top_k))
            w = em.bind(tirx.Broadcast(tirx.BufferLoad(b.topk_weights, [t, k]), em.lanes))
        accumulate(em, b.y, t, panel, values, w)

    return finish


def zero_columns(em: Emit, target: Any, tokens: Any, begin: Any, end: Any) -> None:
    """target[:, panels begin to end] = 0."""
    width = em.isa.panel
    with loop(tokens) as t, loop(end, begin) as p:
        for j in range(em.isa.vectors):
            at = em.ramp(p * width + j * em.lanes)
            T.buffer_store(target, em.splat(0.0), [t, at])


def multiply(
    em: Emit,
    proj: Projection,
    b: SimpleNamespace,
    name: str,
    group: Any,
    panels: tuple[Any, Any],
    source: Any,
    rows: Rows,
    sums: Any,
    finish: Finish,
    blocks: Sequence[tuple[int, int]] | None = None,
) -> None:
    """Rows of `source` times the panels [begin, end) of weight `name`, finished one by one.

    With several `blocks` of K, `finish` gets a partial sum for each; the bias is in the first.
    """
    matrices = [
        Matrix(
            proj.panels,
            getattr(b, name),
            proj.bias_of(b, name) if begin == 0 else None,
            group,
            begin,
            end,
        )
        for begin, end in blocks or [(0, proj.panels.depth)]
    ]
    cover(em, matrices, proj.operand, source, panels, rows, sums, finish)
