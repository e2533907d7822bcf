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
waits for them. So each step of each pass asks for two cache lines of the weights half a panel
later, or a whole compact one. At 8 to 12 rows bfloat16 takes 5 to 8 % less time, float32 up to
5 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script import builder as T

from .emit import Emit, i64
from .kernel import loop, scalar, when
from .tiles import Ahead, Matrix, Operand, following, steady, tile

# Weights that a step of K should take from all panels of a tile: with less, the additions to the
# same few sums, one after the other, take longer than memory.
_STEP_BYTES = 256

_STEADY_ROWS = 2  # of a tile, up to which it asks at a steady distance; three rows lose by it
_MOST_PASSES = 3  # over a panel, where what follows is asked for: more of them hide it anyway
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
    return T.alloc_buffer((em.isa.rows, em.isa.panel), "float32")


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

    def asks(tall: int, wide: int) -> bool:
        """Whether there is a tile of this shape that asks for what follows."""
        many = em.isa.panel >= _WIDE and rows.most is None
        return many and wide == 1 and 2 * tall >= height

    shapes = [(*shape, asking) for shape in _shapes(height, table, rows.most)
              for asking in (False, True) if not asking or asks(*shape)]  # fmt: skip
    groups = _opaque(em, tirx.floordiv(end - begin, wide))  # what is left goes one by one
    single = em.bind(begin + groups * wide)
    with loop(em.bind(groups + end - single)) as step:
        whole = step < groups
        panel = _opaque(em, tirx.Select(whole, begin + step * wide, single + step - groups))
        width = _opaque(em, tirx.Select(whole, wide, i64(1)))
        passes = tirx.And(count >= i64(2), count <= i64(_MOST_PASSES))
        follows = tirx.And(passes, panel + i64(1) < end)
        for matrix in matrices:
            with loop(count) as block:
                first = em.bind(rows.first + block * base + tirx.Min(block, larger))
                # A third block would ask for what lies behind all that the first two asked for.
                early = tirx.And(follows, block < i64(2)) if matrix.panels.compact else follows
                more = _opaque(em, tirx.Select(early, i64(1), i64(0)))
                number = _opaque(em, base + tirx.Select(block < larger, i64(1), i64(0)))
                for r, w, asking in shapes:
                    here = tirx.And(tirx.EQ(number, i64(r)), tirx.EQ(width, i64(w)))
                    if asks(r, w):
                        here = tirx.And(here, tirx.EQ(more, i64(int(asking))))
                    with when(here):
                        sources = [em.bind(rows.source(first + i)) for i in range(r)]
                        ahead = _ahead(em, matrix, block, r, w, asking)
                        tile(em, matrix, operand, source, sources,
                             [panel + i for i in range(w)], sums, ahead)  # fmt: skip
                with loop(width) as w, loop(number) as i:
                    at = em.bind(w * number + i)
                    values = [
                        em.bind(em.load(sums, [at, i64(j * em.lanes)], "float32"))
                        for j in range(em.isa.vectors)
                    ]
                    finish(em.bind(first + i), em.bind(panel + w), values)


def _ahead(
    em: Emit, matrix: Matrix, block: Any, rows: int, panels: int, follows: bool
) -> Ahead | None:
    """What a tile of `rows` x `panels` asks for; `follows`: this is one of few passes."""
    if follows:
        return following(em, matrix, block)
    if em.isa.panel >= _WIDE and panels == 1 and rows <= _STEADY_ROWS:
        return steady(matrix)
    return None


def _opaque(em: Emit, value: Any) -> Any:
    """A value that TVM does not look into: its simplifier takes minutes over such quotients."""
    return em.bind(tirx.BufferLoad(scalar("int64", value), [0]))


def _shapes(
    height: int, table: dict[int, tuple[int, int]], most: int | None
) -> list[tuple[int, int]]:
    """Every (rows, panels) that a tile may have."""
    single = {(r, 1) for r in range(1, min(height, most or height) + 1)}
    return sorted(single | set(table.values()))
