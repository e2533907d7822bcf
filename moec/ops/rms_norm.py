"""moec.rms_norm: x * (mean(x^2) + eps)^-0.5, times a vector, times a constant."""

from __future__ import annotations

from typing import Any

from ..spec import NormSpec
from .attrs import from_attrs, to_attrs
from .define import Attrs, OpDef, Types, expect, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, hidden = expect("rms_norm", types, "x", "T", "H")
    if "weight" in types:
        expect("rms_norm", types, "weight", hidden)
    return tensor([tokens, hidden], str(attrs["dtype"]))


OP = OpDef("rms_norm", __doc__, ("x",), ("weight",), _infer)


def rms_norm(x: Any, weight: Any | None, spec: NormSpec, dtype: str) -> Any:
    """x [T, H], weight [H] float32 or None -> [T, H] of `dtype`, computed in float32."""
    return OP.call([x], {"weight": weight}, dtype=dtype, **to_attrs(spec))


def spec_of(attrs: Attrs) -> NormSpec:
    """The NormSpec behind a call's attributes."""
    return from_attrs(NormSpec, attrs)
