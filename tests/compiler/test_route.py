"""The routing kernel: every field of RouterSpec, ties, NaN and infinities, T = 0 and 1.

Each router is one kernel that gets its logits directly; all are compiled into one library.
The reference is float64. ids must be equal: logits of one token are far apart against the
rounding of float32, or exactly equal. Weights: 1e-5 of the norm in float32; where a router
rounds to a 16-bit type, a value beside a rounding boundary may fall the other way, which is
one unit in the last place: 2^-8 for bfloat16, 2^-11 for float16.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

from moec import target
from moec.artifact import aligned
from moec.ops import reference
from moec.schedules.buffers import PerToken
from moec.schedules.cpu.codegen import compile_module
from moec.schedules.cpu.emit import round_up
from moec.schedules.cpu.isa import ISAS
from moec.schedules.cpu.route import route
from moec.spec import (
    ExpertsSpec,
    GroupScore,
    GroupSpec,
    Masked,
    MoESpec,
    Precision,
    Renorm,
    RouterSpec,
    ScaleOn,
    Score,
    Selection,
    WeightSource,
)
from tests.blocks import error

Array = np.ndarray[Any, Any]

RENORMS = {
    "none": {},
    "sum": {"renorm": Renorm.SUM, "renorm_epsilon": 1e-20},
    "clamped": {"renorm": Renorm.CLAMPED_SUM, "renorm_epsilon": 0.5},
    "norm2": {"renorm": Renorm.P_NORM, "renorm_p": 2.0},
    "norm3": {"renorm": Renorm.P_NORM, "renorm_p": 3.0},
}
MIXER = {"selection": Selection.SPARSEMIXER, "weight_source": WeightSource.SPARSEMIXER}
TABLE = {"selection": Selection.TOKEN_TABLE, "score": Score.SQRT_SOFTPLUS}
F32 = Precision.FLOAT32


def _router(e: int, k: int, **fields: Any) -> RouterSpec:
    return RouterSpec(e, k, **{"logits_dtype": F32, **fields})


def _scores() -> Iterator[tuple[str, str, RouterSpec]]:
    scores = {
        Score.SOFTMAX: tuple(RENORMS),
        Score.SIGMOID: ("none", "sum"),
        Score.SQRT_SOFTPLUS: ("none", "clamped"),
    }
    for score, name in ((s, n) for s, names in scores.items() for n in names):
        yield f"{score.value} {name}", "float32", _router(13, 4, score=score, **RENORMS[name])
    for source in (WeightSource.SOFTMAX_SELECTED, WeightSource.SIGMOID_SELECTED):
        fields = {"score": Score.NONE, "weight_source": source}
        yield source.value, "float32", _router(13, 4, **fields)
        yield f"{source.value} sum", "float32", _router(13, 4, **fields, **RENORMS["sum"])
        biased = _router(13, 4, **fields, selection_bias=True)
        yield f"{source.value} biased", "float32", biased
    twice = _router(13, 4, weight_source=WeightSource.SOFTMAX_SELECTED)
    yield "softmax twice", "float32", twice
    for score in scores:
        yield f"{score.value} biased", "float32", _router(13, 4, score=score, selection_bias=True)


def _groups() -> Iterator[tuple[str, str, RouterSpec]]:
    for score, masked, biased in itertools.product(GroupScore, Masked, (True, False)):
        group = GroupSpec(6, 2, score, masked, biased)
        router = _router(24, 5, score=Score.SIGMOID, selection_bias=True, groups=group)
        yield f"groups {score.value} {masked.value} {biased}", "float32", router
    yield "groups of softmax", "float32", _router(20, 3, groups=GroupSpec(5, 3, GroupScore.MAX))
    yield "all groups", "float32", _router(6, 4, groups=GroupSpec(3, 3))
    yield "whole groups", "float32", _router(8, 4, groups=GroupSpec(4, 2))
    # Experts at 0 outrank the kept ones whose biased value is negative.
    zero = GroupSpec(4, 2, GroupScore.MAX, Masked.ZERO)
    yield "masked above kept", "float32", _router(16, 6, groups=zero, selection_bias=True)
    many = GroupSpec(40, 7, GroupScore.MAX)
    yield "more groups than lanes", "float32", _router(80, 9, groups=many)


def _others() -> Iterator[tuple[str, str, RouterSpec]]:
    yield "one expert", "float32", _router(1, 1)
    yield "every expert", "float32", _router(7, 7)
    yield "64 of 64", "float32", _router(64, 64, score=Score.SIGMOID, **RENORMS["sum"])
    yield "8 of 65", "float32", _router(65, 8)
    yield "10 of 300", "float32", _router(300, 10, **RENORMS["sum"])
    yield "scaled", "float32", _router(9, 3, scale=2.5)
    yield "scaled later", "float32", _router(9, 3, scale=2.5, scale_on=ScaleOn.ROUTED_SUM)
    yield "per expert", "float32", _router(9, 3, per_expert_scale=True, **RENORMS["sum"])
    yield "cap", "float32", _router(9, 3, logit_cap=1.5)
    yield "logit scale", "float32", _router(9, 3, logit_scale=0.3, logit_cap=30.0)
    yield "global scale", "float32", _router(9, 3, global_scale=True, **RENORMS["sum"])
    yield "always 2", "float32", _router(13, 5, always=2, selection_bias=True, **RENORMS["sum"])
    group = GroupSpec(4, 2, GroupScore.MAX)
    yield "always 1, groups", "float32", _router(13, 4, always=1, groups=group)
    yield "token table", "float32", _router(9, 3, vocab_size=11, **TABLE, **RENORMS["sum"])
    for eps in (0.01, 0.2):
        yield f"sparsemixer {eps}", "float32", _router(8, 2, sparsemixer_eps=eps, **MIXER)
    yield "sparsemixer of 2", "float32", _router(2, 2, sparsemixer_eps=0.1, **MIXER)
    for dtype in ("bfloat16", "float16"):
        model = {"logits_dtype": Precision.MODEL}
        yield f"{dtype} logits", dtype, _router(16, 4, **model)
        yield f"{dtype} weights", dtype, _router(16, 4, weights_dtype=Precision.MODEL)
        yield f"{dtype} mixer", dtype, _router(16, 2, sparsemixer_eps=0.05, **model, **MIXER)
        yield f"{dtype} logit scale", dtype, _router(16, 4, logit_scale=0.3, **model)


CASES = {name: (dtype, spec) for name, dtype, spec in (*_scores(), *_groups(), *_others())}
TOLERANCE = {"float32": 1e-5, "bfloat16": 2.0**-8, "float16": 2.0**-11}


class Routers:
    """All routers, compiled."""

    def __init__(self) -> None:
        one = target.resolve("cpu")
        isa = ISAS[one.isa]
        self.kernels = {
            name: route(f"r{n}", isa, spec, dtype, round_up(spec.num_experts, isa.panel))
            for n, (name, (dtype, spec)) in enumerate(CASES.items())
        }
        functions = {kernel.symbol: kernel.func for kernel in self.kernels.values()}
        self._module = compile_module(functions, one)

    def __call__(
        self, name: str, logits: Array, threads: int = 1, token_ids: Array | None = None
    ) -> tuple[Array, Array]:
        """(topk_ids, topk_weights) of logits [T, E]; the padding of the buffers is garbage."""
        kernel, tokens = self.kernels[name], len(logits)
        arrays = {}
        for buf in kernel.args:
            shape = tuple(d.count * tokens if isinstance(d, PerToken) else d for d in buf.shape)
            arrays[buf.name] = aligned(shape, buf.dtype)
            arrays[buf.name][...] = 77  # what a workspace may hold
        arrays["logits"][:, : logits.shape[1]] = logits
        if "token_ids" in arrays:
            arrays["token_ids"][...] = words(name, tokens) if token_ids is None else token_ids
        for vector, values in vectors(name).items():
            arrays[vector][...] = values
        tensors = [tvm_ffi.from_dlpack(arrays[buf.name]) for buf in kernel.args]
        self._module[kernel.symbol](*tensors, tokens, threads)
        return arrays["topk_ids"], arrays["topk_weights"]


def words(name: str, tokens: int) -> Array:
    """The ids of the input tokens."""
    return np.random.default_rng(3).integers(0, CASES[name][1].vocab_size, tokens).astype("i4")


def vectors(name: str) -> dict[str, Array]:
    """The stored operands of a router; biases are coarse, and of both signs."""
    _, spec = CASES[name]
    random = np.random.default_rng(len(name))
    out = {}
    if spec.selection_bias:
        low, high = (-3.0, -0.5) if name == "masked above kept" else (-0.5, 0.5)
        out["selection_bias"] = random.uniform(low, high, spec.selectable).astype("f4")
    if spec.global_scale:
        out["global_scale"] = np.array([1.75], np.float32)
    if spec.selection is Selection.TOKEN_TABLE:
        shape = (spec.vocab_size, spec.num_experts)
        every = random.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)
        out["token_table"] = every[:, : spec.top_k].astype(np.int32)
    if spec.per_expert_scale:
        out["per_expert_scale"] = random.uniform(0.5, 2.0, spec.num_experts).astype("f4")
    return out


def expected(name: str, logits: Array) -> tuple[Array, Array]:
    """The reference: with the identity as router weight, x are the logits."""
    dtype, router = CASES[name]
    e = router.num_experts
    spec = MoESpec(dtype, router, ExpertsSpec(e, router.top_k, e, 1))
    ids = words(name, len(logits)) if router.selection is Selection.TOKEN_TABLE else None
    return reference.route(spec, {"router": np.eye(e), **vectors(name)}, logits, ids)


@pytest.fixture(scope="module")
def routers() -> Routers:
    return Routers()


def spread(e: int, tokens: int, seed: int) -> Array:
    """Logits [T, E] of which no two of a token are nearer than 8 / E."""
    random = np.random.default_rng(seed)
    rows = np.linspace(-4.0, 4.0, e) + random.uniform(-0.5, 0.5, (tokens, 1))
    return random.permuted(rows, axis=1).astype(np.float32)


def agree(routers: Routers, name: str, logits: Array) -> None:
    ids, weights = routers(name, logits)
    want_ids, want_weights = expected(name, logits)
    np.testing.assert_array_equal(ids, want_ids)
    assert error(weights, want_weights) <= TOLERANCE[CASES[name][0]]


@pytest.mark.parametrize("name", CASES)
def test_router(routers: Routers, name: str) -> None:
    e = CASES[name][1].num_experts
    for tokens in (0, 1, 2, 50):
        agree(routers, name, spread(e, tokens, tokens))


@pytest.mark.parametrize("name", CASES)
def test_equal_values_choose_the_lowest_id(routers: Routers, name: str) -> None:
    """Two values of logits only: all comparisons inside them are ties, of groups as well."""
    e = CASES[name][1].num_experts
    logits = np.random.default_rng(5).integers(0, 2, (40, e)).astype(np.float32)
    logits[0], logits[1] = 0.0, -1.0
    agree(routers, name, logits)
    spec = CASES[name][1]
    free = spec.selection is not Selection.TOKEN_TABLE and not spec.always
    if free and not spec.selection_bias and spec.groups is None:
        ids, _ = routers(name, logits[:1])
        np.testing.assert_array_equal(ids[0], np.arange(spec.top_k))


EXTREMES = (np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0, 1.0)


@pytest.mark.parametrize("name", CASES)
def test_ids_stay_in_range_whatever_the_logits(routers: Routers, name: str) -> None:
    spec = CASES[name][1]
    random = np.random.default_rng(9)
    rows = [np.full(spec.num_experts, v) for v in EXTREMES]
    rows += [random.choice(EXTREMES, spec.num_experts) for _ in range(60)]
    ids, _ = routers(name, np.array(rows, np.float32))
    assert ids.min() >= 0 and ids.max() < spec.num_experts
    # Where one expert is left the ids of a token are distinct, among experts at -inf as well.
    masked = np.full((8, spec.num_experts), -np.inf, np.float32)
    masked[np.arange(8), random.integers(spec.num_experts, size=8)] = np.arange(8)
    ids, _ = routers(name, masked)
    if spec.groups is None and spec.selection is Selection.TOP_K:
        assert all(len(set(row)) == spec.top_k for row in ids.tolist())


@pytest.mark.parametrize("name", CASES)
def test_a_token_depends_on_itself_alone(routers: Routers, name: str) -> None:
    logits = np.random.default_rng(1).standard_normal((37, CASES[name][1].num_experts))
    logits = logits.astype(np.float32)
    ids, weights = (a.copy() for a in routers(name, logits))
    for threads in (2, 7):
        again = routers(name, logits, threads)
        np.testing.assert_array_equal(again[0], ids)
        np.testing.assert_array_equal(again[1].view("u4"), weights.view("u4"))
    if CASES[name][1].selection is Selection.TOKEN_TABLE:
        return  # its ids do not move with the logits
    back = routers(name, logits[::-1].copy())
    np.testing.assert_array_equal(back[0], ids[::-1])
    np.testing.assert_array_equal(back[1].view("u4"), weights[::-1].view("u4"))
    one = routers(name, logits[11:12].copy())
    np.testing.assert_array_equal(one[1].view("u4"), weights[11:12].view("u4"))


def test_token_ids_outside_the_table(routers: Routers) -> None:
    """Ids of -1, which contribute nothing, and no read outside of the table."""
    _, spec = CASES["token table"]
    token_ids = np.array([-1, 11, 1 << 30, -(1 << 31), 10], np.int32)
    logits = spread(spec.num_experts, len(token_ids), 0)
    ids, weights = routers("token table", logits, token_ids=token_ids)
    assert (ids[:-1] == -1).all() and np.isfinite(weights).all()
    np.testing.assert_array_equal(ids[-1], vectors("token table")["token_table"][10])


@pytest.mark.parametrize("name", ["softmax none", "softmax_selected", "sigmoid none"])
def test_far_apart_logits(routers: Routers, name: str) -> None:
    """Where exp underflows, the first choice and all weights that matter are still right."""
    random = np.random.default_rng(2)
    logits = random.permuted(np.tile(np.linspace(-300, 10, 13), (30, 1)), axis=1).astype("f4")
    ids, weights = routers(name, logits)
    want_ids, want_weights = expected(name, logits)
    np.testing.assert_array_equal(ids[:, 0], want_ids[:, 0])
    assert error(weights, want_weights) <= 1e-5


@settings(max_examples=150, deadline=None, derandomize=True)
@given(name=st.sampled_from(list(CASES)), tokens=st.integers(0, 20), seed=st.integers(0, 2**16))
def test_any_logits(routers: Routers, name: str, tokens: int, seed: int) -> None:
    agree(routers, name, spread(CASES[name][1].num_experts, tokens, seed))


def test_every_value_of_every_field_is_here() -> None:
    """A new variant of RouterSpec must get a case."""
    specs = [spec for _, spec in CASES.values()]
    for field, kind in (
        ("score", Score), ("selection", Selection), ("weight_source", WeightSource),
        ("renorm", Renorm), ("logits_dtype", Precision), ("weights_dtype", Precision),
        ("scale_on", ScaleOn),
    ):  # fmt: skip
        assert {getattr(spec, field) for spec in specs} == set(kind), field
    for flag in ("selection_bias", "per_expert_scale", "global_scale", "always", "groups"):
        assert {bool(getattr(spec, flag)) for spec in specs} == {True, False}, flag
    groups = [spec.groups for spec in specs if spec.groups]
    assert {g.score for g in groups} == set(GroupScore)
    assert {g.masked for g in groups} == set(Masked)
