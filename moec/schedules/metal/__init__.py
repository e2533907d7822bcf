"""The Metal backend: four schedules over one library of MSL kernels.

Compiled, linted, emulated and strictly linked; not run on an Apple GPU (docs/metal.md).
"""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import Any

from ...spec import MoESpec
from ...target import Target
from ..base import Backend, Packed, Schedule, TokenRange
from ..buffers import Kernel
from ..passes.fold_activation import FoldActivation
from ..passes.fold_gather import FoldGather
from ..passes.fold_reduce import FoldReduce
from ..passes.index_experts import IndexExperts
from ..passes.loop_experts import LoopExperts
from . import tile
from .codegen import build
from .entry import build_entry
from .lower import MetalConfig, MetalLowering, packing
from .routing import MAX_EXPERTS

_FOLDED = (FoldGather, FoldActivation, FoldReduce)
# Mat-vecs read a weight once for every pair that names it, tiles once for 32 rows of an expert at
# the price of two more launches (sort, reduce). With one token no expert is named twice, and from
# two on even one expert read again costs more than the launches. docs/metal.md has the figures.
_DECODE = 2
# Rows an expert has on average from which on large tiles are chosen: experts begin to have more
# rows than a small tile, whose weight it would load twice, and there are threadgroups enough.
_LARGE = 16


def _supports(spec: MoESpec, target: Target) -> str | None:
    if spec.experts.num_experts > MAX_EXPERTS:
        return (
            f"{spec.experts.num_experts} experts: the router keeps the scores of a token in "
            f"threadgroup memory, which holds {MAX_EXPERTS}"
        )
    return None


def _large(spec: MoESpec) -> TokenRange:
    """What decides is T K / E, not T."""
    e = spec.experts
    return TokenRange(max(_DECODE, ceil(_LARGE * e.num_experts / e.top_k)))


def _tiles(of: tile.Tile, span: Callable[[MoESpec], TokenRange] | None = None) -> Schedule:
    return Schedule(
        f"tiles{of.rows}",
        "metal",
        f"rows sorted by expert, grouped matmuls on simdgroup matrices, {of.rows} rows x "
        f"{of.columns} columns a threadgroup",
        _FOLDED,
        MetalConfig(of),
        TokenRange(_DECODE),
        True,
        _supports,
        span,
    )


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        _tiles(tile.SMALL),
        _tiles(tile.LARGE, _large),
        Schedule(
            "gather",
            "metal",
            "one mat-vec a (token, expert) pair with indexed weights, no sort: decode",
            (*_FOLDED, IndexExperts),
            MetalConfig(None),
            TokenRange(0, _DECODE),
            True,
            _supports,
        ),
        Schedule(
            "loop",
            "metal",
            "one expert at a time: the baseline that always works",
            (*_FOLDED, LoopExperts),
            MetalConfig(None),
            None,
            True,
            _supports,
        ),
    )
}


def _open(spec: MoESpec, target: Target, prefix: str) -> MetalLowering:
    return MetalLowering(spec, prefix)


def _packing(
    spec: MoESpec, target: Target, prefix: str
) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    return packing(spec)


def _requires(target: Target) -> dict[str, Any]:
    return {"os": target.os, "arch": target.arch, "features": []}


_FUSED = tuple(name for name in SCHEDULES if name.startswith("tiles"))
BACKEND = Backend(
    "metal", SCHEDULES, _open, _packing, build, _requires, build_entry, {"fused": _FUSED}
)
