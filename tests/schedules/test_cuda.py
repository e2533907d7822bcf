"""The CUDA backend on a machine without a GPU: every schedule becomes cubins that fit the chip.

Needs the wheels of the extra "cuda"; results on a GPU are checked by bench/gpu_families.py.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest

from moec import target
from moec.compiler.instruments import Observer
from moec.compiler.lower import Lowered, lower
from moec.compiler.options import CompileOptions
from moec.errors import TargetError
from moec.schedules import backend, choose
from moec.schedules.cuda import pipeline, stream, toolchain
from moec.spec import (
    ActivationSpec,
    ApplyTo,
    Clamp,
    ExpertsSpec,
    GroupSpec,
    MoESpec,
    Nonlinearity,
    Renorm,
    RouterSpec,
    Score,
    Selection,
    SharedExpertSpec,
    SharedGate,
    WeightSource,
)

HOPPER = target.resolve("cuda:sm_90a")
E, K, H, I = 8, 2, 128, 64


def block(dtype: str = "bfloat16", hidden: int = H, inner: int = I, **router: object) -> MoESpec:
    spec = RouterSpec(E, K, renorm=Renorm.SUM, **router)  # type: ignore[arg-type]
    return MoESpec(dtype, spec, ExpertsSpec(E, K, hidden, inner))


def lowered(spec: MoESpec, *names: str) -> Lowered:
    own = backend("cuda")
    chosen = choose(own, names, spec, HOPPER)
    return lower("b0", spec, HOPPER, own, chosen, Observer(CompileOptions()), None)


def wheels() -> bool:
    spec = importlib.util.find_spec("nvidia")
    places = (spec.submodule_search_locations if spec else None) or ()
    return any((Path(p) / "cu13/lib/libnvrtc.so.13").is_file() for p in places)


needs_nvrtc = pytest.mark.skipif(not wheels(), reason="pip install 'moec[cuda]'")

BLOCKS = {
    "plain": block(),
    "float16": block("float16"),
    "odd": block(hidden=40, inner=24),
    "biased": MoESpec(
        "bfloat16",
        RouterSpec(E, K, score=Score.NONE, logit_bias=True,
                   weight_source=WeightSource.SOFTMAX_SELECTED),
        ExpertsSpec(E, K, H, I, activation=ActivationSpec(
            Nonlinearity.SILU, 1.702, Clamp.BEFORE, 7.0, 1.0), gate_up_bias=True, down_bias=True),
    ),
    "grouped": MoESpec(
        "bfloat16",
        RouterSpec(E, K, score=Score.SIGMOID, selection_bias=True, groups=GroupSpec(4, 2),
                   renorm=Renorm.SUM, scale=2.5),
        ExpertsSpec(E, K, H, I), SharedExpertSpec(I, gate=SharedGate.SIGMOID),
    ),
    "sparsemixer": MoESpec(
        "bfloat16",
        RouterSpec(E, K, score=Score.NONE, selection=Selection.SPARSEMIXER,
                   weight_source=WeightSource.SPARSEMIXER, sparsemixer_eps=0.01),
        ExpertsSpec(E, K, H, I, gated=False, activation=ActivationSpec(Nonlinearity.RELU2)),
    ),
    "float32": block("float32"),
}  # fmt: skip


@needs_nvrtc
@pytest.mark.parametrize("name", BLOCKS)
def test_every_kernel_is_machine_code_without_spills(name: str, tmp_path: Path) -> None:
    import tvm

    made = lowered(BLOCKS[name])
    with toolchain.compiling("sm_90a") as report:
        library = pipeline.build(tvm.IRModule(made.functions), "sm_90a", list(made.kernels))
    library.export_library(str(tmp_path / "m.so"))
    toolchain.assert_cubin((tmp_path / "m.so").read_bytes())
    assert {f"{symbol}_kernel" for symbol in made.kernels} == set(report)
    for symbol, used in report.items():
        assert used.spills == 0 and used.stack == 0, symbol


def test_decode_takes_two_launches_and_the_others_four() -> None:
    spec = block()
    made = lowered(spec)
    launches = {v.schedule.name: len(v.entry.kernels) for v in made.variants["experts"]}
    assert launches["gather"] == 2
    assert launches["stream16"] == launches["stream32"] == 4
    # the sort of the others takes two
    assert launches["stream64"] == launches["stream160"] == launches["prefill"] == 5


def test_every_token_count_has_one_variant() -> None:
    for spec in BLOCKS.values():
        chosen = choose(backend("cuda"), (), spec, HOPPER)
        spans = sorted((tokens.low, tokens.high) for _, tokens in chosen if tokens)
        assert spans[0][0] == 0 and spans[-1][1] is None
        assert all(a[1] == b[0] for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize(
    ("spec", "name", "reason"),
    [
        (block("float32"), "prefill", "bfloat16"),
        (block(hidden=40), "gather", "multiple of 64"),
        (block(apply_to=ApplyTo.INPUT), "stream16", "input"),
        (block(), "plain", "tensor-core"),
    ],
)
def test_a_named_schedule_that_does_not_fit_is_refused(
    spec: MoESpec, name: str, reason: str
) -> None:
    with pytest.raises(TargetError, match=reason):
        lowered(spec, name)


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
        assert target.resolve(text) == HOPPER
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
