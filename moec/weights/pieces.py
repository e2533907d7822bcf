"""How parts of tensors on disk fill one canonical parameter: pure data, checked when made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Union

import numpy as np

from ..errors import BadWeights

Array = np.ndarray[Any, np.dtype[Any]]
# How one axis of a tensor on disk is sliced: "e" takes entry e and drops the axis,
# ("e", n) takes the e-th run of n entries, (start, stop, step) is a slice.
Axis = Union[str, "tuple[str, int]", "tuple[int, int, int]"]


@dataclass(frozen=True)
class Piece:
    """A part of one tensor on disk that fills rows of a canonical parameter.

    `tensor` may hold "{e}", the expert number. `shape` is the shape on disk. `rows` are rows
    of the canonical per-expert array (of the whole array when the parameter is not per
    expert). After slicing by `index` the last two axes are swapped when `transpose`.
    `experts` is the range [first, last) of experts that the tensor holds, counted from 0 in the
    tensor (or in its name); None = all.
    """

    tensor: str
    shape: tuple[int, ...]
    rows: tuple[int, int]
    index: tuple[Axis, ...]
    transpose: bool
    experts: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if len(self.index) != len(self.shape):
            raise BadWeights(f"{self.tensor}: {len(self.index)} slices for shape {self.shape}")
        for axis in self.index:
            if not _forward(axis):
                raise BadWeights(f"{self.tensor}: the slice {axis} is not forward")

    def name(self, expert: int) -> str:
        """The tensor's name for one expert."""
        return self.tensor.replace("{e}", str(self.local(expert)))

    def local(self, expert: int) -> int:
        """The number of an expert within the tensor."""
        return expert - (self.experts[0] if self.experts else 0)

    def covers(self, expert: int) -> bool:
        """Whether an expert is one of those that the tensor holds."""
        return self.experts is None or self.experts[0] <= expert < self.experts[1]

    def elements(self) -> int:
        """Elements that one expert takes from the tensor."""
        return math.prod(
            _extent(axis, size) for axis, size in zip(self.index, self.shape, strict=True)
        )

    def holds(self, experts: int) -> bool:
        """Whether every slice lies inside the tensor, for each of `experts` experts."""
        ends = (_end(axis, experts) for axis in self.index)
        return all(end <= size for end, size in zip(ends, self.shape, strict=True))

    def cut(self, array: Array, expert: int) -> Array:
        """The view of `array` that this piece means, rows first."""
        expert = self.local(expert)
        key: list[Any] = []
        for axis in self.index:
            if isinstance(axis, str):
                key.append(expert)
            elif len(axis) == 2:
                key.append(slice(expert * axis[1], (expert + 1) * axis[1]))
            else:
                key.append(slice(*axis))
        view: Array = array[tuple(key)]
        return view.swapaxes(-1, -2) if self.transpose else view


def _forward(axis: Axis) -> bool:
    if isinstance(axis, str):
        return axis == "e"
    if len(axis) == 2:
        return axis[1] >= 1
    return 0 <= axis[0] <= axis[1] and axis[2] >= 1


def _extent(axis: Axis, size: int) -> int:
    if isinstance(axis, str):
        return 1
    if len(axis) == 2:
        return axis[1]
    return len(range(*slice(*axis).indices(size)))


def _end(axis: Axis, experts: int) -> int:
    """How many entries an axis must have at least."""
    if isinstance(axis, str):
        return experts
    return axis[1] * experts if len(axis) == 2 else axis[1]


@dataclass(frozen=True)
class ParamPlan:
    """One canonical parameter: its shape, dtype, and the pieces that fill it.

    With `per_expert`, axis 0 of `shape` counts experts and each is read by itself. A matrix
    has the same dtype on disk; a vector is float32 here and any float dtype on disk; an int32
    table may be int64 on disk.
    """

    shape: tuple[int, ...]
    dtype: str
    per_expert: bool
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        if len(self.shape) <= self.per_expert:
            raise BadWeights(f"the shape {self.shape} has no rows")
        starts = {piece.experts[0] if piece.experts else 0 for piece in self.pieces}
        for expert in sorted({0, self.experts - 1} | starts):
            self._check_rows(self.of(expert))

    def of(self, expert: int) -> tuple[Piece, ...]:
        """The pieces that fill one expert (of the only one, when not per expert)."""
        return tuple(piece for piece in self.pieces if piece.covers(expert))

    def _check_rows(self, pieces: tuple[Piece, ...]) -> None:
        rows, width = self.canonical[0], math.prod(self.canonical[1:])
        end = 0
        for piece in pieces:
            if piece.rows[0] != end or piece.rows[1] <= end:
                raise BadWeights(f"rows {piece.rows} of {piece.tensor} do not follow row {end}")
            end = piece.rows[1]
            if piece.elements() != (piece.rows[1] - piece.rows[0]) * width:
                raise BadWeights(f"{piece.tensor} does not fill rows {piece.rows} of {width}")
            first, last = piece.experts or (0, self.experts)
            if not piece.holds(last - first):
                raise BadWeights(f"{piece.tensor} {piece.shape} has no {last - first} experts")
        if end != rows:
            raise BadWeights(f"the pieces fill {end} of {rows} rows")

    @property
    def canonical(self) -> tuple[int, ...]:
        """The shape of what is read at once: one expert, or the whole parameter."""
        return self.shape[1:] if self.per_expert else self.shape

    @property
    def experts(self) -> int:
        """How many experts are read one by one; 1 when not per expert."""
        return self.shape[0] if self.per_expert else 1

    @property
    def is_vector(self) -> bool:
        """Whether this is bound as float32 whatever the dtype on disk."""
        return len(self.canonical) == 1
