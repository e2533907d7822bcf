"""Tensor sources as families write them, `"mlp.experts.gate_up_proj [E,H,2I] interleaved"`.

The symbols between the brackets state the layout on disk: E experts, I intermediate, H
hidden, F shared width, M latent width, N experts that every token passes, V vocabulary, K
experts per token, 1 and 2; `2I` is gate and up in one axis, `E*I` experts one after another.
In the router's tensors E counts all that it scores (zero and always experts too), in the
experts' tensors H is the width that experts work in (M with latent projections).
Orientation follows from the symbols alone, so equal sizes never make it a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..weights import Axis, Piece
from .faults import bad_family

_SOURCE = re.compile(r"(\S+) \[([^\]]+)\]( interleaved)?")
_AXIS = re.compile(r"(E\*)?(2?)([EHIFMNVK]|1)|2")


@dataclass(frozen=True)
class Slot:
    """A place that a source fills: parameter, canonical axes (per expert), per expert or not.

    `sizes` says what a symbol stands for here when it is not the size of that name: R all that
    the router scores, S what it selects from, W the width that experts work in. `experts` is
    the symbol that counts the experts of a per-expert slot.
    """

    param: str
    axes: tuple[str, ...]
    per_expert: bool
    sizes: tuple[tuple[str, str], ...] = ()
    experts: str = "E"

    def dims(self, dims: dict[str, int]) -> dict[str, int]:
        """`dims` as the symbols of this slot mean them (where a size of its own is given)."""
        return {**dims, **{symbol: dims[name] for symbol, name in self.sizes if name in dims}}


_SCORED = (("E", "R"),)
_WORK = (("H", "W"),)

SLOTS: dict[str, Slot] = {
    "router": Slot("router", ("E", "H"), False, _SCORED),
    "gate": Slot("gate_up", ("I", "H"), True, _WORK),
    "up": Slot("gate_up", ("I", "H"), True, _WORK),
    "gate_up": Slot("gate_up", ("2I", "H"), True, _WORK),
    "down": Slot("down", ("H", "I"), True, _WORK),
    "always_gate": Slot("gate_up", ("I", "H"), True, _WORK, "N"),
    "always_up": Slot("gate_up", ("I", "H"), True, _WORK, "N"),
    "always_gate_up": Slot("gate_up", ("2I", "H"), True, _WORK, "N"),
    "always_down": Slot("down", ("H", "I"), True, _WORK, "N"),
    "latent_in": Slot("latent_in", ("M", "H"), False),
    "latent_out": Slot("latent_out", ("H", "M"), False),
    "shared_gate": Slot("shared_gate_up", ("F", "H"), False),
    "shared_up": Slot("shared_gate_up", ("F", "H"), False),
    "shared_gate_up": Slot("shared_gate_up", ("2F", "H"), False),
    "shared_down": Slot("shared_down", ("H", "F"), False),
    "shared_router": Slot("shared_router", ("1", "H"), False),
    "shared_coefficients": Slot("shared_router", ("2", "H"), False),
    "shared_router_bias": Slot("shared_router_bias", ("2",), False),
    "router_bias": Slot("router_bias", ("E",), False, _SCORED),
    "selection_bias": Slot("selection_bias", ("E",), False, (("E", "S"),)),
    "per_expert_scale": Slot("per_expert_scale", ("E",), False, _SCORED),
    "global_scale": Slot("global_scale", ("1",), False),
    "token_table": Slot("token_table", ("V", "K"), False),
    "output_bias": Slot("output_bias", ("H",), False),
    "gate_bias": Slot("gate_up_bias", ("I",), True),
    "up_bias": Slot("gate_up_bias", ("I",), True),
    "gate_up_bias": Slot("gate_up_bias", ("2I",), True),
    "down_bias": Slot("down_bias", ("H",), True, _WORK),
    "norm_router_input": Slot("norm_router_input", ("H",), False),
    "norm_experts_input": Slot("norm_experts_input", ("H",), False),
    "norm_latent_input": Slot("norm_latent_input", ("M",), False),
    "norm_expert_output": Slot("norm_expert_output", ("H",), False, _WORK),
    "norm_experts_output": Slot("norm_experts_output", ("H",), False),
    "norm_shared_input": Slot("norm_shared_input", ("H",), False),
    "norm_shared_output": Slot("norm_shared_output", ("H",), False),
    "norm_block_output": Slot("norm_block_output", ("H",), False),
}
# Slots that together fill a parameter, in row order, best first; others are one to one.
_TOGETHER = {
    "gate_up": (("gate_up",), ("gate", "up"), ("up",)),
    "gate_up_bias": (("gate_up_bias",), ("gate_bias", "up_bias"), ("up_bias",)),
    "shared_gate_up": (("shared_gate_up",), ("shared_gate", "shared_up"), ("shared_up",)),
    "shared_router": (("shared_router",), ("shared_coefficients",)),
}
_ALWAYS = {
    "gate_up": (("always_gate_up",), ("always_gate", "always_up")),
    "down": (("always_down",),),
}


@dataclass(frozen=True)
class Source:
    """One parsed source: the tensor's name below the layer, its axes on disk, its order."""

    name: str
    axes: tuple[str, ...]
    interleaved: bool

    def shape(self, dims: dict[str, int]) -> tuple[int, ...]:
        """The shape on disk for the sizes `dims`."""
        return tuple(_size(axis, dims) for axis in self.axes)


def parse_source(text: Any, where: str) -> Source:
    """Parse one source; BadSpec naming the family file when it is malformed."""
    match = _SOURCE.fullmatch(text) if isinstance(text, str) else None
    axes = tuple(a.strip() for a in match[2].split(",")) if match else ()
    if match is None or not all(_AXIS.fullmatch(a) for a in axes):
        raise bad_family(
            f"{text!r} is no tensor source",
            where,
            "name [AXES] or name [AXES] interleaved, axes of E, I, H, F, M, 2I, 2F, E*I, ...",
        )
    return Source(match[1], axes, match[3] is not None)


def combinations(param: str) -> tuple[tuple[str, ...], ...]:
    """The ways in which slots can fill `param`, best first."""
    return _TOGETHER.get(param, ((param,),))


def always_combinations(param: str) -> tuple[tuple[str, ...], ...]:
    """The ways in which slots can fill `param` of the experts that every token passes."""
    return _ALWAYS[param]


def _size(axis: str, dims: dict[str, int]) -> int:
    if axis == "2":
        return 2
    match = _AXIS.fullmatch(axis)
    assert match is not None
    size = dims[match[3]] * (2 if match[2] else 1)
    return size * dims["E"] if match[1] else size


def make_pieces(
    slot: Slot,
    source: Source,
    tensor: str,
    first_row: int,
    dims: dict[str, int],
    where: str,
    experts: tuple[int, int] | None = None,
) -> tuple[Piece, ...]:
    """The pieces by which `source`, named `tensor` in the file, fills rows from `first_row`.

    `experts` is the range of experts that the tensor holds; None = all.
    """
    dims = slot.dims(dims)
    index, rest = _slices(slot, source, dims)
    transpose = rest != slot.axes and rest == slot.axes[::-1]
    if rest != slot.axes and not transpose:
        raise bad_family(
            f"{source.name} [{','.join(source.axes)}] cannot fill {slot.param}",
            where,
            f"the axes {', '.join(slot.axes)}, in this or the reverse order",
        )
    shape = source.shape(dims)
    rows = _size(slot.axes[0], dims)
    if not source.interleaved:
        span = (first_row, first_row + rows)
        return (Piece(tensor, shape, span, tuple(index), transpose, experts),)
    if not slot.axes[0].startswith("2"):
        raise bad_family(f"{source.name} cannot be interleaved", where, "an axis 2I or 2F")
    pieces = []
    for start in (0, 1):
        index[source.axes.index(slot.axes[0])] = (start, rows, 2)
        half = rows // 2
        span = (first_row + start * half, first_row + (start + 1) * half)
        pieces.append(Piece(tensor, shape, span, tuple(index), transpose, experts))
    return tuple(pieces)


def _slices(slot: Slot, source: Source, dims: dict[str, int]) -> tuple[list[Axis], tuple[str, ...]]:
    index: list[Axis] = []
    rest: list[str] = []
    for axis in source.axes:
        if slot.per_expert and axis == slot.experts:
            index.append("e")
            continue
        if slot.per_expert and axis.startswith("E*"):
            axis = axis[2:]
            index.append(("e", _size(axis, dims)))
        else:
            index.append((0, _size(axis, dims), 1))
        if axis != "1" or "1" in slot.axes:
            rest.append(axis)
    return index, tuple(rest)
