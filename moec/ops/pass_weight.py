"""moec.pass_weight: how much of a token passes unchanged, the summed weights of zero experts."""

from __future__ import annotations

from typing import Any

from tvm import tirx

from .define import Attrs, OpDef, Types, shape_of, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    return tensor([shape_of(types["topk_ids"])[0], tirx.const(1, "int64")], "float32")


OP = OpDef("pass_weight", __doc__, ("topk_ids", "topk_weights"), (), _infer)


def pass_weight(topk_ids: Any, topk_weights: Any, first: int, count: int) -> Any:
    """[T, 1] float32: the sum of the weights whose ids are in [first, first + count)."""
    return OP.call([topk_ids, topk_weights], {}, first=first, count=count)
