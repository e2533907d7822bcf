"""The CUDA backend: kernels as TIRx functions, compiled to cubins by NVRTC, for Hopper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import TargetError
from ...spec import ApplyTo, MoESpec, Selection
from ...target import Target
from ..base import Backend, Packed, Schedule, TokenRange
from ..buffers import Kernel
from ..passes.fold_activation import FoldActivation
from ..passes.fold_combine import FoldCombine
from ..passes.fold_gather import FoldGather
from ..passes.fold_reduce import FoldReduce
from ..passes.index_experts import IndexExperts
from . import decode, route, sort
from .host import entry
from .lower import CudaConfig, CudaLowering
from .prefill import PrefillConfig
from .stream import StreamConfig

_FOLDED = (FoldGather, FoldActivation, FoldReduce, FoldCombine)
_KERNEL_DTYPES = ("bfloat16", "float16")


def _any(spec: MoESpec, target: Target) -> str | None:
    """What no kernel here computes."""
    r = spec.router
    if r.num_experts > sort.MAX_EXPERTS or r.num_experts > route.MAX_EXPERTS:
        return f"{r.num_experts} experts are more than the sort of one block holds"
    if r.top_k > route.MAX_TOP_K and r.selection is not Selection.SPARSEMIXER:
        return f"{r.top_k} experts a token are more than the lanes of a warp"
    if spec.experts.hidden_size % 8:
        return f"H = {spec.experts.hidden_size} is no multiple of 8"
    return None


def _tensor_cores(spec: MoESpec, target: Target) -> str | None:
    e, dtypes = spec.experts, {n: p.dtype for n, p in spec.parameters().items()}
    if reason := _any(spec, target):
        return reason
    if spec.dtype not in _KERNEL_DTYPES or {dtypes["gate_up"], dtypes["down"]} != {spec.dtype}:
        return "weights and activations must both be bfloat16, or both float16"
    if e.intermediate_size % 8:
        return f"I = {e.intermediate_size} is no multiple of 8, which TMA needs"
    if spec.router.apply_to is ApplyTo.INPUT:
        return "the routing weight multiplies the input of the experts"
    return None


def _decode(spec: MoESpec, target: Target) -> str | None:
    e = spec.experts
    if reason := _tensor_cores(spec, target):
        return reason
    if e.hidden_size % 64 or e.intermediate_size % 64:
        return f"H = {e.hidden_size} or I = {e.intermediate_size} is no multiple of 64"
    if e.hidden_size > 8192:
        return f"H = {e.hidden_size}: the tokens do not fit the registers of a block"
    return None


def _plain(spec: MoESpec, target: Target) -> str | None:
    if _tensor_cores(spec, target) is None:
        return "the tensor-core kernels compute this block"
    return _any(spec, target)


def _stream(config: StreamConfig, low: int, high: int, blocks: bool = False) -> Schedule:
    grain = 16 if config.widths else 0
    return Schedule(
        f"stream{config.rows}", "cuda",
        f"every weight byte once, tiles of at most {config.rows} tokens on the N side of wgmma",
        _FOLDED, CudaConfig("stream", config, config, config.rows, grain, blocks),
        TokenRange(low, high), True, _tensor_cores,
    )  # fmt: skip


_PREFILL = PrefillConfig()
_SIMPLE = CudaConfig("simple", blocks=True)
SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "gather", "cuda",
            "two launches, no sort: active experts found in the kernels, up to 8 tokens",
            (*_FOLDED, IndexExperts), CudaConfig("decode", few=True), TokenRange(0, 9), True,
            _decode,
        ),
        _stream(StreamConfig(16, stages=8), 9, 48),
        _stream(StreamConfig(32, stages=8), 48, 200),
        _stream(StreamConfig(64, (16, 32, 48, 64)), 200, 700),
        Schedule(
            "prefill", "cuda", "persistent warp-specialised wgmma, tiles of 128 tokens",
            _FOLDED, CudaConfig("prefill", _PREFILL, _PREFILL, 128, blocks=True), TokenRange(700), True,
            _tensor_cores,
        ),
        Schedule(
            "plain", "cuda", "float32 multiply-add: what the tensor-core kernels do not take",
            _FOLDED, _SIMPLE, TokenRange(0), True, _plain,
        ),
        Schedule(
            "simple", "cuda", "float32 multiply-add for any block: the baseline",
            _FOLDED, _SIMPLE, None, True, _any,
        ),
    )
}  # fmt: skip


def _open(spec: MoESpec, target: Target, prefix: str) -> CudaLowering:
    return CudaLowering(spec, prefix)


def _packing(
    spec: MoESpec, target: Target, prefix: str
) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    """Every parameter is bound as it is: the kernels read the canonical layout."""
    packed = {
        name: Packed(name, p.shape, p.dtype, None, len(p.shape) == 3)
        for name, p in spec.parameters().items()
    }
    return packed, {}


def _build(functions: Mapping[str, Any], target: Target, path: Path) -> None:
    import tvm

    from . import pipeline, toolchain

    kernels = [name for name, f in functions.items() if "moec.host" not in (f.attrs or {})]
    with toolchain.compiling(target.isa):
        library = pipeline.build(tvm.IRModule(dict(functions)), target.isa, kernels)
    try:
        library.export_library(str(path), options=["-s"])
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"linking for {target.name} failed: {str(error).strip().splitlines()[-1]}",
            need="a C++ compiler that links shared libraries",
        ) from None
    toolchain.assert_cubin(path.read_bytes())


def _requires(target: Target) -> dict[str, Any]:
    return {"os": target.os, "arch": target.arch, "features": [], "gpu": target.isa}


BACKEND = Backend("cuda", SCHEDULES, _open, _packing, _build, _requires, entry)
