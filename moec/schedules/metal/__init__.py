"""The Metal backend: three schedules over one library of MSL kernels.

Compiled, linted, emulated and strictly linked; not run on an Apple GPU (docs/metal.md).
"""

from __future__ import annotations

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
from .codegen import build
from .entry import build_entry
from .lower import MetalConfig, MetalLowering, packing
from .routing import MAX_EXPERTS

_FOLDED = (FoldGather, FoldActivation, FoldReduce)
# Mat-vecs read a weight once for every pair that names it, tiles once for 32 rows of an expert at
# the price of two more launches (sort, reduce). With one token no expert is named twice, and from
# two on even one expert read again costs more than the launches. docs/metal.md has the figures.
_DECODE = 2


def _supports(spec: MoESpec, target: Target) -> str | None:
    if spec.experts.num_experts > MAX_EXPERTS:
        return (
            f"{spec.experts.num_experts} experts: the router keeps the scores of a token in "
            f"threadgroup memory, which holds {MAX_EXPERTS}"
        )
    return None


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "fused",
            "metal",
            "rows sorted by expert, grouped matmuls on simdgroup matrices, activation fused in",
            _FOLDED,
            MetalConfig(tiled=True),
            TokenRange(_DECODE),
            True,
            _supports,
        ),
        Schedule(
            "gather",
            "metal",
            "one mat-vec a (token, expert) pair with indexed weights, no sort: decode",
            (*_FOLDED, IndexExperts),
            MetalConfig(tiled=False),
            TokenRange(0, _DECODE),
            True,
            _supports,
        ),
        Schedule(
            "loop",
            "metal",
            "one expert at a time: the baseline that always works",
            (*_FOLDED, LoopExperts),
            MetalConfig(tiled=False),
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


BACKEND = Backend("metal", SCHEDULES, _open, _packing, build, _requires, build_entry)
