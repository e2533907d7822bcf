"""What the expert matmuls of a block look like to their kernels, whatever the schedule."""

from __future__ import annotations

from dataclasses import dataclass

from ...target import Form
from ..buffers import Buf, PerToken
from . import sort
from .compact import Layout


@dataclass(frozen=True)
class Matmul:
    """[rows, inner] times the expert's [(2 x) outer, inner] weight.

    `gated`: the weight has gate rows, then as many up rows, and the activation combines them.
    """

    experts: int
    top_k: int
    inner: int
    outer: int
    gated: bool
    bias: bool
    dtype: str
    form: Form = Form.PLAIN

    @property
    def layout(self) -> Layout:
        """Of the compact form."""
        return Layout(self.experts, self.weight_rows, self.inner)

    @property
    def weight(self) -> Buf:
        """The weight: [E, (2 x) outer, inner], or as the layout says."""
        if self.form is Form.COMPACT:
            return Buf("weight", self.layout.shape, "int32")
        return Buf("weight", (self.experts, self.weight_rows, self.inner), self.dtype)

    @property
    def weight_rows(self) -> int:
        """Rows of an expert's weight."""
        return self.outer * (2 if self.gated else 1)

    def buffers(self, result: str, gather: bool) -> tuple[Buf, ...]:
        """Arguments of a grouped matmul kernel; without bias the weight stands in its place."""
        _, order, _, tiles, count = sort.buffers(self.experts, self.top_k)
        rows = PerToken() if gather else PerToken(self.top_k)
        bias = Buf("bias", (self.experts, self.weight_rows), "float32")
        return (
            Buf("x", (rows, self.inner), self.dtype, gather),
            order,
            tiles,
            count,
            self.weight,
            bias if self.bias else self.weight,
            Buf(result, (PerToken(self.top_k), self.outer), self.dtype),
        )
