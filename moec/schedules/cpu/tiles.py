"""The register tile: a few rows of activations times a few packed panels of weights.

Weights are packed panel by panel, [E, P, K/group, panel]: one panel holds `panel` output
columns for all of K, so that a tile reads it as one contiguous stream. In a gated projection
the first half of a panel is gate columns and the second half the up columns of the same
index, so the activation is computed while both are in registers. bfloat16 keeps two
consecutive K values in each 32-bit word: the operand shape of AVX512-BF16, and one shift or
one mask from two float32 vectors elsewhere. Panels of it may have a shorter form, which
compact.py tells.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from . import compact
from .compact import AHEAD, Words
from .emit import Emit, i64, round_up
from .isa import Isa
from .kernel import loop

_LINE = 16  # words of a cache line
_LINES = 2  # that a step of a later pass asks for: with one or with four it is slower than without
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
    """The packed form of `groups` matrices [N, K] (N = 2I gate rows then up rows when gated).

    Where it is `compact`, a panel may have its compact form.
    """

    groups: int
    rows: int
    cols: int
    dtype: str
    gated: bool
    panel: int
    compact: bool = False

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
        """[E, P, K/group, panel] of words; with a row more in each panel where it is `compact`."""
        return (self.groups, self.count, self.depth + int(self.compact), self.panel)

    @property
    def stride(self) -> int:
        """Words from one step of K to the next, in the shortest form that a panel may have."""
        return compact.STEP if self.compact else self.panel

    @property
    def bias_shape(self) -> tuple[int, int, int]:
        """[E, P, panel] float32, in the order of the panel's columns."""
        return (self.groups, self.count, self.panel)


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


@dataclass(frozen=True)
class Ahead:
    """Weights that the steps of a tile ask the L2 for, in words of the panel that the tile reads.

    Step i asks for `lines` cache lines from the word `first` + i * `apart` on, counted from where
    the tile begins. They may belong to the panels that follow in memory.
    """

    first: Any
    lines: int
    apart: int

    def words(self, step: Any) -> Iterator[Any]:
        """The places that a step asks for, counted from where the tile begins."""
        for line in range(self.lines):
            yield self.first + step * self.apart + line * _LINE


@dataclass(frozen=True)
class Matrix:
    """One packed matrix of a group: its buffers, and the words of K that a tile covers."""

    panels: Panels
    weights: Any
    bias: Any | None
    group: Any
    begin: int
    end: int


@dataclass(frozen=True)
class Piece:
    """The words [begin, end) of a matrix; sums are those behind `row` in the tile's `out`."""

    begin: Any
    end: Any
    row: Any


def tile(
    em: Emit,
    matrix: Matrix,
    operand: Operand,
    source: Any,
    rows: Sequence[Any],
    panels: Sequence[Any],
    out: Any,
    ahead: Ahead | None = None,
    piece: Piece | None = None,
) -> None:
    """out[w * len(rows) + i] = source[rows[i]] x panel w, [.., panel] float32.

    Sums run over the words [begin, end) of the matrix in ascending order, whatever the number
    of rows and panels: a result never depends on the tile that computed it. They start at the
    bias when there is one, and rare weights of a compact panel come last. `ahead` goes with one
    panel, and `piece` with one plain one, where a tile goes on from the sums that are there.
    """
    em.release_registers()
    span = piece or Piece(i64(matrix.begin), i64(matrix.end), i64(0))
    acc = _start(em, matrix, rows, panels) if piece is None else _resume(em, rows, out, piece.row)
    halves = matrix.panels.dtype == "bfloat16" and not operand.pairs

    def step(k: Any, words: Words) -> None:
        if halves:
            _step_halves(em, matrix, source, rows, acc, k, words)
        else:
            _step(em, matrix, operand, source, rows, acc, k, words)

    if matrix.panels.compact:
        ask = partial(_ask, em, matrix, panels[0], ahead, span.begin)
        compact.walk(_slot(em, matrix, panels[0]), matrix.begin, matrix.end, step, ask)
    else:
        with loop(span.end, span.begin) as k:
            step(k, _plain(em, matrix, panels, k))
            _ask(em, matrix, panels[0], ahead, span.begin, k)
    for at, one in enumerate(one for sums in acc for one in sums):
        for j in range(em.isa.vectors):
            columns = em.ramp(i64(j * em.lanes))
            T.buffer_store(out, tirx.BufferLoad(one, [j]), [span.row + i64(at), columns])
    em.release_registers()
    if matrix.panels.compact:
        _add_rare(em, matrix, operand, source, rows, panels[0], out)


def _start(em: Emit, matrix: Matrix, rows: Sequence[Any], panels: Sequence[Any]) -> list[list[Any]]:
    """Sums of every panel and row, at the bias or zero."""
    # One buffer a row: TVM keeps a buffer on the stack, hence in registers, only below 1 KB.
    acc = [[T.alloc_buffer((em.isa.vectors,), em.f32v) for _ in rows] for _ in panels]
    for panel, sums in zip(panels, acc, strict=True):
        for j in range(em.isa.vectors):
            value = _first(em, matrix, panel, j)
            for one in sums:
                T.buffer_store(one, value, [j])
    return acc


def _first(em: Emit, matrix: Matrix, panel: Any, j: int) -> Any:
    """What the sums of vector j of a panel start at: the bias, or zero."""
    if matrix.bias is None:
        return em.splat(0.0)
    at = em.ramp(i64(j * em.lanes))
    return em.bind(tirx.BufferLoad(matrix.bias, [matrix.group, panel, at]))


def start(em: Emit, matrix: Matrix, panel: Any, out: Any, count: Any) -> None:
    """out[:count] as the pieces of a panel find it: the bias, or zero."""
    for j in range(em.isa.vectors):
        value = _first(em, matrix, panel, j)
        with loop(count) as i:
            T.buffer_store(out, value, [i, em.ramp(i64(j * em.lanes))])


def _resume(em: Emit, rows: Sequence[Any], out: Any, first: Any) -> list[list[Any]]:
    """The sums of one panel that a piece before this one left."""
    acc = [T.alloc_buffer((em.isa.vectors,), em.f32v) for _ in rows]
    for i, one in enumerate(acc):
        for j in range(em.isa.vectors):
            at = [first + i64(i), em.ramp(i64(j * em.lanes))]
            T.buffer_store(one, tirx.BufferLoad(out, at), [j])
    return [acc]


def _slot(em: Emit, matrix: Matrix, panel: Any) -> compact.Slot:
    return compact.Slot(em, matrix.weights, matrix.group, panel, matrix.panels.depth)


def _add_rare(
    em: Emit,
    matrix: Matrix,
    operand: Operand,
    source: Any,
    rows: Sequence[Any],
    panel: Any,
    out: Any,
) -> None:
    """out[i] += source[rows[i]] times what the steps of a compact panel leave out."""

    def add(k: Any, column: Any, value: Any) -> None:
        for i, row in enumerate(rows):
            if operand.pairs:
                word = tirx.BufferLoad(source, [row, tirx.floordiv(k, i64(2))])
                high = tirx.BitwiseAnd(word, tirx.const(-65536, "int32"))
                low = tirx.LShift(word, tirx.const(16, "int32"))
                odd = tirx.EQ(tirx.floormod(k, i64(2)), i64(1))
                a = T.reinterpret("float32", tirx.Select(odd, high, low))
            else:
                a = tirx.BufferLoad(source, [row, k])
            at = [i64(i), column]
            new = em.intrinsic("llvm.fma", "float32", a, value, tirx.BufferLoad(out, at))
            T.buffer_store(out, new, at)

    compact.leftover(_slot(em, matrix, panel), matrix.begin, matrix.end, add)


def _ask(em: Emit, matrix: Matrix, panel: Any, ahead: Ahead | None, begin: Any, k: Any) -> None:
    """The step's share of what a tile asks for that begins at the word `begin`."""
    for words in ahead.words(k - begin) if ahead else ():
        if matrix.panels.compact:
            _slot(em, matrix, panel).ask(begin * i64(matrix.panels.stride) + words)
        else:
            em.prefetch(matrix.weights, [matrix.group, panel, begin, words])


def steady(matrix: Matrix) -> Ahead:
    """A line of each step, at a distance that stays: the rest of it the machine fetches itself."""
    return Ahead(i64(AHEAD), 1, matrix.panels.stride)


def following(em: Emit, panels: Panels, lead: int, size: Any, block: Any, more: Any) -> Ahead:
    """`lead` words of K ahead of a piece of `size`, and where the block of rows before left off.

    Two blocks ask for as much as the piece has. Unless there is `more`, nothing new.
    """
    apart = _LINES * _LINE * panels.stride // panels.panel
    there = i64(lead * panels.stride) + block * size * i64(apart)
    return Ahead(em.bind(tirx.Select(more, there, i64(0))), _LINES, apart)


def _plain(em: Emit, matrix: Matrix, panels: Sequence[Any], k: Any) -> Words:
    """The vectors of step k where panels have one form, panel by panel."""

    def words() -> Iterator[Sequence[Any]]:
        for panel in panels:
            columns = [em.ramp(i64(j * em.lanes)) for j in range(em.isa.vectors)]
            at = [[matrix.group, panel, k, ramp] for ramp in columns]
            yield [tirx.BufferLoad(matrix.weights, one) for one in at]

    return words


def _step(
    em: Emit,
    matrix: Matrix,
    operand: Operand,
    source: Any,
    rows: Sequence[Any],
    acc: Sequence[Sequence[Any]],
    k: Any,
    words: Words,
) -> None:
    """One word of K: all vectors of a panel, then row by row."""
    # Rows are loaded once for all panels when there are few, and one at a time when there are
    # many: the accumulators leave registers for one or the other.
    few = len(acc) > 1
    splats = [_splat(em, source, row, k) if few else None for row in rows]
    for vectors, sums in zip(words(), acc, strict=True):
        ready = [_operands(em, word, matrix.panels, operand.pairs)[0] for word in vectors]
        for row, splat, one in zip(rows, splats, sums, strict=True):
            a = splat if few else _splat(em, source, row, k)
            for j, w in enumerate(ready):
                old = tirx.BufferLoad(one, [j])
                new = em.dot_bf16(old, w, a) if operand.pairs else em.fma(w, a, old)
                T.buffer_store(one, new, [j])
    em.keep_order()


def _splat(em: Emit, source: Any, row: Any, k: Any) -> Any:
    return em.bind(tirx.Broadcast(tirx.BufferLoad(source, [row, k]), em.lanes))


def _step_halves(
    em: Emit,
    matrix: Matrix,
    source: Any,
    rows: Sequence[Any],
    acc: Sequence[Sequence[Any]],
    k: Any,
    words: Words,
) -> None:
    """bfloat16 weights against float32 rows: two multiply-adds a word, vector by vector so
    that only two widened vectors are alive at a time."""
    for vectors, sums in zip(words(), acc, strict=True):
        for j, word in enumerate(vectors):
            for half, w in enumerate(_operands(em, word, matrix.panels, False)):
                for row, one in zip(rows, sums, strict=True):
                    a = tirx.Broadcast(tirx.BufferLoad(source, [row, k * 2 + half]), em.lanes)
                    T.buffer_store(one, em.fma(w, a, tirx.BufferLoad(one, [j])), [j])
                em.keep_order()
