"""The CUDA backend on a machine without a GPU: every schedule becomes cubins that fit the chip.

Needs the wheels of the extra "cuda"; results on a GPU are checked by tests/gpu.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moec import target
from moec.compiler.instruments import Observer
from moec.compiler.lower import Lowered, lower
from moec.compiler.options import CompileOptions
from moec.errors import TargetError
from moec.runtime import cuda
from moec.schedules import backend, choose
from moec.schedules import cuda as own
from moec.schedules.cuda import mma, shrink, stream, toolchain
from moec.spec import (
    ActivationSpec,
    ApplyTo,
    BlockNorms,
    Clamp,
    ExpertsSpec,
    GroupSpec,
    MoESpec,
    Nonlinearity,
    NormSpec,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    SharedExpertSpec,
    SharedGate,
    WeightSource,
)

E, K, H, I = 8, 2, 128, 64


def block(dtype: str = "bfloat16", hidden: int = H, inner: int = I, **router: object) -> MoESpec:
    spec = RouterSpec(E, K, renorm=Renorm.SUM, **router)  # type: ignore[arg-type]
    return MoESpec(dtype, spec, ExpertsSpec(E, K, hidden, inner))


def lowered(spec: MoESpec, *names: str, arch: str = "sm_90a") -> Lowered:
    return _lowered(spec, names, arch)


@functools.cache
def _lowered(spec: MoESpec, names: tuple[str, ...], arch: str) -> Lowered:
    backend_, one = backend("cuda"), target.resolve(f"cuda:{arch}")
    chosen = choose(backend_, names, spec, one)
    return lower("b0", spec, one, backend_, chosen, Observer(CompileOptions()), None)


def wheels() -> bool:
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec else None) or ()
    return any((Path(p) / "cu13/lib/libnvrtc.so.13").is_file() for p in places)


needs_nvrtc = pytest.mark.skipif(not wheels(), reason="pip install 'moec[cuda]'")

BIASED = MoESpec(
    "float16",
    RouterSpec(E, K, score=Score.NONE, logit_bias=True,
               weight_source=WeightSource.SOFTMAX_SELECTED),
    ExpertsSpec(E, K, H, I, activation=ActivationSpec(
        Nonlinearity.SILU, 1.702, Clamp.BEFORE, 7.0, 1.0), gate_up_bias=True, down_bias=True),
)  # fmt: skip
GROUPED = MoESpec(
    "bfloat16",
    RouterSpec(E, K, score=Score.SIGMOID, selection_bias=True, groups=GroupSpec(4, 2),
               renorm=Renorm.SUM, scale=2.5),
    ExpertsSpec(E, K, H, I), SharedExpertSpec(I, gate=SharedGate.SIGMOID),
)  # fmt: skip
MIXER = MoESpec(
    "bfloat16",
    RouterSpec(E, K, score=Score.NONE, selection=Selection.SPARSEMIXER,
               weight_source=WeightSource.SPARSEMIXER, sparsemixer_eps=0.01),
    ExpertsSpec(E, K, 40, 24, gated=False, activation=ActivationSpec(Nonlinearity.RELU2)),
)  # fmt: skip
RARE = MoESpec(
    "bfloat16",
    RouterSpec(E + 4, K, always=1, global_scale=True, per_expert_scale=True, scale=1.5,
               scale_on=ScaleOn.ROUTED_SUM),
    ExpertsSpec(E, K, H, I, activation=ActivationSpec(gate_cap=1.0, up_cap=0.5), latent_size=72,
                zero_experts=4),
    SharedExpertSpec(20, gate=SharedGate.SOFTMAX, scale=0.5, own_input=True),
    BlockNorms(expert_output=NormSpec(offset=1.0), latent_input=NormSpec(vector_first=True)),
    output_bias=True,
)  # fmt: skip
TABLE = MoESpec(
    "float32", RouterSpec(E, K, selection=Selection.TOKEN_TABLE, vocab_size=50),
    ExpertsSpec(E, K, 37, 19),
)  # fmt: skip

# What is compiled: a block, the schedules of it (none: those that are chosen), the architecture.
BUILDS = {
    "all of Hopper": (block(), (), "sm_90a"),
    "compact": (block(hidden=256), (), "sm_90a-compact"),
    "both forms": (block(hidden=512), ("gather", "stream160", "mma16"), "sm_90a-both"),
    "float16, biases": (BIASED, ("gather", "stream160"), "sm_90a"),
    "odd, no gate": (MIXER, ("stream16",), "sm_90a"),
    "shared expert": (GROUPED, ("mma64",), "sm_90a"),
    "rare parts": (RARE, ("simple", "loop"), "sm_90a"),
    "float32": (TABLE, ("plain",), "sm_90a"),
    "Ampere": (RARE, (), "sm_80"),
    "Ada": (GROUPED, ("mma16",), "sm_89"),
    "PTX": (MIXER, ("mma16",), "compute_80"),
}


@needs_nvrtc
@pytest.mark.parametrize("name", BUILDS)
def test_every_kernel_is_machine_code_without_spills(name: str, tmp_path: Path) -> None:
    spec, names, arch = BUILDS[name]
    made, seen = lowered(spec, *names, arch=arch), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toolchain, "compiling", watched(toolchain.compiling, seen))
        own.BACKEND.build(made.functions, target.resolve(f"cuda:{arch}"), tmp_path / "m.so")
    on_host = {"moec.host", shrink.PACKS}
    device = {s for s, k in made.kernels.items() if not any(a in k.func.attrs for a in on_host)}
    assert {f"{symbol}_kernel" for symbol in device if arch != "compute_80"} == {*seen}
    for symbol, used in seen.items():
        assert used.spills == 0 and used.stack == 0, symbol


def watched(compiling: Any, seen: dict[str, toolchain.Resources]) -> Any:
    """The same context manager, which leaves the resources of all kernels in `seen`."""

    @contextlib.contextmanager
    def inner(arch: str) -> Iterator[Any]:
        with compiling(arch) as report:
            yield report
            seen.update(report)

    return inner


def test_decode_takes_two_launches_and_the_others_four() -> None:
    spec = block()
    made = lowered(spec)
    launches = {v.schedule.name: len(v.entry.kernels) for v in made.variants["experts"]}
    assert launches["gather"] == 2
    assert launches["stream16"] == launches["stream32"] == 4
    assert launches["stream64"] == launches["stream160"] == 4


@pytest.mark.parametrize("arch", target.GPUS)
@pytest.mark.parametrize("names", [(), ("fused",)])
def test_every_token_count_has_one_variant(arch: str, names: tuple[str, ...]) -> None:
    compact = target.resolve(f"cuda:{arch}").form is not target.Form.PLAIN
    for spec in (block(), *(() if compact else (BIASED, RARE, TABLE, block(hidden=40, inner=24)))):
        chosen = choose(backend("cuda"), names, spec, target.resolve(f"cuda:{arch}"))
        spans = sorted((tokens.low, tokens.high) for _, tokens in chosen if tokens)
        assert spans[0][0] == 0 and spans[-1][1] is None
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))
        kinds = {s.name for s, _ in chosen}
        assert not kinds & {"simple", "loop", *(("mma16", "mma64") if arch[:5] == "sm_90" else ())}
        if arch[:5] != "sm_90":
            assert kinds <= {"mma16", "mma64", "plain"}


@pytest.mark.parametrize(
    ("spec", "name", "reason"),
    [
        (block("float32"), "stream64", "bfloat16"),
        (block(hidden=40), "gather", "multiple of 64"),
        (block(apply_to=ApplyTo.INPUT), "stream16", "input"),
        (RARE, "gather", "normed"),
        (block(), "plain", "tensor-core"),
        (block("float32"), "warp", "no schedule"),
    ],
)
def test_a_named_schedule_that_does_not_fit_is_refused(
    spec: MoESpec, name: str, reason: str
) -> None:
    with pytest.raises(TargetError, match=reason):
        lowered(spec, name)


@pytest.mark.parametrize(
    ("sizes", "starts"),
    [
        ((8, 2, 4096, 14336), [0, 9, 25, 68, 176]),
        ((128, 8, 2048, 768), [0, 9, 100, 272, 704]),
        ((256, 8, 7168, 2048), [0, 9, 200, 544, 1408]),
    ],
)
def test_ranges_are_in_rows_an_expert(sizes: tuple[int, int, int, int], starts: list[int]) -> None:
    experts = ExpertsSpec(*sizes)
    router = RouterSpec(experts.num_experts, experts.top_k, renorm=Renorm.SUM)
    spec = MoESpec("bfloat16", router, experts)
    chosen = choose(backend("cuda"), (), spec, target.resolve("cuda:sm_90a"))
    spans = {s.name: tokens.low for s, tokens in chosen if tokens is not None}
    names = ("gather", "stream16", "stream32", "stream64", "stream160")
    assert [spans[name] for name in names] == starts


def test_compact_weights_have_wider_tiles_where_plain_ones_have_not() -> None:
    spec = MoESpec("bfloat16", RouterSpec(8, 2, renorm=Renorm.SUM), ExpertsSpec(8, 2, 4096, 14336))
    for form, low in (("", None), ("-compact", 544), ("-both", None)):
        one = target.resolve(f"cuda:sm_90a{form}")
        spans = {s.name: t.low for s, t in choose(backend("cuda"), (), spec, one) if t}
        assert spans.get("stream256") == low
    with pytest.raises(TargetError, match="reads compact weights"):
        choose(backend("cuda"), ("stream256",), spec, target.resolve("cuda:sm_90a"))


def test_schedules_for_the_same_tokens_leave_no_empty_range() -> None:
    names = ("mma16", "gather", "stream16", "mma64", "simple")
    chosen = choose(backend("cuda"), names, block(), target.resolve("cuda:sm_90a"))
    assert {s.name: str(tokens) for s, tokens in chosen} == {
        "mma16": "T < 9", "gather": "None", "stream16": "9 <= T < 64", "mma64": "T >= 64",
        "simple": "None",
    }  # fmt: skip


@pytest.mark.parametrize(("arch", "route"), [("sm_90a", 1), ("sm_80", 2)])
def test_routing_takes_one_launch_on_hopper(arch: str, route: int) -> None:
    made = lowered(block(), arch=arch)
    own_ = {v.schedule.name: len(v.entry.kernels) for v in made.variants["experts"]}
    for v in made.variants["moe"]:
        assert len(v.entry.kernels) == own_[v.schedule.name] + route
    # what computes logits for a kernel of its own is not compiled where nothing reads them
    assert ("b0_op_router" in made.kernels) == (route == 2)


def test_hopper_kernels_are_refused_elsewhere() -> None:
    with pytest.raises(TargetError, match="sm_80 has no wgmma"):
        lowered(block(), "stream160", arch="sm_80")


def test_loop_launches_two_kernels_an_expert() -> None:
    made = lowered(TABLE, "plain", "loop")
    (loop,) = (v.entry for v in made.variants["experts"] if v.schedule.name == "loop")
    assert [k.removeprefix("b0_op_").rstrip("_0123456789") for k in loop.kernels] == [
        "count", "sort", "loop", "finish",
    ]  # fmt: skip
    text = made.kernels["b0_op_loop"].func.script()
    assert text.count("b0_op_one_gate_up") == text.count("b0_op_one_down") == 1 and "(8)" in text


def test_parameters_are_bound_as_they_are() -> None:
    made = lowered(block())
    for name, parameter in block().parameters().items():
        packed = made.packed[name]
        assert (packed.shape, packed.dtype, packed.symbol) == (
            parameter.shape, parameter.dtype, None)  # fmt: skip


def test_source_is_not_machine_code() -> None:
    with pytest.raises(TargetError, match="source"):
        toolchain.assert_cubin(b"...__CUDACC_RTC__...")
    with pytest.raises(TargetError, match="source"):
        toolchain.assert_cubin(b"no GPU code at all")


def test_the_resource_report_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function 'k' for 'sm_90a'\n"
        "ptxas info    : Function properties for k\n"
        "ptxas         .     16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n"
    )
    assert toolchain.resources(log) == {"k": toolchain.Resources(40, 12, 16, 128)}


@pytest.mark.parametrize("text", ["cuda:sm_75", "cuda:", "cuda:90a"])
def test_unknown_architectures(text: str) -> None:
    if text == "cuda:":
        assert target.resolve(text) == target.resolve("cuda:sm_90a")
        return
    with pytest.raises(TargetError, match="sm_90a"):
        target.resolve(text)


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 64, "widths": (16, 32)},
        {"rows": 20, "widths": (20,)},
        {"rows": 256, "blocks": 2},
        {"rows": 256, "stages": 2},
    ],
)
def test_configs_that_cannot_work_are_refused(config: dict[str, object]) -> None:
    with pytest.raises(TargetError, match="stream"):
        stream.StreamConfig(**config)  # type: ignore[arg-type]


@pytest.mark.parametrize("config", [{"rows": 24}, {"rows": 64, "outs": 96}, {"rows": 256}])
def test_mma_configs_that_cannot_work_are_refused(config: dict[str, int]) -> None:
    with pytest.raises(TargetError, match="mma"):
        mma.MmaConfig(**config)


@pytest.mark.parametrize(
    ("built_for", "here", "runs"),
    [
        ("sm_90a", "sm_90", True), ("sm_90a", "sm_100", False), ("sm_90a", "sm_80", False),
        ("sm_80", "sm_80", True), ("sm_80", "sm_89", True), ("sm_80", "sm_90", False),
        ("sm_89", "sm_86", False), ("sm_89", "sm_89", True),
        ("compute_80", "sm_75", False), ("compute_80", "sm_86", True),
        ("compute_80", "sm_120", True), ("None", "sm_90", False),
    ],
)  # fmt: skip
def test_which_gpu_runs_an_artifact(
    monkeypatch: pytest.MonkeyPatch, built_for: str, here: str, runs: bool
) -> None:
    monkeypatch.setattr(cuda, "architecture", lambda device: here)
    reason = cuda.missing(built_for, 1)
    assert reason is None if runs else reason == f"holds code for {built_for}, cuda:1 is {here}"
