"""Every schedule x dtype x activation, and every kind of router, against float64.

Each kernel is linted and run. Tolerances as in test_families: float32 2e-6 (a sum of some ten
products, erf to 2e-7), otherwise one rounding of h and one of the output.
"""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest

from moec.ops import reference
from moec.spec import (
    ActivationSpec,
    Clamp,
    ExpertsSpec,
    GroupScore,
    GroupSpec,
    Masked,
    MoESpec,
    Nonlinearity,
    Precision,
    Renorm,
    RouterSpec,
    Score,
    Selection,
    WeightSource,
)
from tests.metal.block import NUMPY, SCHEDULES, Block, error
from tools.metal_emulator import lint

DENSE = ("tiles32", "gather")  # how the router multiplies: by tiles, as a mat-vec
TOLERANCE = {"float32": 2e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}
ACTIVATIONS = {
    "silu": (ActivationSpec(), True),
    "gelu_erf": (ActivationSpec(Nonlinearity.GELU_ERF), True),
    "gelu_tanh": (ActivationSpec(Nonlinearity.GELU_TANH), True),
    "relu": (ActivationSpec(Nonlinearity.RELU), True),
    "relu2": (ActivationSpec(Nonlinearity.RELU2), True),
    "clamped before": (
        ActivationSpec(alpha=1.7, clamp=Clamp.BEFORE, limit=0.8, up_offset=1.0), True,
    ),
    "clamped after": (ActivationSpec(clamp=Clamp.AFTER, limit=0.5), True),
    "no gate, gelu": (ActivationSpec(Nonlinearity.GELU_ERF), False),
    "no gate, relu2": (ActivationSpec(Nonlinearity.RELU2), False),
}  # fmt: skip


@cache
def blocks(dtype: str) -> dict[str, Block]:
    """A block for every activation; all are made before one runs, so that they compile together."""
    # 4 does not divide I: the second matmul loads one element at a time, the first one four.
    return {
        name: Block(MoESpec(
            dtype, RouterSpec(5, 2),
            ExpertsSpec(5, 2, 40, 22, gated, activation, name == "silu", not gated),
        ))
        for name, (activation, gated) in ACTIVATIONS.items()
    }  # fmt: skip


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str, dtype: str) -> None:
    block, random = blocks(dtype)[name], np.random.default_rng(1)
    texts = block.texts()
    assert len(texts) == 11, sorted(texts)
    lint(*texts.values())
    x = (2 * random.normal(size=(5, 40))).astype(NUMPY[dtype])
    ids = random.integers(0, 5, (5, 2)).astype(np.int32)
    weights = random.normal(size=(5, 2)).astype(np.float32)
    want = reference.experts(block.spec, block.parameters, x, ids, weights)
    for schedule in SCHEDULES:
        y = block.run("experts", schedule, x=x, topk_ids=ids, topk_weights=weights)["y"]
        assert error(y, want) <= TOLERANCE[dtype], schedule


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_tiles_give_the_same_bits(dtype: str) -> None:
    spec = MoESpec(dtype, RouterSpec(3, 2), ExpertsSpec(3, 2, 44, 70))
    block, random = Block(spec, ("tiles32", "tiles64")), np.random.default_rng(1)
    x = random.normal(size=(130, 44)).astype(NUMPY[dtype])
    ids = random.integers(0, 3, (130, 2)).astype(np.int32)  # 87 rows an expert
    routing = {"topk_ids": ids, "topk_weights": random.normal(size=(130, 2)).astype(np.float32)}
    small, large = (block.run("experts", n, x=x, **routing)["y"] for n in ("tiles32", "tiles64"))
    assert small.tobytes() == large.tobytes()
    assert (
        error(large, reference.experts(spec, block.parameters, x, *routing.values()))
        <= (TOLERANCE[dtype])
    )


@pytest.mark.parametrize(("weights", "rows"), [("float32", "bfloat16"), ("float16", "float32")])
def test_weights_of_another_dtype_than_the_model(weights: str, rows: str) -> None:
    mixed = (("gate_up", weights), ("down", weights))
    spec = MoESpec(rows, RouterSpec(5, 2), ExpertsSpec(5, 2, 40, 24), weight_dtypes=mixed)
    block, random = Block(spec), np.random.default_rng(1)
    x = random.normal(size=(37, 40)).astype(NUMPY[rows])
    ids = random.integers(0, 5, (37, 2)).astype(np.int32)
    scale = random.normal(size=(37, 2)).astype(np.float32)
    want = reference.experts(spec, block.parameters, x, ids, scale)
    for schedule in SCHEDULES:
        y = block.run("experts", schedule, x=x, topk_ids=ids, topk_weights=scale)["y"]
        assert error(y, want) <= TOLERANCE[rows], schedule


GROUPS = GroupSpec(4, 2)
ROUTERS = {
    "softmax": RouterSpec(12, 3),
    "softmax, renormalised": RouterSpec(12, 3, renorm=Renorm.SUM),
    "softmax of the selected": RouterSpec(
        12, 3, Score.NONE, logit_bias=True, weight_source=WeightSource.SOFTMAX_SELECTED
    ),
    "sigmoid of the selected": RouterSpec(
        12, 3, Score.NONE, weight_source=WeightSource.SIGMOID_SELECTED
    ),
    "sigmoid, biased, groups by their two best": RouterSpec(
        12, 3, Score.SIGMOID, selection_bias=True, groups=GROUPS, renorm=Renorm.SUM,
        renorm_epsilon=1e-20, scale=2.5,
    ),
    "groups by their best, masked by zero": RouterSpec(
        12, 3, groups=GroupSpec(3, 2, GroupScore.MAX, Masked.ZERO, biased=False),
    ),
    "sqrt softplus, p-norm": RouterSpec(
        12, 3, Score.SQRT_SOFTPLUS, renorm=Renorm.P_NORM, renorm_p=2.0
    ),
    "capped and scaled, clamped sum": RouterSpec(
        12, 3, logit_scale=0.7, logit_cap=1.5, renorm=Renorm.CLAMPED_SUM, renorm_epsilon=0.5,
        per_expert_scale=True, logits_dtype=Precision.FLOAT32,
    ),
    "weights rounded to the model": RouterSpec(12, 3, weights_dtype=Precision.MODEL),
    "sparsemixer": RouterSpec(
        12, 2, selection=Selection.SPARSEMIXER, sparsemixer_eps=0.1,
        weight_source=WeightSource.SPARSEMIXER,
    ),
    "all experts": RouterSpec(12, 12),
    "many experts": RouterSpec(600, 8, Score.SIGMOID),
}  # fmt: skip


@pytest.mark.parametrize("name", ROUTERS)
def test_routers(name: str) -> None:
    router = ROUTERS[name]
    experts = ExpertsSpec(router.num_experts, router.top_k, 40, 8)
    spec = MoESpec("bfloat16", router, experts, weight_dtypes=(("router", "float32"),))
    block = Block(spec, DENSE, ("route",))
    texts = block.texts()
    assert any("route" in kernel for kernel in texts)
    lint(*texts.values())
    x = np.random.default_rng(2).normal(size=(40, 40)).astype(ml_dtypes.bfloat16)
    want_ids, want = reference.route(spec, block.parameters, x)
    for schedule in DENSE:
        out = block.run("route", schedule, x=x)
        same = (out["topk_ids"] == want_ids).all(axis=1)
        # Logits are rounded to bfloat16 after a sum in another order than float64's: a
        # token in a hundred or so lands on the other side of a tie.
        assert (~same).sum() <= 2
        # Weights of the float64 reference from such logits may differ by one rounding of them.
        assert error(out["topk_weights"][same], want[same]) <= 2.0**-8


@pytest.mark.parametrize("tokens", [1, 40])
def test_logits_that_are_no_numbers_keep_ids_in_range(tokens: int) -> None:
    spec = MoESpec("float32", RouterSpec(12, 3), ExpertsSpec(12, 3, 40, 8))
    block = Block(spec, DENSE[:1], ("route",))
    for value in (np.nan, np.inf, -np.inf):
        ids = block.run("route", DENSE[0], x=np.full((tokens, 40), value, np.float32))["topk_ids"]
        assert ids.min() >= 0 and ids.max() < 12
