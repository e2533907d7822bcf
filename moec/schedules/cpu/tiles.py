"""The register tile: a few rows of activations times one packed panel of weights.

Weights are packed panel by panel, [E, P, K/group, panel]: one panel holds `panel` output
columns for all of K, so that a tile reads it as one contiguous stream. In a gated projection
the first half of a panel is gate columns and the second half the up columns of the same
index, so the activation is computed while both are in registers. bfloat16 keeps two
consecutive K values in each 32-bit word: the operand shape of AVX512-BF16, and one shift or
one mask from two float32 vectors elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .emit import Emit, i64, round_up
from .isa import Isa
from .kernel import loop, when

_WORD = {"float32": "float32", "float16": "float16", "bfloat16": "int32"}


@dataclass(frozen=True)
class Operand:
    """How activations lie in memory before a matmul: `pairs` are bfloat16 pairs, else float32."""

    pairs: bool
    width: int  # logical columns
    stride: int  # elements of a row: columns rounded up, plus padding against 4K aliasing

    @staticmethod
    def of(isa: Isa, weight_dtype: str, activation_dtype: str, width: int) -> Operand:
        """bfloat16 pairs where both sides are bfloat16 and the ISA multiplies them; else f32."""
        pairs = isa.bf16_dot and weight_dtype == activation_dtype == "bfloat16"
        stride = round_up(width, isa.panel) + (32 if pairs else 16)
        return Operand(pairs, width, stride)

    @property
    def dtype(self) -> str:
        """The values that a row holds."""
        return "bfloat16" if self.pairs else "float32"

    @property
    def words(self) -> tuple[int, str]:
        """(row length, dtype) as the tile reads it."""
        return (self.stride // 2, "int32") if self.pairs else (self.stride, "float32")


@dataclass(frozen=True)
class Panels:
    """The packed form of `groups` matrices [N, K] (N = 2I gate rows then up rows when gated)."""

    groups: int
    rows: int
    cols: int
    dtype: str
    gated: bool
    panel: int

    @property
    def outputs(self) -> int:
        """Columns that the matmul yields: I when gated, N otherwise."""
        return self.rows // 2 if self.gated else self.rows

    @property
    def step(self) -> int:
        """Outputs of one panel."""
        return self.panel // 2 if self.gated else self.panel

    @property
    def count(self) -> int:
        """Panels of one matrix."""
        return -(-self.outputs // self.step)

    @property
    def group(self) -> int:
        """K values in one word."""
        return 2 if self.dtype == "bfloat16" else 1

    @property
    def depth(self) -> int:
        """Words along K."""
        return -(-self.cols // self.group)

    @property
    def word(self) -> str:
        """The dtype of a word."""
        return _WORD[self.dtype]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[E, P, K/group, panel] of words."""
        return (self.groups, self.count, self.depth, self.panel)

    @property
    def bias_shape(self) -> tuple[int, int, int]:
        """[E, P, panel] float32, in the order of the panel's columns."""
        return (self.groups, self.count, self.panel)


Acc = list[list[Any]]
Epilogue = Callable[[Sequence[Any], Acc], None]


def _operands(em: Emit, word: Any, panels: Panels, pairs: bool) -> list[Any]:
    """The float32 vectors (one per K value) in one weight word, or the word itself."""
    if pairs or panels.dtype == "float32":
        return [em.bind(word)]
    if panels.dtype == "float16":
        return [em.bind(tirx.Cast(em.f32v, word))]
    word = em.bind(word)
    low = T.reinterpret(em.f32v, tirx.LShift(word, em.isplat(16)))
    high = T.reinterpret(em.f32v, tirx.BitwiseAnd(word, em.isplat(-65536)))
    return [em.bind(low), em.bind(high)]


def tile(
    em: Emit,
    panels: Panels,
    operand: Operand,
    weights: Any,
    group: Any,
    panel: Any,
    source: Any,
    rows: Sequence[Any],
    bias: Any | None,
    begin: Any,
    end: Any,
    epilogue: Epilogue,
) -> None:
    """Accumulate source[rows] x weights[group, panel] over words [begin, end), then finish.

    `rows` are row numbers of `source`; accumulators start at `bias[group, panel]` (or zero)
    and are handed to `epilogue(rows, accumulators[row][vector])`.
    """
    vectors = em.isa.vectors
    # One buffer a row: TVM keeps a buffer on the stack, hence in registers, only below 1 KB.
    acc = [T.alloc_buffer((vectors,), em.f32v) for _ in rows]
    for i in range(len(rows)):
        for j in range(vectors):
            start = em.splat(0.0)
            if bias is not None:
                at = em.ramp(i64(j * em.lanes))
                start = tirx.BufferLoad(bias, [group, panel, at])
            T.buffer_store(acc[i], start, [j])
    with loop(end, begin) as k:
        if panels.dtype == "bfloat16" and not operand.pairs:
            _step_halves(em, panels, weights, group, panel, source, rows, acc, k)
        else:
            words = [_weight(em, weights, group, panel, k, j) for j in range(vectors)]
            ready = [_operands(em, word, panels, operand.pairs)[0] for word in words]
            for i, row in enumerate(rows):
                a = em.bind(tirx.Broadcast(tirx.BufferLoad(source, [row, k]), em.lanes))
                for j in range(vectors):
                    c = tirx.BufferLoad(acc[i], [j])
                    if operand.pairs:
                        T.buffer_store(acc[i], em.dot_bf16(c, ready[j], a), [j])
                    else:
                        T.buffer_store(acc[i], em.fma(ready[j], a, c), [j])
    values = [[tirx.BufferLoad(acc[i], [j]) for j in range(vectors)] for i in range(len(rows))]
    epilogue(rows, values)


def _weight(em: Emit, weights: Any, group: Any, panel: Any, k: Any, vector: int) -> Any:
    return tirx.BufferLoad(weights, [group, panel, k, em.ramp(i64(vector * em.lanes))])


def _step_halves(
    em: Emit,
    panels: Panels,
    weights: Any,
    group: Any,
    panel: Any,
    source: Any,
    rows: Sequence[Any],
    acc: Sequence[Any],
    k: Any,
) -> None:
    """bfloat16 weights against float32 rows: two multiply-adds a word, vector by vector so
    that only two widened vectors are alive at a time."""
    for j in range(em.isa.vectors):
        halves = _operands(em, _weight(em, weights, group, panel, k, j), panels, False)
        for half, w in enumerate(halves):
            for i, row in enumerate(rows):
                a = tirx.Broadcast(tirx.BufferLoad(source, [row, k * 2 + half]), em.lanes)
                c = tirx.BufferLoad(acc[i], [j])
                T.buffer_store(acc[i], em.fma(w, a, c), [j])


def row_blocks(em: Emit, begin: Any, end: Any, body: Callable[[Any, int], None]) -> None:
    """Cover rows [begin, end) with tiles: `body(first row, number of rows)` for every size.

    Tiles are as few as the register file allows and of nearly equal size (8 rows are 4 + 4,
    not 6 + 2): a small tile has too few independent sums to keep the multipliers busy.
    """
    size = em.isa.rows
    total = em.bind(end - begin)
    count = em.bind(tirx.floordiv(total + i64(size - 1), i64(size)))
    base = em.bind(tirx.floordiv(total, tirx.Max(count, i64(1))))
    larger = em.bind(total - base * count)  # so many tiles have one row more
    with loop(count) as block:
        first = em.bind(begin + block * base + tirx.Min(block, larger))
        rows = em.bind(base + tirx.Select(block < larger, i64(1), i64(0)))
        for number in range(1, size + 1):
            with when(tirx.EQ(rows, i64(number))):
                body(first, number)
