"""Tiles of the matmuls on simdgroup matrices: declared sizes, and what follows from them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from tvm import tirx

_ACCUMULATED = 16  # columns of a SIMD group, which owns all rows of the tile


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` of a result, made from steps of `step` of K (msl/tiles.metal)."""

    rows: int
    columns: int
    step: int

    def __post_init__(self) -> None:
        assert self.threads <= 256 and 16 * self.scratch4 <= 32768

    @property
    def threads(self) -> int:
        """One SIMD group for 16 columns."""
        return self.columns // _ACCUMULATED * 32

    @property
    def scratch4(self) -> int:
        """float4s of threadgroup memory: both operands as float, and what the tile works on."""
        return (self.rows + self.columns) * self.step // 4 + 3 * self.rows // 4 + 1

    @property
    def type(self) -> str:
        """The template argument of every kernel."""
        return f"moec::Tile<{self.rows}, {self.columns}, {self.step}>"

    def outputs(self, gated: bool) -> int:
        """Columns of the output: a gated tile has half of them for gate, half for up."""
        return self.columns // 2 if gated else self.columns

    def count(self, tokens: Any, c: SimpleNamespace) -> Any:
        """Tiles that S = T K rows in E + 1 buckets may need: known from T alone."""
        total = tokens * c.top_k
        return tirx.Min(total, tirx.floordiv(total, self.rows) + c.experts + 1)


# Both have 12 KB of operands. The large one loads half as much for a product, the small one
# gives twice as many threadgroups, which is what few rows lack.
SMALL = Tile(32, 64, 32)
LARGE = Tile(64, 128, 16)
