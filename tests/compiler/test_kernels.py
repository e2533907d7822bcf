"""The CPU kernels, block by block, against float64 NumPy: sizes, dtypes, biases, norms, T.

All blocks are compiled once a session; what errors are allowed is said in `cases`.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec.host import missing
from moec.ops import reference
from moec.schedules.cpu import _requires
from moec.target import CPUS, resolve
from tests.blocks import Built, Small, bits, built, error, inputs
from tests.compiler.cases import CASES, FUSED, GATHER, LOOP, PAIRS, TOLERANCE, block, tolerance

TOKENS = (0, 1, 2, 5, 6, 7, 13, 40)  # below, at and above the rows of a register tile


# Targets of the instruction sets below this machine's own, which `cpu` covers.
LOWER = [
    f"cpu:{name}"
    for name in ("x86-64", "x86-64-v3", "x86-64-v4", "aarch64")
    if CPUS[name][1] != resolve("cpu").isa and missing(_requires(resolve(f"cpu:{name}"))) is None
]


@pytest.fixture(scope="module", params=LOWER)
def lower(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Some of the blocks for a lower instruction set."""
    wanted = (("bfloat16", FUSED), ("all experts", LOOP), ("float16", GATHER))
    if request.param != LOWER[0]:  # others have little of their own, and codegen takes seconds
        wanted = wanted[:1]
    chosen = [replace(CASES[name], schedules=schedules) for name, schedules in wanted]
    return built(chosen, tmp_path_factory.mktemp("lower"), request.param)


def check(small: Small, block: moec.Block, tokens: int, schedule: str, outside: bool) -> None:
    """experts, route and moe of one block against the reference."""
    spec, parameters = small.spec, small.parameters
    allowed = tolerance(spec)
    x, ids, weights = inputs(spec, tokens, tokens)
    if outside:
        ids[::2, -1] = -1
        ids[1::3, 0] = spec.experts.num_experts  # a zero expert, where there are any
    y = block.experts(x, ids, weights, schedule=schedule)
    want = reference.experts(spec, parameters, x, ids, weights)
    assert y.dtype == x.dtype and y.shape == x.shape
    assert error(y, want) <= allowed, "experts"
    got = block.route(x, schedule=schedule)
    want_ids, want_weights = reference.route(spec, parameters, x)
    np.testing.assert_array_equal(got[0], want_ids)
    # Routing is computed in float32; only a norm before the router rounds its input.
    rounded = TOLERANCE[spec.dtype if spec.norms.router_input else "float32"]
    assert error(got[1], want_weights) <= rounded, "route"
    want = reference.moe(spec, parameters, x, got)
    assert error(block(x, schedule=schedule), want) <= allowed, "moe"


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_block(cpu: Built, name: str, schedule: str) -> None:
    n = list(CASES).index(name)
    for tokens in TOKENS:
        check(cpu.blocks[n], cpu.loaded[n], tokens, schedule, outside=tokens % 2 == 1)


def test_a_lower_instruction_set(lower: Built) -> None:
    assert lower.models[0].target.replace("-", ":", 1) in LOWER
    for n, small in enumerate(lower.blocks):
        for schedule in small.schedules:
            for tokens in (0, 1, 7):
                check(small, lower.loaded[n], tokens, schedule, outside=False)


# Around the lanes and panels of every instruction set; drawn, not chosen by who knows them.
SIZES = st.one_of(st.integers(1, 9), st.sampled_from((15, 17, 31, 33, 63, 65, 127, 129)))


@settings(max_examples=3, deadline=None, derandomize=True)
@given(data=st.data())
def test_sizes_that_fit_no_tile(data: st.DataObject) -> None:
    """Any E, K, H and I, for all instruction sets that run here."""
    experts = data.draw(st.integers(1, 4), "E")
    top_k = data.draw(st.sampled_from((1, experts)), "K")
    dtype = data.draw(st.sampled_from(("float32", "bfloat16", "float16")), "dtype")
    spec = block(dtype, experts, top_k, data.draw(SIZES, "H"), data.draw(SIZES, "I"))
    schedule = data.draw(st.sampled_from((FUSED, GATHER, LOOP)), "schedule")
    target = data.draw(st.sampled_from(["cpu", *LOWER]), "target")
    with tempfile.TemporaryDirectory() as folder:
        made = built([Small(spec, schedule)], Path(folder), target)
        for tokens in (1, 5, 14):
            check(made.blocks[0], made.loaded[0], tokens, schedule[0], outside=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_pass_a_panel_in_pieces(dtype: str, tmp_path: Path) -> None:
    """All rows on one expert: one, two, three and four tiles of them, K in pieces and a rest."""
    spec = block(dtype, 1, 1, 200, 328, gate_up_bias=True, down_bias=True)
    made = built([Small(spec, FUSED)], tmp_path)
    for tokens in (6, 7, 12, 13, 18, 19):
        check(made.blocks[0], made.loaded[0], tokens, FUSED[0], outside=False)
    x, ids, weights = inputs(spec, 19, 5)
    whole = everything(made.loaded[0], x, ids, weights, FUSED[0])
    for cuts in ((0, 6, 19), (0, 7, 14, 19), (0, 18, 19)):
        for part in map(slice, cuts, cuts[1:]):
            some = everything(made.loaded[0], x[part], ids[part], weights[part], FUSED[0])
            for got, want in zip(some, whole, strict=True):
                np.testing.assert_array_equal(got, want[part], f"tokens {part}")


@st.composite
def routings(draw: st.DrawFn) -> tuple[tuple[str, str], int, int, list[int]]:
    """((case, schedule), T, seed, ids to choose from: some of -2 to E + 1)."""
    pair = draw(st.sampled_from(PAIRS))
    # Few experts or many: all tokens on one of them is a case of its own.
    some = st.integers(-2, CASES[pair[0]].spec.experts.num_experts + 1)
    pool = draw(st.lists(some, min_size=1, max_size=6))
    return pair, draw(st.integers(0, 30)), draw(st.integers(0, 2**16)), pool


@settings(max_examples=120, deadline=None, derandomize=True)
@given(drawn=routings())
def test_any_routing(cpu: Built, drawn: tuple[tuple[str, str], int, int, list[int]]) -> None:
    (name, schedule), tokens, seed, pool = drawn
    n = list(CASES).index(name)
    spec, parameters = cpu.blocks[n].spec, cpu.blocks[n].parameters
    x, ids, weights = inputs(spec, tokens, seed)
    ids = np.random.default_rng(seed).choice(pool, ids.shape).astype(np.int32)
    y = cpu.loaded[n].experts(x, ids, weights, schedule=schedule)
    want = reference.experts(spec, parameters, x, ids, weights)
    assert error(y, want) <= tolerance(spec)


def everything(block: moec.Block, x: Any, ids: Any, weights: Any, schedule: str) -> list[Any]:
    """The bits of all that a block gives."""
    chosen = block.route(x, schedule=schedule)
    arrays = (block(x, schedule=schedule), *chosen,
              block.experts(x, ids, weights, schedule=schedule))  # fmt: skip
    return [bits(a) for a in arrays]


@pytest.fixture(scope="module")
def others(cpu: Built) -> dict[int, list[moec.Block]]:
    """The same blocks with other numbers of threads, more than there are cores among them."""
    return {threads: cpu.load(threads=threads) for threads in (2, 7)}


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_bits_depend_on_the_token_alone(
    cpu: Built, others: dict[int, list[moec.Block]], name: str, schedule: str
) -> None:
    """Not on the number of threads, on the other tokens, or on the place in the batch."""
    n, order = list(CASES).index(name), np.random.default_rng(3).permutation(23)
    x, ids, weights = inputs(cpu.blocks[n].spec, 23, 11)
    whole = everything(cpu.loaded[n], x, ids, weights, schedule)
    for threads, other in others.items():
        for got, want in zip(everything(other[n], x, ids, weights, schedule), whole, strict=True):
            np.testing.assert_array_equal(got, want, f"{threads} threads")
    permuted = everything(cpu.loaded[n], x[order], ids[order], weights[order], schedule)
    for got, want in zip(permuted, whole, strict=True):
        np.testing.assert_array_equal(got, want[order], "permuted")
    for first, last in ((0, 1), (1, 9), (9, 23)):
        part = slice(first, last)
        parts = everything(cpu.loaded[n], x[part], ids[part], weights[part], schedule)
        for got, want in zip(parts, whole, strict=True):
            np.testing.assert_array_equal(got, want[part], f"tokens {part}")


@pytest.mark.parametrize(("name", "schedule"), PAIRS)
def test_nan_stays_in_its_token(cpu: Built, name: str, schedule: str) -> None:
    """NaN in a token is neither lost nor spread, whatever the activation."""
    n = list(CASES).index(name)
    x, ids, weights = inputs(cpu.blocks[n].spec, 9, 2)
    clean = cpu.loaded[n].experts(x, ids, weights, schedule=schedule)
    x[4] = np.nan
    y = cpu.loaded[n].experts(x, ids, weights, schedule=schedule)
    assert np.isnan(y[4].astype(np.float32)).all()
    np.testing.assert_array_equal(bits(np.delete(y, 4, 0)), bits(np.delete(clean, 4, 0)))
