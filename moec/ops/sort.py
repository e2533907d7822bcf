"""moec.sort: a stable counting sort of the (token, expert) pairs by expert."""

from __future__ import annotations

from typing import Any

from tvm import relax

from .define import Attrs, OpDef, Types, expect, tensor


def _infer(types: Types, attrs: Attrs) -> Any:
    tokens, top_k = expect("sort", types, "topk_ids", "T", "K", dtype="int32")
    experts = int(attrs["num_experts"])
    return relax.TupleType([tensor([tokens * top_k], "int32"), tensor([experts + 1], "int32")])


OP = OpDef("sort", __doc__, ("topk_ids",), (), _infer)


def sort(topk_ids: Any, num_experts: int) -> Any:
    """topk_ids [T, K] int32 -> (row_order [S] int32, expert_offsets [E+1] int32).

    row_order maps a sorted position to its pair t*K+k; the rows of expert e are the positions
    expert_offsets[e] to expert_offsets[e+1]. Ids outside [0, E) sort behind the last offset.
    """
    return OP.call([topk_ids], {}, num_experts=num_experts)
