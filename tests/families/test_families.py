"""Every family: its checkpoint, compiled with every CPU schedule, against another implementation.

Float32. Routing ids are equal, weights and outputs within 1e-5 relative in the norm: sums of
some dozens of products in another order than the oracle's, and functions within 3e-7.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moec
from moec.checkpoint import Checkpoint
from moec.frontend import builtin, read_model, report
from moec.ops import reference

from .. import objects as compiled_once
from . import cuda, oracle, published, table, tiny

SCHEDULES = ("fused", "gather", "loop")
TOKENS = (0, 1, 33)
TOLERANCE = 1e-5
# The baseline instruction set has the smallest kernels, hence the fastest compilation; the
# others are covered by the tests of the first families.
TARGET = "cpu:x86-64"
CASES = [
    pytest.param(family, variant, id=f"{family}-{variant}")
    for family in (*table.FAMILIES, *published.FAMILIES)
    for variant in table.VARIANTS
]

Array = np.ndarray[Any, Any]
# (layer, x, token ids, second input) -> (y, ids, weights)
Oracle = Callable[[int, Array, Array, Array], tuple[Array, Array, Array]]


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        compiled_once.install(compiled_once.Objects(tmp_path_factory.mktemp("objects")), patch)
        yield


def make(family: str, variant: str, path: Path) -> tuple[list[int], int, Oracle]:
    """Write a checkpoint: its MoE layers, its hidden size and what it must compute."""
    if family in published.FAMILIES:
        return published.write(family, variant, path)
    model = tiny.tiny(family, variant, path)

    def run(layer: int, x: Array, token_ids: Array, _: Array) -> tuple[Array, Array, Array]:
        return oracle.run(model, layer, x, token_ids)

    return oracle.moe_layers(model), table.COMMON[variant]["hidden_size"], run


def error(got: Array, want: Array) -> float:
    """|got - want| / |want|; NaN never passes a comparison."""
    difference = np.linalg.norm(got.astype(np.float64) - want)
    norm = np.linalg.norm(want.astype(np.float64))
    return float(difference / norm) if norm else float(difference)


def by_id(ids: Array, weights: Array) -> tuple[Array, Array]:
    """The pairs of a token in the order of their ids: the order of k is nobody's promise."""
    order = np.argsort(ids, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1), np.take_along_axis(weights, order, 1)


@pytest.mark.parametrize(("family", "variant"), CASES)
def test_family(
    family: str,
    variant: str,
    objects: None,
    record_property: Callable[[str, object], None],
    tmp_path: Path,
) -> None:
    record_property("family", [family, variant])  # the run ends with a table of these
    layers, hidden, run = make(family, variant, tmp_path / "model")
    moec.compile(tmp_path / "model", target=TARGET, out=tmp_path / "m.moec", schedules=SCHEDULES)
    model = moec.load(tmp_path / "m.moec", threads=1)
    assert list(model.layers) == layers
    worst = check_reference(tmp_path / "model", hidden, run)
    if variant == "b":
        for spec in dict.fromkeys(model[layer].spec for layer in layers):
            cuda.lowers(spec, "bfloat16")
    for layer in layers:
        for tokens in TOKENS:
            worst = max(worst, check(model[layer], layer, tokens, hidden, run))
    record_property("error", worst)


def check_reference(path: Path, hidden: int, run: Oracle) -> float:
    """The float64 reference of the last block, on its canonical parameters."""
    random = np.random.default_rng(1)
    x, shared_x = random.normal(size=(2, 9, hidden)).astype(np.float32)
    token_ids = random.integers(0, 50, 9)
    read = read_model(path)
    assert f"family {read.family}" in report.text(read)
    block = read.blocks[-1]
    with Checkpoint.open(path) as opened:
        parameters = {name: block.plan.tensor(opened, name) for name, _ in block.plan.params}
    want, want_ids, want_weights = run(block.layer, x, token_ids, shared_x)
    ids, weights = by_id(*reference.route(block.spec, parameters, x, token_ids))
    want_ids, want_weights = by_id(want_ids, want_weights)
    np.testing.assert_array_equal(ids, want_ids)
    y = reference.moe(block.spec, parameters, x, token_ids=token_ids, shared_x=shared_x)
    errors = error(weights, want_weights), error(y, want)
    assert max(errors) <= TOLERANCE
    return max(errors)


def check(block: Any, layer: int, tokens: int, hidden: int, run: Oracle) -> float:
    """Compare route and moe of one block in every schedule; the largest relative error."""
    random = np.random.default_rng(tokens * 100 + layer)
    x, shared_x = random.normal(size=(2, tokens, hidden)).astype(np.float32)
    token_ids = random.integers(0, 50, tokens)
    router, shared = block.spec.router, block.spec.shared
    extra: dict[str, Any] = {}
    if router.vocab_size:
        extra["token_ids"] = token_ids
    second = {"shared_x": shared_x} if shared is not None and shared.own_input else {}
    if tokens == 0:
        for schedule in SCHEDULES:
            ids, weights = block.route(x, schedule=schedule, **extra)
            assert ids.shape == weights.shape == (0, router.top_k)
            assert block(x, schedule=schedule, **extra, **second).shape == (0, hidden)
        return 0.0
    want, want_ids, want_weights = run(layer, x, token_ids, shared_x)
    want_ids, want_weights = by_id(want_ids, want_weights)
    worst = 0.0
    for schedule in SCHEDULES:
        ids, weights = by_id(*block.route(x, schedule=schedule, **extra))
        np.testing.assert_array_equal(ids, want_ids)
        errors = [error(weights, want_weights)]
        y = block(x, schedule=schedule, **extra, **second)
        errors.append(error(y, want))
        assert max(errors) <= TOLERANCE, (layer, tokens, schedule, errors)
        worst = max(worst, *errors)
    return worst


def test_every_family_is_tested() -> None:
    tested = {*table.FAMILIES, *published.FAMILIES}
    known = {family.family for family in builtin()}
    assert known <= tested, f"not tested: {sorted(known - tested)}"
