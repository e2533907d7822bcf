"""Every pass on a small block: golden text, parsed back, and what its docstring promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import tvm
from tvm import relax
from tvm.script import from_source

from moec import target
from moec.frontend.graph import build_graph
from moec.schedules import backend
from moec.schedules.passes.fold_activation import FoldActivation
from moec.schedules.passes.fold_gather import FoldGather
from moec.schedules.passes.fold_reduce import FoldReduce
from moec.schedules.passes.index_experts import IndexExperts
from moec.schedules.passes.loop_experts import LoopExperts
from moec.spec import (
    ActivationSpec,
    ApplyTo,
    Clamp,
    ExpertsSpec,
    MoESpec,
    RouterSpec,
    SharedExpertSpec,
)
from tests.conftest import Golden

# Unequal sizes, so that a mistaken dimension shows; biases, a clamp and a shared expert, so
# that what a pass must carry along is there.
ACTIVATION = ActivationSpec(alpha=1.5, clamp=Clamp.BEFORE, limit=7.0, up_offset=1.0)
EXPERTS = ExpertsSpec(6, 2, 20, 12, True, ACTIVATION, gate_up_bias=True, down_bias=True)
BLOCK = MoESpec("bfloat16", RouterSpec(6, 2), EXPERTS, SharedExpertSpec(10))
WEIGHTED_INPUT = MoESpec("float32", RouterSpec(6, 2, apply_to=ApplyTo.INPUT), EXPERTS)

FOLDED = (FoldGather, FoldActivation, FoldReduce)
PIPELINES: dict[str, Sequence[Any]] = {
    "FoldGather": FOLDED[:1],
    "FoldActivation": FOLDED[:2],
    "FoldReduce": FOLDED,
    "IndexExperts": (*FOLDED, IndexExperts),
    "LoopExperts": (*FOLDED, LoopExperts),
}


def run(passes: Sequence[Any], spec: MoESpec = BLOCK) -> tvm.IRModule:
    module = build_graph(spec)
    for rewrite in passes:
        module = rewrite(module)
    return module


def ops(module: tvm.IRModule, function: str = "moe") -> list[str]:
    """The moec ops of a function in order."""
    found = []
    for block in module[function].body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, relax.Call) and value.op.name.startswith("relax.moec."):
                found.append(value.op.name.removeprefix("relax.moec."))
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_pass(name: str, golden: Golden) -> None:
    assert PIPELINES[name][-1].info.name == f"moec.{name}"
    module = run(PIPELINES[name])
    text = module.script()
    golden(text)
    tvm.ir.assert_structural_equal(from_source(text), module)


@pytest.mark.parametrize("name", PIPELINES)
def test_weight_on_the_input(name: str, golden: Golden) -> None:
    module = run(PIPELINES[name], WEIGHTED_INPUT)
    text = tvm.IRModule({"experts": module["experts"]}).script()
    golden(text)
    tvm.ir.assert_structural_equal(from_source(text)["experts"], module["experts"])


def test_what_is_left() -> None:
    shared = ["linear", "linear"]  # the shared expert's, with its activation folded in
    assert ops(run(())) == [
        "linear", "route", "sort", "gather_rows", "grouped_matmul", "activation",
        "grouped_matmul", "reduce", "linear", "activation", "linear", "combine",
    ]  # fmt: skip
    head = ["linear", "route"]
    assert ops(run(FOLDED)) == [*head, "sort", *["grouped_matmul"] * 2, *shared, "combine"]
    indexed = run(PIPELINES["IndexExperts"])
    assert ops(indexed) == [*head, *["indexed_matmul"] * 2, *shared, "combine"]
    assert ops(run(PIPELINES["LoopExperts"])) == [*head, "expert_loop", *shared, "combine"]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pass_without_its_pattern_changes_nothing(name: str) -> None:
    rewrite, done = PIPELINES[name][-1], run(PIPELINES[name])
    tvm.ir.assert_structural_equal(rewrite(done), done)  # and so twice is once
    route = tvm.IRModule({"route": build_graph(BLOCK)["route"]})
    tvm.ir.assert_structural_equal(rewrite(route), route)


def test_index_and_loop_need_the_folded_form() -> None:
    """Their pre-condition: without FoldGather and FoldReduce nothing is rewritten."""
    for rewrite in (IndexExperts, LoopExperts):
        graph = build_graph(BLOCK)
        tvm.ir.assert_structural_equal(rewrite(graph), graph)


def test_legalized(golden: Golden) -> None:
    one = target.resolve("cpu:x86-64-v3")
    lowering = backend("cpu").open(BLOCK, one, "b0_op")
    schedule = backend("cpu").schedules["fused"]
    with tvm.target.Target("llvm"):
        module = run(schedule.passes)
        module = relax.transform.LegalizeOps(lowering.table(schedule.config))(module)
    text = module.script()
    golden(text)
    tvm.ir.assert_structural_equal(from_source(text), module)
    assert "R.moec" not in text
    for symbol in lowering.kernels:
        assert f'"{symbol}"' in text
