"""Cover rows x panels with register tiles: which tile where, and one epilogue for all of them.

Many rows: tiles of one panel, as few as the register file allows and of nearly equal height
(8 rows are 4 + 4, not 6 + 2), because a small tile has too few independent sums to keep the
multipliers busy. Few rows: the work is reading weights. A panel of wide vectors has sums enough
to wait for memory alone, and its one stream is read fastest (4 panels side by side: 3 to 10 %
slower for T from 1 to 32); panels of narrow vectors are taken several at once.

A tile of one or two rows asks for a cache line of each step 16 KB ahead: the machine's own
prefetching ends at a page. On pages of 4 KB they take 0 to 13 % less time with one thread and 0 to
15 % with two, depending on where in memory the pages lie; on huge pages from 2 % less to 1 % more.

In between, rows pass a panel two or three times: the first time they wait for memory, then memory
waits for them. So each step of the first two passes asks for two cache lines of what comes later.
They take a compact panel as a whole, and ask for the next one. Of a plain one they take 64 words
of K at a time (three passes 128), and ask 128 words ahead: at 8 rows an expert float32 takes 4 to
6 % less time than by panels, with 512 words 2 % less, with 32 as with 64; asking for nothing but
half of it, a fifth more. Pieces of compact panels lose 6 to 17 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .emit import Emit, i64
from .kernel import loop, scalar, when
from .tiles import Ahead, Matrix, Operand, Piece, following, start, steady, tile

# Weights that a step of K should take from all panels of a tile: with less, the additions to the
# same few sums, one after the other, take longer than memory.
_STEP_BYTES = 256

_STEADY_ROWS = 2  # of a tile, up to which it asks at a steady distance; three rows lose by it
_MOST_PASSES = 3  # over a panel, where what follows is asked for: more of them hide it anyway
_PIECE = 64  # words of K that two passes take at a time; three take twice as many
_LEAD = 128  # words of K that they ask ahead: 32 KB
_WIDE = 64  # words of a panel, from which on a step does not ask for more than it takes

# finish(row, panel, vectors): what is done with the sums of one row and one panel.
Finish = Callable[[Any, Any, Sequence[Any]], None]


@dataclass(frozen=True)
class Rows:
    """The rows [first, last) to cover; `source(row)` is where a row's activations lie.

    `most` is the largest number of rows there can be, when that is known.
    """

    first: Any
    last: Any
    source: Callable[[Any], Any]
    most: int | None = None


def scratch(em: Emit) -> Any:
    """The buffer that tiles leave their sums in; one for each task, outside of its loops."""
    return T.alloc_buffer((_MOST_PASSES * em.isa.rows, em.isa.panel), "float32")


def plan(height: int, panel: int) -> dict[int, tuple[int, int]]:
    """Number of rows -> (rows of a tile, panels of a tile), where that is not one panel.

    `height` is the register file's limit on rows x panels, `panel` the words of a panel.
    """
    table = {}
    streams = max(1, _STEP_BYTES // (4 * panel))
    for count in range(1, height):
        parts = next(n for n in (1, 2, count) if count % n == 0 and count // n <= height // 2)
        rows = count // parts
        panels = min(streams, height // rows)
        # Reading a panel again for the second half of the rows must save another stream.
        if panels > parts:
            table[count] = rows, panels
    return table


def cover(
    em: Emit,
    matrices: Sequence[Matrix],
    operand: Operand,
    source: Any,
    panels: tuple[Any, Any],
    rows: Rows,
    sums: Any,
    finish: Finish,
) -> None:
    """Every row of `rows` times every panel in [begin, end) of each matrix, then `finish`.

    `matrices` are blocks of K of one matrix: a block of a panel stays in the cache while all
    rows pass it.
    """
    begin, end = panels
    height = em.isa.rows
    most = height if rows.most is None else rows.most
    table = {n: t for n, t in plan(height, em.isa.panel).items() if n <= most}
    total = em.bind(rows.last - rows.first)
    tall: Any = i64(height)
    wide: Any = i64(1)
    for count, (tile_rows, tile_panels) in table.items():
        here = tirx.EQ(total, i64(count))
        tall = tirx.Select(here, i64(tile_rows), tall)
        wide = tirx.Select(here, i64(tile_panels), wide)
    tall, wide = _opaque(em, tall), _opaque(em, wide)
    count = _opaque(em, tirx.floordiv(total + tall - i64(1), tall))
    base = _opaque(em, tirx.floordiv(total, tirx.Max(count, i64(1))))
    larger = em.bind(total - base * count)  # so many tiles have one row more

    few = em.isa.panel >= _WIDE and rows.most is None  # whether a few passes are taken as such
    passes = tirx.And(count >= i64(2), count <= i64(_MOST_PASSES))
    tiles = _Tiles(em, operand, source, rows, count, base, larger, sums)
    groups = _opaque(em, tirx.floordiv(end - begin, wide))  # what is left goes one by one
    single = em.bind(begin + groups * wide)
    with loop(em.bind(groups + end - single)) as step:
        whole = step < groups
        panel = _opaque(em, tirx.Select(whole, begin + step * wide, single + step - groups))
        width = _opaque(em, tirx.Select(whole, wide, i64(1)))
        for matrix in matrices:
            shapes = _shapes(height, table, rows.most)
            if not few:
                tiles.whole(matrix, panel, width, shapes, finish)
                continue
            more = panel + i64(1) < end
            with when(passes):
                if matrix.panels.compact:
                    tiles.whole(matrix, panel, i64(1), [(r, 1) for r in tiles.tall], finish, more)
                else:
                    tiles.pieces(matrix, panel, more, finish)
            with when(tirx.Not(passes)):
                tiles.whole(matrix, panel, width, shapes, finish)


@dataclass(frozen=True)
class _Tiles:
    """The rows of a group in `count` blocks: the first `larger` of them have base + 1 rows."""

    em: Emit
    operand: Operand
    source: Any
    rows: Rows
    count: Any
    base: Any
    larger: Any
    sums: Any

    @property
    def tall(self) -> range:
        """Rows that a tile of a few passes may have."""
        return range(self.em.isa.rows // 2, self.em.isa.rows + 1)

    def whole(
        self,
        matrix: Matrix,
        panel: Any,
        width: Any,
        shapes: Sequence[tuple[int, int]],
        finish: Finish,
        more: Any | None = None,
    ) -> None:
        """Block by block all of K, of `width` panels.

        `more`, with one panel that a few blocks pass: they ask for the next one, if there is one.
        """
        em, depth = self.em, matrix.end - matrix.begin
        with loop(self.count) as block:
            first, number = self._block(block)
            ahead = None
            if more is not None:
                ahead = self._asking(matrix, depth, i64(depth), block, more)
            for r, w in shapes:
                with when(tirx.And(tirx.EQ(number, i64(r)), tirx.EQ(width, i64(w)))):
                    lone = em.isa.panel >= _WIDE and w == 1 and r <= _STEADY_ROWS
                    tile(em, matrix, self.operand, self.source, self._sources(first, r),
                         [panel + i for i in range(w)], self.sums,
                         steady(matrix) if lone else ahead)  # fmt: skip
            with loop(width) as w, loop(number) as i:
                self._finish(finish, first + i, panel + w, w * number + i)

    def pieces(self, matrix: Matrix, panel: Any, more: Any, finish: Finish) -> None:
        """Piece by piece of K all blocks, of one plain panel; `more`: another one follows."""
        em, depth = self.em, matrix.end - matrix.begin
        two = tirx.EQ(self.count, i64(2))
        size = _opaque(em, tirx.Select(two, i64(_PIECE), i64(2 * _PIECE)))
        parts = _opaque(em, tirx.floordiv(i64(depth - 1) + size, size))
        total = em.bind(self.rows.last - self.rows.first)
        start(em, matrix, panel, self.sums, total)
        with loop(parts) as part:
            begin = _opaque(em, i64(matrix.begin) + part * size)
            end = _opaque(em, tirx.Min(begin + size, i64(matrix.end)))
            goes_on = tirx.Or(more, part + i64(1) < parts)
            with loop(self.count) as block:
                first, number = self._block(block)
                piece = Piece(begin, end, em.bind(first - self.rows.first))
                ahead = self._asking(matrix, _LEAD, size, block, goes_on)
                for r in self.tall:
                    with when(tirx.EQ(number, i64(r))):
                        tile(em, matrix, self.operand, self.source, self._sources(first, r),
                             [panel], self.sums, ahead, piece)  # fmt: skip
        with loop(total) as i:
            self._finish(finish, self.rows.first + i, panel, i)

    def _asking(self, matrix: Matrix, lead: int, size: Any, block: Any, more: Any) -> Ahead:
        # A third block would ask for what lies behind all that the first two asked for.
        new = tirx.And(more, block < i64(2))
        return following(self.em, matrix.panels, lead, size, block, new)

    def _block(self, block: Any) -> tuple[Any, Any]:
        """The first row of a block, and how many it has."""
        before = block * self.base + tirx.Min(block, self.larger)
        first = self.em.bind(self.rows.first + before)
        more = tirx.Select(block < self.larger, i64(1), i64(0))
        return first, _opaque(self.em, self.base + more)

    def _sources(self, first: Any, count: int) -> list[Any]:
        return [self.em.bind(self.rows.source(first + i)) for i in range(count)]

    def _finish(self, finish: Finish, row: Any, panel: Any, at: Any) -> None:
        em = self.em
        at = em.bind(at)
        values = [
            em.bind(em.load(self.sums, [at, i64(j * em.lanes)], "float32"))
            for j in range(em.isa.vectors)
        ]
        finish(em.bind(row), em.bind(panel), values)


def _opaque(em: Emit, value: Any) -> Any:
    """A value that TVM does not look into: its simplifier takes minutes over such quotients."""
    return em.bind(tirx.BufferLoad(scalar("int64", value), [0]))


def _shapes(
    height: int, table: dict[int, tuple[int, int]], most: int | None
) -> list[tuple[int, int]]:
    """Every (rows, panels) that a tile may have."""
    single = {(r, 1) for r in range(1, min(height, most or height) + 1)}
    return sorted(single | set(table.values()))
