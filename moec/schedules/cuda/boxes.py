"""Tensor maps of the grouped matmuls: which boxes of a weight the TMA unit copies, and how.

The longer the rows of a box, the faster the memory: a kernel that only reads takes 16 rows of
1 KB at 4.57 TB/s on an H200, 128 rows of 256 bytes at 4.51 and of 128 bytes at 4.38.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .shapes import Matmul

TMA = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
# Cache policies, as createpolicy makes them. Weights that are read once are the first to leave
# the L2: 1 to 5 % faster, with weights of other layers read in between as well.
CACHE_HINT = ".L2::cache_hint"
EVICT_FIRST, EVICT_NORMAL = 0x12F0000000000000, 0x1000000000000000

BK = 64  # columns of a K block: 128 bytes, which the swizzle spans

# The last numbers of a map: not interleaved, the 128-byte swizzle, what a miss brings into the
# L2, zeros out of bounds. To bring 256 bytes makes boxes of long rows 4 to 7 % slower, those of
# 128 rows of 128 bytes 2 %, and those of 256 rows of 128 bytes 1 % faster.
SHORT_ROWS = (0, 3, 3, 0)
LONG_ROWS = (0, 3, 0, 0)


@dataclass(frozen=True)
class Box:
    """The box of a tile's K step: sizes and strides of the map, and where the box lies.

    `steps`: for each dimension, innermost first, what a K step, a tile of an expert's weight
    and an expert add to the coordinate. `numbers` are those that cuTensorMapEncodeTiled takes
    after the address: dimensions, strides in bytes (but the first), box, element strides, modes.
    """

    numbers: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]

    @property
    def rank(self) -> int:
        """Dimensions of the map."""
        return len(self.steps)

    def at(self, k: Any, n: Any, e: Any) -> tuple[Any, ...]:
        """Coordinates of K step k of tile n of expert e."""
        return tuple(
            sum((value * step for value, step in zip((k, n, e), own, strict=True) if step), 0)
            for own in self.steps
        )


def weight_box(shape: Matmul, pair: bool, rows: int, join: int, depth: int) -> Box:
    """Tiles of `rows` rows of the canonical weight by `depth` K blocks, one after another.

    `pair`: the tile holds 8 * `join` gate rows, the up rows that belong to them, the next gate
    rows and so on. A depth of more than one needs a K that is a multiple of BK.
    """
    E, K, cols = shape.experts, shape.inner, shape.outer
    row, group = K * 2, 8 * join
    taken = rows // (2 * group)  # groups of a tile
    if depth == 1 and pair:
        return _box(
            (K, group, 2, cols // group, E),
            (row, cols * row, group * row, 2 * cols * row),
            (BK, group, 2, taken, 1),
            ((BK, 0, 0), (0, 0, 0), (0, 0, 0), (0, taken, 0), (0, 0, 1)),
            SHORT_ROWS,
        )
    if depth == 1:
        return _box(
            (K, cols, E), (row, cols * row), (BK, rows, 1),
            ((BK, 0, 0), (0, rows, 0), (0, 0, 1)), SHORT_ROWS,
        )  # fmt: skip
    if pair:
        # A map has five dimensions at most: the groups of all experts are one. A tile past the
        # end of the gate rows loads rows that nothing reads.
        return _box(
            (BK, group, 2, (2 * E - 1) * (cols // group), K // BK),
            (row, cols * row, group * row, BK * 2),
            (BK, group, 2, taken, depth),
            ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, taken, 2 * cols // group), (depth, 0, 0)),
            LONG_ROWS,
        )
    return _box(
        (BK, cols, K // BK, E), (row, BK * 2, cols * row), (BK, rows, depth, 1),
        ((0, 0, 0), (0, rows, 0), (depth, 0, 0), (0, 0, 1)), LONG_ROWS,
    )  # fmt: skip


def _box(
    dims: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    steps: tuple[tuple[int, int, int], ...],
    modes: tuple[int, ...],
) -> Box:
    return Box((*dims, *strides, *box, *(1,) * len(dims), *modes), steps)
