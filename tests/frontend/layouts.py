"""Writers of every layout: the same weights under other names and in other orders.

Each takes canonical gate_up [E, 2I, H] and down [E, H, I] and the name before `experts.`,
and gives the tensors by name. Written from the published files, not from moec's tables.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Tensors = dict[str, Array]
Writer = Callable[[Array, Array, str], Tensors]


def each(gate: str, up: str, down: str) -> Writer:
    """One tensor for each expert and projection."""

    def write(gate_up: Array, down_: Array, block: str) -> Tensors:
        half = gate_up.shape[1] // 2
        out = {}
        for e in range(len(gate_up)):
            out[f"{block}experts.{e}.{gate}.weight"] = gate_up[e, :half]
            out[f"{block}experts.{e}.{up}.weight"] = gate_up[e, half:]
            out[f"{block}experts.{e}.{down}.weight"] = down_[e]
        return out

    return write


def stacked(gate_up: Array, down: Array, block: str) -> Tensors:
    """Convention B, as nn.Linear: output-major."""
    return {f"{block}experts.gate_up_proj": gate_up, f"{block}experts.down_proj": down}


def input_major(gate_up: Array, down: Array, block: str) -> Tensors:
    """Convention A: input-major."""
    return stacked(gate_up.swapaxes(1, 2), down.swapaxes(1, 2), block)


def interleaved(inner: Writer) -> Writer:
    """Rows g0, u0, g1, u1, ... instead of all g, then all u."""

    def write(gate_up: Array, down: Array, block: str) -> Tensors:
        half = gate_up.shape[1] // 2
        mixed = np.empty_like(gate_up)
        mixed[:, 0::2], mixed[:, 1::2] = gate_up[:, :half], gate_up[:, half:]
        return inner(mixed, down, block)

    return write


def direct(inner: Writer) -> Writer:
    """Without the level `experts.` in the names."""

    def write(gate_up: Array, down: Array, block: str) -> Tensors:
        return {n.replace("experts.", ""): t for n, t in inner(gate_up, down, block).items()}

    return write


def three_stacks(gate_up: Array, down: Array, block: str) -> Tensors:
    """gate, up and down each stacked over the experts."""
    half = gate_up.shape[1] // 2
    return {
        f"{block}gate_proj.weight": gate_up[:, :half],
        f"{block}up_proj.weight": gate_up[:, half:],
        f"{block}down_proj.weight": down,
    }


def flat(gate_up: Array, down: Array, block: str) -> Tensors:
    """Experts one after another in the first axis, as dbrx keeps them."""
    half = gate_up.shape[1] // 2
    rows = (-1, gate_up.shape[2])
    return {
        f"{block}experts.w1": gate_up[:, :half].reshape(rows),
        f"{block}experts.v1": gate_up[:, half:].reshape(rows),
        f"{block}experts.w2": down.swapaxes(1, 2).reshape(rows),
    }


PLAIN = each("gate_proj", "up_proj", "down_proj")
W = each("w1", "w3", "w2")
