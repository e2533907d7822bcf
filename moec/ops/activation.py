"""moec.activation: act(gate) * (up + offset) on rows whose halves are gate and up."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from ..spec import ActivationSpec
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, expect, require, same, simplify, tensor, text


def _infer(types: Types, attrs: Attrs) -> Any:
    rows, width = expect("activation", types, "x", "rows", "2I" if attrs["gated"] else "I")
    if attrs["gated"]:
        even = same(tirx.floormod(width, 2), 0)
        require("activation", even, "x", text([rows, width]), "[rows, 2I], gate then up")
        width = tirx.floordiv(width, 2)
    return tensor([rows, simplify(width)], str(attrs["dtype"]))


OP = OpDef("activation", __doc__, ("x",), (), _infer)


def activation(x: Any, spec: ActivationSpec, gated: bool, dtype: str) -> Any:
    """x [rows, 2I] (gate then up; [rows, I] without gate) -> [rows, I] of `dtype`."""
    return OP.call([x], {}, gated=gated, dtype=dtype, **to_attrs(spec))


def spec_of(attrs: Attrs) -> ActivationSpec:
    """The ActivationSpec behind a call's attributes."""
    return from_attrs(ActivationSpec, attrs)
