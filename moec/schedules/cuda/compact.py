"""bfloat16 weights of experts in 12 bits: the form in memory, and how kernels read it.

The exponents of trained weights hold some 2.6 of their 8 bits (https://arxiv.org/abs/2504.11651),
so that of the 128 high bytes (sign aside: the exponent but for its last bit) eight are enough for
all but a few weights. A weight is its low byte as it is, its sign, and three bits that name one of
the eight high bytes which occur most in its strip. Any other weight is written down whole, beside.

    packed  [E, expert_bytes / 4] int32
    expert  strips of 8 weight rows, of a gated weight gate and up rows in turn (8 gate rows, the 8
            up rows that belong to them, the next gate rows); then the exceptions of the expert that
            found no room in their strips
    strip   a header, then a unit of UNIT bytes for each 64 columns
    header  8 high bytes; int32 count of exceptions; int32 place of the ones without room; as many
            exceptions as find room, zeros in place of missing ones
    unit    two halves, of 32 columns each
    half    [32 lanes, 8] low bytes, then [32 lanes] words of signs and codes
    exception  int32: the weight's bits, its place in the lane << 16, the lane << 20; int32: its
            half in the strip, the number of the lane's next exception << 16 (NONE: there is none)

Lane 4 g + q has the weights of row g that it needs for mma and wgmma: place 4 s + 2 j + i is column
16 s + 8 j + 2 q + i of the half. Place p has its code in bits 4 p to 4 p + 2; its sign is bit
8 p + 7 where p < 4, and bit 8 (p - 4) + 3 elsewhere. In place of an exception is code 0.
Exceptions are numbered from the last half to the first, so that a lane's next one has a lower
number: its first one has the highest.

Expanded weights are the bits that were packed: where tiles add up in the same order, results are
those of plain weights bit by bit.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...target import Form

WEIGHTS = ("gate_up", "down")  # the parameters of a block that have this form
STRIP, COLUMNS = 8, 64  # rows of a strip, columns of a unit
UNIT, HALF, LANES = 768, 384, 32  # bytes, bytes
NONE = 0xFFFF  # beyond the numbers of halves, as a spec has widths up to 2^20
EXCEPTION = 8  # bytes
_HEAD, _LINE = 16, 128  # bytes before the exceptions of a header; of the L2
_SHORT = 64  # units of a strip whose exceptions find room in one line
_RARE = 1024  # of so many weights one may be an exception that finds no room in its strip


def names(held: Form) -> dict[str, str]:
    """What compact weights are packed as: by their own names where plain ones are not held too."""
    return {name: name + ("_compact" if held is Form.BOTH else "") for name in WEIGHTS}


@dataclass(frozen=True)
class Layout:
    """The packed form of a weight [experts, rows, inner]; 8 divides rows, 64 inner."""

    experts: int
    rows: int
    inner: int

    @property
    def strips(self) -> int:
        """Strips of an expert."""
        return self.rows // STRIP

    @property
    def units(self) -> int:
        """Units of a strip."""
        return self.inner // COLUMNS

    @property
    def header(self) -> int:
        """Bytes of a header: one exception in 5 600 weights makes 6 in a strip of 64 units."""
        return _LINE if self.units <= _SHORT else 2 * _LINE

    @property
    def inline(self) -> int:
        """Exceptions that find room in a header."""
        return (self.header - _HEAD) // EXCEPTION

    @property
    def strip_bytes(self) -> int:
        """Bytes from a strip to the next."""
        return self.header + self.units * UNIT

    @property
    def spare(self) -> int:
        """Exceptions of an expert for which there is room behind its strips."""
        return -(-self.rows * self.inner // _RARE // (_LINE // EXCEPTION)) * (_LINE // EXCEPTION)

    @property
    def expert_bytes(self) -> int:
        """Bytes from an expert to the next."""
        return self.strips * self.strip_bytes + self.spare * EXCEPTION

    @property
    def shape(self) -> tuple[int, int]:
        """The packed parameter, int32."""
        return self.experts, self.expert_bytes // 4


def headers_kept(stages: int, boxes: int) -> int:
    """Whose headers are kept: of each that may have a box in a ring of so many, and of one more.

    `boxes`: how many boxes those that share a header have at least.
    """
    return 2 + -(-stages // boxes)
