"""Dense matmuls of the block: router logits, the shared expert, the shared expert's gate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from ...spec import ActivationSpec
from ..buffers import Kernel
from .emit import Emit, i64
from .isa import Isa
from .kernel import build, chunk, loop
from .matmul import (
    Projection,
    accumulate,
    accumulator,
    hidden,
    k_blocks,
    run_tile,
    staged,
    store_activated,
    zero_columns,
)
from .tiles import Acc, Operand, row_blocks


def linear(symbol: str, isa: Isa, proj: Projection, block_words: int) -> Kernel:
    """rows [T] x weight [N, K] (+ bias) -> y [T, N rounded up to panels] float32."""
    blocks = k_blocks(proj.panels, block_words)
    args = (
        staged("rows", proj.operand, 1),
        *proj.args("weight"),
        accumulator("y", proj.panels.rows, isa.panel),
    )

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(i64(proj.panels.count), threads) as (begin, end):
            zero_columns(em, b.y, tokens, begin, end)
            with loop(end, begin) as p:

                def finish(rows: Any, acc: Acc) -> None:
                    for row, values in zip(rows, acc, strict=True):
                        accumulate(em, b.y, row, p, values, None)

                for words in blocks:

                    def block(row: Any, count: int, words: tuple[int, int] = words) -> None:
                        rows = [row + i for i in range(count)]
                        run_tile(
                            em, proj, b, "weight", i64(0), p, b.rows, rows, finish, rows, words
                        )

                    row_blocks(em, i64(0), tokens, block)

    return build(symbol, isa, args, body)


def gate_up(symbol: str, isa: Isa, proj: Projection, spec: ActivationSpec, out: Operand) -> Kernel:
    """rows [T] x gate_up [2F, H] -> activated h [T, F], staged for the second matmul."""
    args = (staged("rows", proj.operand, 1), *proj.args("weight"), hidden("h", out, 1))

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with chunk(i64(proj.panels.count), threads) as (begin, end), loop(end, begin) as p:
            epilogue = store_activated(em, spec, proj.panels, out, b.h, p)

            def block(row: Any, count: int) -> None:
                rows = [row + i for i in range(count)]
                run_tile(em, proj, b, "weight", i64(0), p, b.rows, rows, epilogue, rows)

            row_blocks(em, i64(0), tokens, block)

    return build(symbol, isa, args, body)
