"""What a schedule of this backend declares: a family of kernels, and its tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ...target import Form
from .sort import Grid


@dataclass(frozen=True)
class CudaConfig:
    """Which family of kernels multiplies, and its tiles, where it has a choice of them.

    `compact`: its tiles for compact weights. `sorted_by`: which blocks sort. `few`: the dense
    matmuls of the block are those of at most 8 tokens. `faster`: the form of the weights that it
    is faster with.
    """

    family: str
    tiles: Any = None
    tile_rows: int = 64
    grain: int = 0
    sorted_by: Grid = Grid.BLOCK
    few: bool = False
    compact: Any = None
    faster: Form = Form.PLAIN

    def reads(self, held: Form) -> Form:
        """The form that it reads of those that a target holds."""
        return self.faster if held is Form.BOTH else held

    def of(self, form: Form) -> CudaConfig:
        """That for weights of this form, which is one."""
        if form is Form.PLAIN or self.compact is None:
            return self
        return replace(self, tiles=self.compact, tile_rows=self.compact.rows)
