"""The CUDA backend: kernels as TIRx functions, compiled by NVRTC, for Ampere and later.

On Hopper the experts run on wgmma and TMA, elsewhere on mma.sync. docs/cuda.md says which
schedule is chosen when, and what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ...spec import ApplyTo, MoESpec
from ...target import Form, Target, resolve
from ..base import Backend, Packed, Schedule, TokenRange
from ..buffers import Kernel
from ..cpu.codegen import compile_module
from ..linking import find_linker, link
from ..passes.fold_activation import FoldActivation
from ..passes.fold_combine import FoldCombine
from ..passes.fold_gather import FoldGather
from ..passes.fold_reduce import FoldReduce
from ..passes.index_experts import IndexExperts
from ..passes.loop_experts import LoopExperts
from . import compact, maps, mma, route, shrink, sort
from .config import CudaConfig
from .decode import MAX_TOKENS
from .host import entry
from .lower import TENSOR_DTYPES, CudaLowering
from .sort import Grid
from .stream import StreamConfig

_FOLDED = (FoldGather, FoldActivation, FoldReduce, FoldCombine)
_HOPPER = "sm_90a"
_HOST = "x86-64"  # what packs when weights stayed in the checkpoint: any machine with a GPU


def _any(spec: MoESpec, target: Target) -> str | None:
    """What no kernel here computes."""
    r = spec.router
    if r.num_experts > min(sort.MAX_EXPERTS, route.MAX_EXPERTS):
        return f"{r.num_experts} experts are more than the sort of one block holds"
    if r.top_k > route.MAX_TOP_K:
        return f"{r.top_k} experts a token are more than the lanes of a warp"
    return None if target.form is Form.PLAIN else _no_compact_form(spec)


def _no_compact_form(spec: MoESpec) -> str | None:
    e, dtypes = spec.experts, {n: p.dtype for n, p in spec.parameters().items()}
    for dtype in (dtypes[name] for name in compact.WEIGHTS):
        if dtype != "bfloat16":
            return f"weights of {dtype} have no compact form, those of bfloat16 do"
    if e.width % compact.COLUMNS or e.intermediate_size % compact.COLUMNS:
        sizes = f"width = {e.width} or I = {e.intermediate_size}"
        return f"{sizes} is no multiple of {compact.COLUMNS}, the columns of a compact unit"
    return None


def _any_tensor_cores(spec: MoESpec, target: Target) -> str | None:
    """What neither wgmma nor mma.sync takes."""
    e, dtypes = spec.experts, {n: p.dtype for n, p in spec.parameters().items()}
    if reason := _any(spec, target):
        return reason
    if spec.dtype not in TENSOR_DTYPES or {dtypes["gate_up"], dtypes["down"]} != {spec.dtype}:
        return "weights and activations must both be bfloat16, or both float16"
    for name, width in (("I", e.intermediate_size), ("the experts' width", e.width)):
        if width % 8:
            return f"{name} = {width} is no multiple of 8: copies have 16 bytes"
    if spec.router.apply_to is ApplyTo.INPUT and e.top_k > 1:
        return "each of the routing weights multiplies the input of its expert"
    return None


def _tensor_cores(spec: MoESpec, target: Target) -> str | None:
    if target.isa != _HOPPER:
        return f"{target.isa} has no wgmma or no TMA, {_HOPPER} has"
    return _any_tensor_cores(spec, target)


def _plain_form(spec: MoESpec, target: Target) -> str | None:
    """What the kernels that read the canonical layout do not compute."""
    if target.form is Form.COMPACT:
        return "reads plain weights, and this target holds compact ones"
    return _any(spec, target)


def _compact_form(spec: MoESpec, target: Target) -> str | None:
    """What the kernels do not compute whose tiles pay where weights are expanded."""
    if reason := _tensor_cores(spec, target):
        return reason
    if target.form is not Form.COMPACT:
        return "reads compact weights where there are no plain ones, which are faster"
    return None


def _portable_form(spec: MoESpec, target: Target) -> str | None:
    return _plain_form(spec, target) or _any_tensor_cores(spec, target)


def _decode(spec: MoESpec, target: Target) -> str | None:
    e = spec.experts
    if reason := _tensor_cores(spec, target):
        return reason
    if spec.router.apply_to is ApplyTo.INPUT:
        return "the routing weight multiplies the input of the experts"
    if spec.norms.expert_output is not None:
        return "the row of each expert is normed before the sum, which a kernel does in registers"
    if e.width % 64 or e.intermediate_size % 64:
        return f"width = {e.width} or I = {e.intermediate_size} is no multiple of 64"
    if e.width > 8192:
        return f"width = {e.width}: the tokens do not fit the registers of a block"
    return None


def _plain(spec: MoESpec, target: Target) -> str | None:
    if reason := _plain_form(spec, target):
        return reason
    if _any_tensor_cores(spec, target) is None:
        return "the tensor-core kernels compute this block"
    return None


def _from(rows: float) -> Callable[[MoESpec], TokenRange]:
    """From so many rows an expert on: what decides is T * K / E, not T."""

    def span(spec: MoESpec) -> TokenRange:
        e = spec.experts
        return TokenRange(max(_DECODE, round(rows * e.num_experts / e.top_k)))

    return span


def _stream(
    config: StreamConfig,
    shrunk: StreamConfig,
    rows: float,
    grid: Grid = Grid.BLOCK,
    faster: Form = Form.COMPACT,
    supports: Callable[[MoESpec, Target], str | None] = _tensor_cores,
) -> Schedule:
    grain = 8 if config.widths else 0
    return Schedule(
        f"stream{config.rows}", "cuda",
        f"every weight byte once, tiles of at most {config.rows} tokens on the N side of wgmma",
        _FOLDED,
        CudaConfig("stream", config, config.rows, grain, grid, compact=shrunk, faster=faster),
        TokenRange(_DECODE), True, supports, _from(rows),
    )  # fmt: skip


def _portable(
    name: str,
    tiles: mma.MmaConfig,
    tokens: TokenRange,
    span: Callable[[MoESpec], TokenRange] | None = None,
) -> Schedule:
    """By name only on Hopper, which has better."""
    grid = Grid.COUNTED if tiles.rows > 32 else Grid.BLOCK
    return Schedule(
        name, "cuda", f"mma.sync and cp.async, tiles of {tiles.rows} tokens: before Hopper",
        _FOLDED, CudaConfig("mma", tiles, tiles.rows, sorted_by=grid),
        tokens, True, _portable_form, span, frozenset({_HOPPER}),
    )  # fmt: skip


_DECODE = MAX_TOKENS + 1
_UP_TO_64 = (16, 32, 48, 64)
_UP_TO_144 = (48, 72, 96, 112, 120, 128, 136, 144)
_UP_TO_160 = (48, 72, 96, 112, 128, 136, 152, 160)
# Twice as many tokens for a weight that is expanded, of half as many weights.
_WIDE = StreamConfig(256, (64, 96, 128, 160, 192, 208, 224, 256))
_SIMPLE = CudaConfig("simple", sorted_by=Grid.COUNTED)
SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        Schedule(
            "gather", "cuda",
            "two launches, no sort: active experts found in the kernels, up to 8 tokens",
            (*_FOLDED, IndexExperts), CudaConfig("decode", few=True, faster=Form.COMPACT),
            TokenRange(0, _DECODE), True, _decode,
        ),
        _stream(StreamConfig(16, depth=2, stages=5), StreamConfig(16, depth=2), 0.0),
        _stream(StreamConfig(32, depth=2), StreamConfig(32, (16, 24, 32), depth=2), 6.25),
        _stream(
            StreamConfig(64, _UP_TO_64, depth=2), StreamConfig(64, _UP_TO_64, 2), 17.0,
            Grid.CLUSTER,
        ),
        _stream(StreamConfig(160, _UP_TO_160, 2), StreamConfig(144, _UP_TO_144, 2), 44.0,
                Grid.CLUSTER, Form.PLAIN),
        _stream(_WIDE, _WIDE, 136.0, Grid.CLUSTER, supports=_compact_form),
        _portable("mma16", mma.SMALL, TokenRange(0)),
        _portable("mma64", mma.LARGE, TokenRange(_DECODE), _from(16.0)),
        Schedule(
            "plain", "cuda", "float32 multiply-add: what the tensor-core kernels do not take",
            _FOLDED, _SIMPLE, TokenRange(0), True, _plain,
        ),
        Schedule(
            "simple", "cuda", "float32 multiply-add for any block, all experts in a launch",
            _FOLDED, _SIMPLE, None, True, _plain_form,
        ),
        Schedule(
            "loop", "cuda", "one expert at a time, float32 multiply-add: the baseline",
            (FoldGather, FoldActivation, FoldReduce, LoopExperts), _SIMPLE, None, True,
            _plain_form,
        ),
    )
}  # fmt: skip


def _open(spec: MoESpec, target: Target, prefix: str) -> CudaLowering:
    return CudaLowering(spec, prefix, target.isa == _HOPPER, target.form)


def _packing(
    spec: MoESpec, target: Target, prefix: str
) -> tuple[dict[str, Packed], dict[str, Kernel]]:
    """Parameters are bound as they are, but for the weights of experts in their compact form."""
    parameters, kernels = spec.parameters(), {}
    packed = {
        n: Packed(n, p.shape, p.dtype, None, len(p.shape) == 3) for n, p in parameters.items()
    }
    if target.form is not Form.PLAIN:
        for name, own in compact.names(target.form).items():
            symbol, layout = f"{prefix}_pack_{name}", compact.Layout(*parameters[name].shape)
            gated = name == "gate_up" and spec.experts.gated
            kernels[symbol] = shrink.pack(symbol, layout, gated)
            packed[own] = Packed(name, layout.shape, "int32", symbol, True)
    return packed, kernels


def _build(functions: Mapping[str, Any], target: Target, path: Path) -> None:
    import tvm

    from . import pipeline, toolchain

    packers = {name: f for name, f in functions.items() if shrink.PACKS in (f.attrs or {})}
    others = {name: f for name, f in functions.items() if name not in packers}
    kernels = [name for name, f in others.items() if "moec.host" not in (f.attrs or {})]
    find_linker(target)  # before the code is generated
    number = toolchain.generation(target.isa)
    arch = _HOPPER if target.isa == _HOPPER else f"sm_{number}"  # TVM knows no compute_XY
    dependent = kernels if number >= toolchain.HOPPER else []
    with toolchain.compiling(target.isa):
        library = pipeline.build(tvm.IRModule(others), arch, dependent)
    if packers:
        library.mod.import_module(compile_module(packers, resolve(f"cpu:{_HOST}")))
    link(library, target, path, [maps.SOURCE])
    toolchain.assert_cubin(path.read_bytes())


def _requires(target: Target) -> dict[str, Any]:
    return {"os": target.os, "arch": target.arch, "features": [], "gpu": target.isa}


_FUSED = tuple(n for n in SCHEDULES if n.startswith(("stream", "mma", "plain")))
BACKEND = Backend(
    "cuda", SCHEDULES, _open, _packing, _build, _requires, entry, {"fused": _FUSED}
)  # fmt: skip
