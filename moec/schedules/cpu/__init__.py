"""The CPU backend: three schedules over one set of kernels, for every instruction set."""

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
from .isa import ISAS
from .lower import CpuConfig, CpuLowering, packing

_FOLDED = (FoldGather, FoldActivation, FoldReduce)
# Below this T few experts serve two tokens, so that sorting rows saves nothing.
_DECODE = 2


def _always(spec: MoESpec, target: Target) -> str | None:
    return None


SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "fused",
            "cpu",
            "rows sorted by expert, grouped matmuls with activation and weighted sum fused in",
            _FOLDED,
            CpuConfig(),
            TokenRange(_DECODE),
            True,
            _always,
        ),
        Schedule(
            "gather",
            "cpu",
            "one row a (token, expert) pair with indexed weights, no sort: decode",
            (*_FOLDED, IndexExperts),
            CpuConfig(),
            TokenRange(0, _DECODE),
            True,
            _always,
        ),
        Schedule(
            "loop",
            "cpu",
            "one expert at a time: the baseline that always works",
            (*_FOLDED, LoopExperts),
            CpuConfig(),
            None,
            True,
            _always,
        ),
    )
}


def _open(spec: MoESpec, target: Target, prefix: str) -> CpuLowering:
    return CpuLowering(spec, ISAS[target.isa], prefix)


def _packing(
    spec: MoESpec, target: Target, prefix: str
) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    return packing(spec, ISAS[target.isa], prefix)


def _requires(target: Target) -> dict[str, Any]:
    features = sorted(ISAS[target.isa].features)
    return {"os": target.os, "arch": target.arch, "features": features}


BACKEND = Backend("cpu", SCHEDULES, _open, _packing, build, _requires)
