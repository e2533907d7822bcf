"""Tensor maps of the expert matmuls: which boxes of a weight the TMA unit copies, and how.

The longer the rows of a box, the faster the memory: a kernel that only reads takes 16 rows of
1 KB at 4.57 TB/s on an H200, 128 rows of 256 bytes at 4.51 and of 128 bytes at 4.38.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .compact import UNIT, Layout
from .shapes import Matmul

TMA = "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes"
# Cache policies, as createpolicy makes them. Weights that are read once are the first to leave
# the L2: 1 to 5 % faster, with weights of other layers read in between as well.
CACHE_HINT = ".L2::cache_hint"
EVICT_FIRST, EVICT_NORMAL = 0x12F0000000000000, 0x1000000000000000

NO_MAP = "the driver refused a tensor map over the weights"
_DATA_TYPES = {"uint64": 4, "float16": 6, "bfloat16": 9}  # CUtensorMapDataType

BK = 64  # columns of a K block: 128 bytes, which the swizzle spans

# The last numbers of a map: not interleaved, the 128-byte swizzle, what a miss brings into the
# L2, zeros out of bounds. To bring 256 bytes makes boxes of long rows 4 to 7 % slower, those of
# 128 rows of 128 bytes 2 %, and those of 256 rows of 128 bytes 1 % faster.
SHORT_ROWS = (0, 3, 3, 0)
LONG_ROWS = (0, 3, 0, 0)
UNITS = (0, 0, 0, 0)  # of the compact form: no swizzle
# Its maps are of words of 8 bytes: a box has 256 elements a dimension at most.
PACKED, _WORD = "uint64", 8


@dataclass(frozen=True)
class Box:
    """The boxes of a weight: the tensor map over it, and where each of them lies.

    `dims`, `strides` (bytes, from the second dimension on) and `box` go from the innermost
    dimension outwards, and so do `steps`: what a K step, a place among the rows of an expert (a
    tile's number, or a row) and an expert add to the coordinate. `modes`: SHORT_ROWS, LONG_ROWS.
    `offset`: bytes from the start of the weight.
    """

    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[tuple[int, int, int], ...]
    modes: tuple[int, ...] = LONG_ROWS
    offset: int = 0

    @property
    def rank(self) -> int:
        """Dimensions of the map."""
        return len(self.dims)

    @property
    def numbers(self) -> tuple[int, ...]:
        """What cuTensorMapEncodeTiled takes after the address; element strides are 1."""
        return (*self.dims, *self.strides, *self.box, *(1,) * self.rank, *self.modes)

    def text(self, dtype: str) -> str:
        """What moec_tensor_map takes (maps.py)."""
        return " ".join(map(str, (self.offset, _DATA_TYPES[dtype], self.rank, *self.numbers)))

    def at(self, k: Any, place: Any, e: Any) -> tuple[Any, ...]:
        """Coordinates of the box of a K step, a place and an expert."""
        return tuple(
            sum((value * step for value, step in zip((k, place, e), own, strict=True) if step), 0)
            for own in self.steps
        )


def tile_box(shape: Matmul, pair: bool, rows: int, join: int, depth: int) -> Box:
    """Tiles of `rows` rows by `depth` K blocks, one after another; places are numbers of tiles.

    `pair`: the tile holds 8 * `join` gate rows, the up rows that belong to them, the next gate
    rows and so on. A depth of more than one needs a K that is a multiple of BK.
    """
    E, K, cols = shape.experts, shape.inner, shape.outer
    row, group = K * 2, 8 * join
    taken = rows // (2 * group)  # groups of a tile
    if depth == 1 and pair:
        return Box(
            (K, group, 2, cols // group, E),
            (row, cols * row, group * row, 2 * cols * row),
            (BK, group, 2, taken, 1),
            ((BK, 0, 0), (0, 0, 0), (0, 0, 0), (0, taken, 0), (0, 0, 1)),
            SHORT_ROWS,
        )
    if depth == 1:
        return Box(
            (K, cols, E), (row, cols * row), (BK, rows, 1),
            ((BK, 0, 0), (0, rows, 0), (0, 0, 1)), SHORT_ROWS,
        )  # fmt: skip
    if pair:
        # A map has five dimensions at most: the groups of all experts are one. A tile past the
        # end of the gate rows loads rows that nothing reads.
        return Box(
            (BK, group, 2, (2 * E - 1) * (cols // group), K // BK),
            (row, cols * row, group * row, BK * 2),
            (BK, group, 2, taken, depth),
            ((0, 0, 0), (0, 0, 0), (0, 0, 0), (0, taken, 2 * cols // group), (depth, 0, 0)),
        )
    return Box(
        (BK, cols, K // BK, E), (row, BK * 2, cols * row), (BK, rows, depth, 1),
        ((0, 0, 0), (0, rows, 0), (depth, 0, 0), (0, 0, 1)),
    )  # fmt: skip


def row_box(shape: Matmul, pair: bool, rows: int, depth: int) -> Box:
    """`rows` rows (`pair`: as many gate rows, then their up rows) by `depth` K blocks.

    The blocks lie one after another; places are rows. K is a multiple of BK.
    """
    E, K, cols = shape.experts, shape.inner, shape.outer
    row = K * 2
    if pair:
        return Box(
            (BK, cols, 2, K // BK, E), (row, cols * row, BK * 2, 2 * cols * row),
            (BK, rows, 2, depth, 1),
            ((0, 0, 0), (0, 1, 0), (0, 0, 0), (depth, 0, 0), (0, 0, 1)),
        )  # fmt: skip
    return Box(
        (BK, cols, K // BK, E), (row, BK * 2, cols * row), (BK, rows, depth, 1),
        ((0, 0, 0), (0, 1, 0), (depth, 0, 0), (0, 0, 1)),
    )  # fmt: skip


def unit_box(layout: Layout, strips: int, units: int) -> Box:
    """So many units of so many strips of a compact weight; places are strips."""
    return Box(
        (UNIT // _WORD, layout.units, layout.strips, layout.experts),
        (UNIT, layout.strip_bytes, layout.expert_bytes),
        (UNIT // _WORD, units, strips, 1),
        ((0, 0, 0), (units, 0, 0), (0, 1, 0), (0, 0, 1)),
        UNITS, layout.header,
    )  # fmt: skip


def header_box(layout: Layout, strips: int) -> Box:
    """The headers of so many strips of a compact weight; places are strips."""
    return Box(
        (layout.header // _WORD, layout.strips, layout.experts),
        (layout.strip_bytes, layout.expert_bytes),
        (layout.header // _WORD, strips, 1),
        ((0, 0, 0), (0, 1, 0), (0, 0, 1)),
        UNITS,
    )
