"""Dense matmuls of the block: router logits, the shared expert, the shared expert's gate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ...spec import ActivationSpec
from ..buffers import Kernel
from .cover import Rows, scratch
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk
from .matmul import (
    Projection,
    accumulate,
    accumulator,
    hidden,
    k_blocks,
    multiply,
    staged,
    store_activated,
    zero_columns,
)
from .tiles import Operand


def linear(symbol: str, isa: Isa, proj: Projection, block_words: int) -> Kernel:
    """rows [T] x weight [N, K] (+ bias) -> y [T, N rounded up to panels] float32."""
    blocks = k_blocks(proj.panels, block_words)
    args = (
        staged("rows", proj.operand, 1),
        *proj.args("weight"),
        accumulator("y", proj.panels.rows, isa.panel),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        def finish(row: Any, panel: Any, values: Any) -> None:
            accumulate(em, b.y, row, panel, values, None)

        with chunk(i64(proj.panels.count), threads) as (begin, end):
            zero_columns(em, b.y, tokens, begin, end)
            sums, rows, span = scratch(em), _all_rows(tokens), (begin, end)
            multiply(em, proj, b, "weight", i64(0), span, b.rows, rows, sums, finish, blocks)

    return build(symbol, isa, args, body)


def gate_up(symbol: str, isa: Isa, proj: Projection, spec: ActivationSpec, out: Operand) -> Kernel:
    """rows [T] x gate_up [2F, H] -> activated h [T, F], staged for the second matmul."""
    args = (staged("rows", proj.operand, 1), *proj.args("weight"), hidden("h", out, 1))

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        finish = store_activated(em, spec, proj.panels, out, b.h)
        with chunk(i64(proj.panels.count), threads) as span:
            sums, rows = scratch(em), _all_rows(tokens)
            multiply(em, proj, b, "weight", i64(0), span, b.rows, rows, sums, finish)

    return build(symbol, isa, args, body)


def _all_rows(tokens: Any) -> Rows:
    return Rows(i64(0), tokens, lambda row: row)
