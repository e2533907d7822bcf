"""What the boxes of the expert matmuls contain, worked out as the TMA unit does."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moec.schedules.cuda.boxes import BK, Box, row_box, tile_box
from moec.schedules.cuda.shapes import Matmul

EXPERTS = 3


def copied(box: Box, at: tuple[int, ...], item: int = 2) -> np.ndarray:
    """Element offsets in the order of shared memory; -1 where a coordinate is out of bounds."""
    rank = box.rank
    dims, strides = box.numbers[:rank], (item, *box.numbers[rank : 2 * rank - 1])
    sizes = box.numbers[2 * rank - 1 : 3 * rank - 1]
    offsets = np.zeros(1, np.int64)
    inside = np.ones(1, bool)
    for dim, stride, size, first in reversed(list(zip(dims, strides, sizes, at, strict=True))):
        here = first + np.arange(size)
        offsets = (offsets[:, None] + here * (stride // item)).ravel()
        inside = (inside[:, None] & ((here >= 0) & (here < dim))).ravel()
    return np.where(inside, offsets, -1)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize(("inner", "cols"), [(192, 64), (256, 120), (320, 136), (64, 8), (72, 200)])
@pytest.mark.parametrize("pair", [True, False])
def test_boxes_hold_the_rows_of_their_tile(
    pair: bool, inner: int, cols: int, blocks: int, depth: int
) -> None:
    depth = depth if inner % BK == 0 else 1  # as the kernels do
    shape = Matmul(EXPERTS, 2, inner, cols, pair, False, "bfloat16")
    rows = 128 * blocks
    join = blocks if not pair or cols % (8 * blocks) == 0 else 1
    box = tile_box(shape, pair, rows, join, depth)
    outputs = rows // 2 if pair else rows
    weight_rows = cols * (2 if pair else 1)
    row = np.arange(rows)
    if pair:  # a group of gate rows, the up rows that belong to it, and so on
        group = 8 * join
        half, row = row // group % 2, row // (2 * group) * group + row % group
    else:
        half = np.zeros_like(row)
    tiles, steps = -(-cols // outputs), -(-inner // (BK * depth))
    for e, n, k in itertools.product(range(EXPERTS), range(tiles), range(steps)):
        got = copied(box, box.at(k, n, e)).reshape(depth, rows, BK)
        assert got.max() < EXPERTS * weight_rows * inner
        column = (k * depth + np.arange(depth))[:, None, None] * BK + np.arange(BK)
        output = (n * outputs + row)[:, None]
        want = (e * weight_rows + half[:, None] * cols + output) * inner + column
        want = np.where(column < inner, want, -1)
        valid = np.broadcast_to(output < cols, got.shape)
        np.testing.assert_array_equal(got[valid], np.broadcast_to(want, got.shape)[valid])


@pytest.mark.parametrize("rows", [8, 16])
@pytest.mark.parametrize("pair", [True, False])
def test_boxes_hold_the_rows_that_follow_a_row(pair: bool, rows: int) -> None:
    inner, cols, depth = 384, 40, 3
    box = row_box(Matmul(EXPERTS, 2, inner, cols, pair, False, "bfloat16"), pair, rows, depth)
    halves = 2 if pair else 1
    for e, first, k in itertools.product(range(EXPERTS), (0, 7, 24, 32), range(2)):
        got = copied(box, box.at(k, first, e)).reshape(depth, halves, rows, BK)
        column = (k * depth + np.arange(depth))[:, None, None, None] * BK + np.arange(BK)
        half = np.arange(halves)[:, None, None]
        row = first + np.arange(rows)[:, None]
        want = ((e * halves + half) * cols + row) * inner + column
        np.testing.assert_array_equal(got, np.where(row < cols, want, -1))
