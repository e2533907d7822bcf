"""The nine first families on the emulated Metal device, against transformers' own modules.

The artifact is the real one: host code, launches, MSL. Errors are |got - want| / |want|.
float32: 2e-6 for given ids and weights, 1e-5 for the block (some hundred products in another
order, and a polynomial erf of 2e-7). bfloat16 and float16 are compared with the same modules in
float32: h and the output are rounded once each, 2^-8 and 2^-11. The block's weights come out
of rounded logits: there, our error may exceed the error of the rounded module by that much.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from moec.artifact import Artifact
from tests import models
from tests.metal.conftest import SCHEDULES, Get
from tests.metal.payload import payload
from tools.metal_emulator import ORDERS, Order, lint, options

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}
TOKENS = (0, 1, 5, 40, 130)
# (variant, dtype): every family in each.
KINDS = (("a", "bfloat16"), ("b", "float32"), ("a", "float16"))
CASES = [(family, *kind) for family in models.FAMILIES for kind in KINDS]

Array = np.ndarray[Any, Any]


def error(got: Array, want: Array) -> float:
    difference = np.linalg.norm(got.astype(np.float64) - want.astype(np.float64))
    norm = np.linalg.norm(want.astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def by_id(ids: Array, weights: Array) -> tuple[Array, Array]:
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


@pytest.mark.parametrize(("family", "variant", "dtype"), CASES)
def test_route_and_moe(compiled: Get, family: str, variant: str, dtype: str) -> None:
    made = compiled(family, variant, dtype)
    layer = models.moe_layers(made.model)[0]
    block = made.loaded[layer]
    for tokens in TOKENS:
        random = np.random.default_rng(tokens)
        x = random.normal(size=(tokens, made.model.config.hidden_size)).astype(DTYPES[dtype])
        want_ids, want_weights = by_id(*models.reference_route(made.model, layer, x))
        theirs = models.reference_moe(made.model, layer, x)
        exact = models.reference_moe(made.twin, layer, x)
        for schedule in SCHEDULES:
            ids, weights = by_id(*block.route(x, schedule=schedule))
            same = (ids == want_ids).all(axis=1)
            # Rounded logits may tie, or round differently after another order of the sum.
            assert (~same).sum() <= (0 if dtype == "float32" else tokens // 20)
            y = block(x, schedule=schedule)
            assert y.shape == x.shape and y.dtype == x.dtype
            assert error(weights[same], want_weights[same]) <= TOLERANCE[dtype]
            allowed = error(theirs[same], exact[same]) + TOLERANCE[dtype]
            assert error(y[same], exact[same]) <= allowed, (tokens, schedule)


@pytest.mark.parametrize(("family", "variant", "dtype"), CASES)
def test_experts_with_ids_from_outside(
    compiled: Get, family: str, variant: str, dtype: str
) -> None:
    made = compiled(family, variant, dtype)
    layer = models.moe_layers(made.model)[0]
    experts = made.loaded[layer].spec.experts
    count, k, random = experts.num_experts, experts.top_k, np.random.default_rng(5)
    for tokens in (1, 23):
        x = random.normal(size=(tokens, experts.hidden_size)).astype(DTYPES[dtype])
        weights = random.normal(size=(tokens, k)).astype(np.float32)
        routings = {
            "ragged": random.integers(0, count, (tokens, k)),
            "one expert": np.full((tokens, k), count - 1),
            "two experts, all others empty": random.integers(0, 2, (tokens, k)),
            "ids that no expert has": random.integers(-3, count + 3, (tokens, k)),
            "no expert at all": np.full((tokens, k), -1),
        }
        for name, ids in routings.items():
            ids = ids.astype(np.int32)
            want = models.reference_experts(made.twin, layer, x, ids, weights)
            for schedule in SCHEDULES:
                got = made.loaded[layer].experts(x, ids, weights, schedule=schedule)
                limit = 2e-6 if dtype == "float32" else TOLERANCE[dtype]
                assert error(got, want) <= limit, (name, tokens, schedule)


@pytest.mark.parametrize(("family", "variant", "dtype"), CASES)
def test_every_kernel_is_linted(compiled: Get, family: str, variant: str, dtype: str) -> None:
    made = compiled(family, variant, dtype)
    (library,) = (made.path / "lib").iterdir()
    texts, manifest = payload(library.read_bytes()), Artifact.open(made.path).manifest
    kernels = {
        kernel
        for function in manifest.targets["metal-emulated"].shapes["b0"].functions.values()
        for variant_ in function.variants
        for kernel in variant_.ops["kernels"]
    }
    assert kernels and {f"{kernel}_kernel" for kernel in kernels} <= set(texts)
    lint(*texts.values())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_every_order_gives_the_same_bits(compiled: Get, family: str) -> None:
    made = compiled(family, "a", "bfloat16")
    block = made.loaded[models.moe_layers(made.model)[0]]
    random = np.random.default_rng(3)
    for tokens in (5, 37):
        x = random.normal(size=(tokens, made.model.config.hidden_size)).astype(ml_dtypes.bfloat16)
        for schedule in SCHEDULES:
            seen = set()
            for order in ORDERS:
                # Tracing also fails when two threadgroups of one launch touch an element.
                with options(order, trace=order == Order()):
                    seen.add(block(x, schedule=schedule).tobytes())
            assert len(seen) == 1, (tokens, schedule)
