"""The CUDA backend: kernels as TIRx functions, compiled to cubins by NVRTC, for Hopper."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...errors import TargetError
from ...spec import ApplyTo, MoESpec, Selection, SharedGate
from ...target import Target
from ..base import Backend, Packed, Schedule, TokenRange
from ..buffers import Kernel
from ..passes.fold_activation import FoldActivation
from ..passes.fold_combine import FoldCombine
from ..passes.fold_gather import FoldGather
from ..passes.fold_reduce import FoldReduce
from ..passes.index_experts import IndexExperts
from . import route, sort
from .host import entry
from .lower import CudaConfig, CudaLowering
from .prefill import PrefillConfig
from .stream import StreamConfig

_FOLDED = (FoldGather, FoldActivation, FoldReduce, FoldCombine)
_KERNEL_DTYPES = ("bfloat16", "float16")


def _missing(spec: MoESpec) -> str | None:
    """A part of a block for which there are no CUDA kernels yet."""
    r, e, a = spec.router, spec.experts, spec.experts.activation
    shared, norms = spec.shared, spec.norms
    parts = {
        "a token table": r.selection is Selection.TOKEN_TABLE,
        "experts that every token passes": r.always > 0,
        "a global routing scale": r.global_scale,
        "zero experts": e.zero_experts > 0,
        "a latent width": e.latent_size is not None,
        "a norm of each expert's output": norms.expert_output is not None,
        "a soft cap in the activation": a.gate_cap is not None or a.up_cap is not None,
        "a softmax gate of the shared expert": shared is not None
        and shared.gate is SharedGate.SOFTMAX,
        "a scale of the shared expert": shared is not None and shared.scale != 1.0,
        "an input of the shared expert's own": shared is not None and shared.own_input,
        "a bias of the output": spec.output_bias,
    }
    return next((f"{part} has no CUDA kernel yet" for part, there in parts.items() if there), None)


def _any(spec: MoESpec, target: Target) -> str | None:
    """What no kernel here computes."""
    r = spec.router
    if reason := _missing(spec):
        return reason
    if r.num_experts > min(sort.MAX_EXPERTS, route.MAX_EXPERTS):
        return f"{r.num_experts} experts are more than the sort of one block holds"
    if r.top_k > route.MAX_TOP_K:
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


def _from(rows: float) -> Callable[[MoESpec], TokenRange]:
    """From so many rows an expert on: what decides is T * K / E, not T."""

    def span(spec: MoESpec) -> TokenRange:
        e = spec.experts
        return TokenRange(max(_DECODE, round(rows * e.num_experts / e.top_k)))

    return span


def _stream(config: StreamConfig, rows: float, blocks: bool = False) -> Schedule:
    grain = 16 if config.widths else 0
    return Schedule(
        f"stream{config.rows}", "cuda",
        f"every weight byte once, tiles of at most {config.rows} tokens on the N side of wgmma",
        _FOLDED, CudaConfig("stream", config, config, config.rows, grain, blocks),
        TokenRange(_DECODE), True, _tensor_cores, _from(rows),
    )  # fmt: skip


_DECODE = 8  # from here on sorted rows are faster, on all shapes that were timed
_PREFILL = PrefillConfig()
_SIMPLE = CudaConfig("simple", blocks=True)
SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "gather", "cuda",
            "two launches, no sort: active experts found in the kernels, up to 8 tokens",
            (*_FOLDED, IndexExperts), CudaConfig("decode", few=True), TokenRange(0, _DECODE), True,
            _decode,
        ),
        _stream(StreamConfig(16, stages=8, once=True), 0.0),
        _stream(StreamConfig(32, stages=8, once=True), 6.25),
        _stream(StreamConfig(64, (16, 32, 48, 64), 2), 12.5, True),
        _stream(StreamConfig(160, (32, 64, 80, 96, 112, 128, 144, 160), 2), 50.0, True),
        Schedule(
            "prefill", "cuda", "persistent warp-specialised wgmma, tiles of 128 tokens",
            _FOLDED, CudaConfig("prefill", _PREFILL, _PREFILL, 128, blocks=True),
            TokenRange(_DECODE), True, _tensor_cores, _from(768.0),
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
