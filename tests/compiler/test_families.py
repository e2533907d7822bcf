"""Every first family, compiled, against transformers' own modules: route, experts and moe.

Errors are |got - want| / |want| in the norm. float32: 1e-5, as some hundred products are
summed in another order than torch's. bfloat16 is compared with the same modules and weights
in float32. Given ids and weights, the rounding of the output (and of h where the machine
multiplies bfloat16) must be all that differs: 2^-8. For the whole block, whose weights come
out of rounded logits, our error may exceed the error of the bfloat16 module by 2^-8 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import moec
from tests import models
from tests.conftest import Saved

SCHEDULES = ("fused", "gather", "loop")
TOKENS = (0, 1, 2, 7, 33, 257)
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8}

Array = np.ndarray[Any, Any]
Compiled = Callable[[str, str, str], tuple[Any, Any, Any]]


@pytest.fixture(scope="module")
def compiled(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """(family, variant, dtype) -> (transformers model, its float32 twin, loaded artifact)."""
    made: dict[tuple[str, str, str], Any] = {}

    def get(family: str, variant: str, dtype: str) -> tuple[Any, Any, Any]:
        key = (family, variant, dtype)
        if key not in made:
            model, path = saved(*key)
            out = tmp_path_factory.mktemp("artifact") / "m.moec"
            moec.compile(path, out=out, schedules=SCHEDULES)
            twin = model if dtype == "float32" else models.widened(model)
            made[key] = model, twin, moec.load(out)
        return made[key]

    return get


CASES = [
    pytest.param(family, variant, dtype, id=f"{family}-{variant}-{dtype}")
    for family in models.FAMILIES
    for variant in models.VARIANTS
    for dtype in DTYPES
]


def inputs(seed: int, tokens: int, width: int, dtype: str) -> Array:
    x: Array = np.random.default_rng(seed).normal(size=(tokens, width)).astype(DTYPES[dtype])
    return x


def error(got: Array, want: Array) -> float:
    """|got - want| / |want| in float64; NaN never passes a comparison."""
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    norm = np.linalg.norm(want.astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def by_id(ids: Array, weights: Array) -> tuple[Array, Array]:
    """The pairs of a token in the order of their ids: sources differ in the order of k."""
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


@pytest.mark.parametrize(("family", "variant", "dtype"), CASES)
def test_route_and_moe(compiled: Compiled, family: str, variant: str, dtype: str) -> None:
    model, twin, loaded = compiled(family, variant, dtype)
    assert list(loaded) == models.moe_layers(model)
    for layer, tokens in ((n, t) for n in loaded for t in TOKENS):
        x = inputs(tokens, tokens, model.config.hidden_size, dtype)
        want_ids, want_weights = by_id(*models.reference_route(model, layer, x))
        theirs = models.reference_moe(model, layer, x)
        exact = models.reference_moe(twin, layer, x)
        for schedule in SCHEDULES:
            ids, weights = by_id(*loaded[layer].route(x, schedule=schedule))
            # In bfloat16 two logits may be equal after rounding, or come out of torch's sum
            # in another order: a token whose choice differs must be a close call.
            same = (ids == want_ids).all(axis=1)
            assert (~same).sum() <= (0 if dtype == "float32" else tokens // 20)
            y = loaded[layer](x, schedule=schedule)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert error(weights[same], want_weights[same]) <= TOLERANCE[dtype]
            allowed = error(theirs[same], exact[same]) + TOLERANCE[dtype]
            assert error(y[same], exact[same]) <= allowed


@pytest.mark.parametrize(("family", "variant", "dtype"), CASES)
def test_experts_with_ids_from_outside(
    compiled: Compiled, family: str, variant: str, dtype: str
) -> None:
    _, twin, loaded = compiled(family, variant, dtype)
    layer = next(iter(loaded))
    experts = loaded[layer].spec.experts
    count, k = experts.num_experts, experts.top_k
    random = np.random.default_rng(5)
    for tokens in TOKENS:
        x = inputs(tokens + 1, tokens, experts.hidden_size, dtype)
        weights = random.normal(size=(tokens, k)).astype(np.float32)
        cases = {
            "random": random.integers(0, count, (tokens, k)),  # repeated ids among them
            "one expert": np.full((tokens, k), count - 1),
            "two experts": random.integers(0, 2, (tokens, k)),  # all others are empty
            "out of range": random.integers(-3, count + 3, (tokens, k)),
        }
        for name, ids in cases.items():
            want = models.reference_experts(twin, layer, x, ids, weights)
            for schedule in SCHEDULES:
                for kind in (np.int32, np.int64):
                    y = loaded[layer].experts(x, ids.astype(kind), weights, schedule=schedule)
                    assert error(y, want) <= TOLERANCE[dtype], (name, tokens, schedule)
