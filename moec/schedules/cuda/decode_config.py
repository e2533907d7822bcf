"""How many chunks of K the boxes of `gather` hold, and how many boxes are in flight."""

from __future__ import annotations

from dataclasses import dataclass

from ...target import Form
from .boxes import BK
from .compact import STRIP, UNIT, Layout

CHUNK = BK


@dataclass(frozen=True)
class DecodeConfig:
    """`chunks` of 64 columns of K a box (one a warp; divides K / 64), ring `stages`.

    `ahead`: boxes whose activations the second kernel loads at a time.
    """

    chunks: int = 8
    stages: int = 6
    ahead: int = 3


def chunks_of(width: int) -> int:
    """Chunks a box for a K of `width`: the divisor of width / 64 nearest to 12, at most 16."""
    blocks = width // CHUNK
    return min((c for c in range(1, 17) if blocks % c == 0), key=lambda c: abs(c - 12))


# A warp reads, expands and multiplies a chunk of compact weights: the more warps, the more of that
# is under way. With more than 14 beside those that load and finish, a thread of `gate_up` has 96
# registers and not 128, in which three chunks of the tokens find room; with more than 15 beside the
# one that loads, a thread of `down` has 96, which do for 16 columns.
def first_config(width: int, form: Form = Form.PLAIN) -> DecodeConfig:
    """That of `gate_up`, for a K of `width`."""
    if form is Form.PLAIN:
        return _fitting(chunks_of(width), width, 176, form)
    chunks = _most(width, 16)
    if width // CHUNK > 3 * chunks:
        chunks = chunks_of(width)
    return _fitting(chunks, width, 168, form)


def second_config(width: int, outer: int, sms: int, form: Form = Form.PLAIN) -> DecodeConfig:
    """That of `down`, for a K of `width` and so many columns."""
    if form is Form.PLAIN:
        return _fitting(chunks_of(width), width, 192, form)
    chunks = _most(width, 16 if outer <= 2 * STRIP * sms else 15)
    return _fitting(chunks, width, 176, form)


def _most(width: int, limit: int) -> int:
    """The largest divisor of width / 64 up to `limit`."""
    return max(c for c in range(1, limit + 1) if width // CHUNK % c == 0)


def _fitting(chunks: int, width: int, kilobytes: int, form: Form) -> DecodeConfig:
    """So many chunks a box, and a ring that takes so much shared memory."""
    box = chunks * 16 * CHUNK * 2  # bytes
    if form is Form.PLAIN:
        return DecodeConfig(chunks, max(2, kilobytes * 1024 // box), 3)
    box = 2 * (chunks * UNIT + Layout(1, STRIP, width).header)
    # Where an expert has one box, the headers of as many experts are kept.
    return DecodeConfig(chunks, min(32, max(2, kilobytes * 1024 // box)), 3)
