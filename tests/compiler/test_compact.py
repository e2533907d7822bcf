"""The compact form of bfloat16 panels: what packing writes, read as its description says, and
what kernels compute of panels with few, many and no rare weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st

import moec
from moec.host import missing
from moec.ops import reference
from moec.schedules.cpu import _requires, compact
from moec.schedules.cpu.codegen import compile_module
from moec.schedules.cpu.isa import ISAS
from moec.schedules.cpu.pack import pack_matrix
from moec.schedules.cpu.tiles import Panels
from moec.spec import MoESpec
from moec.target import resolve
from tests.blocks import DTYPES, SCHEDULES, Small, bits, built, error, inputs, random_parameters
from tests.compiler.cases import block, tolerance

Array = np.ndarray[Any, Any]


def packed(weights: Array, gated: bool, target: str = "cpu") -> tuple[Panels, Array]:
    """[N, K] of bfloat16 bits -> the slots [P, words]."""
    rows, cols = weights.shape
    panels = Panels(1, rows, cols, "bfloat16", gated, compact.PANEL, True)
    kernel = pack_matrix("pack", ISAS["avx512-bf16"], panels, True)
    module = compile_module({"pack": kernel.func}, resolve(target))
    out = np.full(panels.shape[1:], -1, np.int32)
    arrays = (tvm_ffi.from_dlpack(a, require_alignment=2) for a in (weights, out))
    module["pack"](*arrays, 2)
    return panels, out.reshape(panels.count, -1)


def expected(weights: Array, panels: Panels) -> Array:
    """[P, 2 depth, 64] of bits: the plain panels."""
    step, cols = panels.step, weights.shape[1]
    plain = np.zeros((panels.count, 2 * panels.depth, compact.PANEL), np.uint16)
    for p in range(panels.count):
        outputs = np.arange(p * step, min((p + 1) * step, panels.outputs))
        plain[p, :cols, : len(outputs)] = weights[outputs].T
        if panels.gated:
            half = slice(step, step + len(outputs))
            plain[p, :cols, half] = weights[outputs + panels.outputs].T
    return plain


def read(slot: Array, depth: int) -> tuple[Array, int]:
    """([2 depth, 64] of bits, number of rare weights or -1) as the description of a slot has it."""
    rare = int(slot[16])
    if rare < 0:
        words = slot[64:].view(np.uint16).reshape(depth, 64, 2)
        return words.transpose(0, 2, 1).reshape(2 * depth, 64), rare
    table = slot[:4].view(np.uint8)
    assert (slot[:16].reshape(4, 4) == slot[:4]).all()
    steps = slot[32 : 32 + 48 * depth].reshape(depth, 3, 16).view(np.uint8)  # [depth, 3, 64]
    codes = steps[:, 2]
    vectors = []
    for half in range(2):
        high = table[(codes >> (4 * half)) & 15].reshape(depth, 4, 2, 8)
        low = steps[:, half].reshape(depth, 4, 2, 8)
        both = low.astype(np.uint16) | high.astype(np.uint16) << 8
        vectors += [both[:, :, n].reshape(depth, 32) for n in range(2)]
    values = np.concatenate(vectors, 1).reshape(depth, 64, 2).transpose(0, 2, 1)
    values = values.reshape(2 * depth, 64).copy()
    behind = slot[32 + 48 * depth :]
    entries = behind[: 2 * rare].reshape(rare, 2)
    assert (np.diff(entries[:, 0]) > 0).all() and not behind[2 * rare :].any()
    stand_in = np.uint16(table[0]) << 8
    for place, more in entries:
        assert values[place // 64, place % 64] == stand_in
        whole = as_float(stand_in) + np.int32(more).view(np.float32).astype(np.float64)
        bits = np.float32(whole).view(np.uint32)
        assert np.float32(whole) == whole and bits & 0xFFFF == 0
        values[place // 64, place % 64] = bits >> 16
    return values, rare


def as_float(bits: Any) -> Any:
    """bfloat16 by its bits, as float64."""
    return (np.asarray(bits, np.uint32) << 16).view(np.float32).astype(np.float64)


def normal(random: np.random.Generator, shape: tuple[int, int]) -> Array:
    values = random.standard_normal(shape, np.float32) * np.float32(0.03)
    raw: Array = values.astype(DTYPES["bfloat16"]).view(np.uint16)
    return raw


def spread(random: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Weights of 2^-17 to 1/4, whose 16 high bytes all occur about as often."""
    values = random.integers(110 << 7, 126 << 7, shape).astype(np.uint16)
    return values | random.integers(0, 2, shape).astype(np.uint16) << 15


def near(random: np.random.Generator, count: int) -> Array:
    """Weights just above or below those: rare among them."""
    large = random.integers(126 << 7, 128 << 7, count)
    small = random.integers(108 << 7, 110 << 7, count)
    return np.where(random.random(count) < 0.7, large, small).astype(np.uint16)


def sprinkled(random: np.random.Generator, shape: tuple[int, int], rare: int, kind: str) -> Array:
    """Weights of which so many are rare, by a little or by any factor."""
    values = spread(random, shape)
    at = random.choice(values.size, min(rare, values.size), replace=False)
    anything = random.integers(0, 0x7F80, at.size)
    values.reshape(-1)[at] = near(random, at.size) if kind == "near" else anything
    return values


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_a_panel_is_what_was_packed(data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 2**16), "seed"))
    gated = data.draw(st.booleans(), "gated")
    rows = data.draw(st.sampled_from((1, 2, 31, 33, 64, 65, 96)), "N") * (2 if gated else 1)
    shape = rows, data.draw(st.sampled_from((1, 2, 3, 16, 31, 100, 257)), "K")
    kind = data.draw(st.sampled_from(("normal", "near", "far", "any", "zero")), "kind")
    if kind == "normal":
        weights = normal(random, shape)
    elif kind == "any":
        weights = random.integers(0, 2**16, shape).astype(np.uint16)
    else:
        most = data.draw(st.integers(0, 2 * compact.most_rare(shape[1])), "rare")
        weights = sprinkled(random, shape, most, kind) * np.uint16(kind != "zero")
    panels, slots = packed(weights, gated)
    plain = expected(weights, panels)
    for p in range(panels.count):
        values, rare = read(slots[p], panels.depth)
        np.testing.assert_array_equal(values, plain[p])
        _, count = np.unique(plain[p] >> 8, return_counts=True)
        others = plain[p].size - np.sort(count)[-16:].sum()
        if others > compact.most_rare(panels.depth):
            assert rare == compact.PLAIN
        else:  # of any bits, one may be lost beside the stand-in
            assert rare == others or (rare == compact.PLAIN and kind in ("any", "far"))


def test_trained_weights_have_the_compact_form() -> None:
    """Normal weights do, at all the widths that a model's matrices have."""
    random = np.random.default_rng(0)
    for cols in (256, 768, 2048, 7168):
        _, slots = packed(normal(random, (128, cols)), False)
        assert (slots[:, compact.COUNT] >= 0).all()


def test_a_machine_without_wide_vectors_packs_too() -> None:
    """Weights for a machine with AVX-512 may be packed on one without, of any architecture."""
    weights = sprinkled(np.random.default_rng(0), (96, 257), 20, "near")
    _, slots = packed(weights, False)
    if missing(_requires(resolve("cpu:x86-64"))) is None:
        np.testing.assert_array_equal(packed(weights, False, "cpu:x86-64")[1], slots)
    panels = Panels(1, 96, 257, "bfloat16", False, compact.PANEL, True)
    kernel = pack_matrix("pack", ISAS["avx512-bf16"], panels, True)
    assert compile_module({"pack": kernel.func}, resolve("cpu:aarch64")).inspect_source("asm")


def forms(spec: MoESpec, seed: int) -> dict[str, Array]:
    """Parameters whose expert 0 has no rare weights, 1 a few in every panel, 2 far too many."""
    parameters = random_parameters(spec, seed)
    random = np.random.default_rng(seed)
    for name in ("gate_up", "down"):
        weights = spread(random, parameters[name].shape)
        _, rows, cols = weights.shape
        # Of few rows one, at either end of K or in between; so large mostly that one which is
        # lost, or at another place, changes the result by much.
        for row in range(0, rows, 13):
            weights[1, row, random.choice((0, cols - 1, random.integers(cols)))] = near(random, 1)[
                0
            ]
        many = random.random(weights[2].shape) < 0.2
        weights[2][many] = random.integers(90 << 7, 128 << 7, many.sum())
        parameters[name] = weights.view(DTYPES["bfloat16"])
    return parameters


def test_parameters_have_all_forms() -> None:
    spec = block("bfloat16", 3, 2, *SIZES[0])
    for name, gated in (("gate_up", True), ("down", False)):
        for expert, weights in enumerate(forms(spec, 0)[name]):
            rare = packed(np.ascontiguousarray(weights).view(np.uint16), gated)[1][:, 16]
            assert ((rare == 0, rare > 0, rare == compact.PLAIN)[expert]).all(), (name, rare)


# (H, I): the second cuts K of `down` into blocks, the third has a K that is odd.
SIZES = ((256, 96), (64, 2688), (130, 33))
MIXED = (("gate_up", "bfloat16"), ("down", "bfloat16"))


CASES = [
    (block("bfloat16", 3, 2, *SIZES[0]), SCHEDULES),
    (block("bfloat16", 3, 2, *SIZES[1]), ("fused",)),
    (block("bfloat16", 3, 2, *SIZES[2]), ("fused",)),
    (block("float32", 3, 2, *SIZES[0], weight_dtypes=MIXED), ("fused",)),
]


TARGETS = [("cpu:znver4", CASES), ("cpu:x86-64-v4", CASES[1:3])]


@pytest.mark.parametrize(("target", "cases"), TARGETS)
def test_kernels(target: str, cases: list[tuple[MoESpec, tuple[str, ...]]], tmp_path: Path) -> None:
    if reason := missing(_requires(resolve(target))):
        pytest.skip(f"needs AVX-512: {reason}")
    blocks = [Small(spec, own, n, forms(spec, n)) for n, (spec, own) in enumerate(cases)]
    made = built(blocks, tmp_path, target)
    both = made.load(threads=2)
    for n, small in enumerate(made.blocks):
        for schedule in small.schedules:
            compare(small, made.loaded[n], both[n], schedule)


def compare(small: Small, one: moec.Block, two: moec.Block, schedule: str) -> None:
    for tokens in (1, 2, 3, 7, 40):
        for expert in (None, 0, 1, 2):
            x, ids, weights = inputs(small.spec, tokens, tokens)
            if expert is not None:
                ids[:] = expert
            y = one.experts(x, ids, weights, schedule=schedule)
            want = reference.experts(small.spec, small.parameters, x, ids, weights)
            assert error(y, want) <= tolerance(small.spec), (schedule, tokens, expert)
            again = two.experts(x, ids, weights, schedule=schedule)
            np.testing.assert_array_equal(bits(y), bits(again))
            # Neither does the form of a panel depend on how many rows are multiplied by it.
            if tokens > 2:
                part = one.experts(x[-2:], ids[-2:], weights[-2:], schedule=schedule)
                np.testing.assert_array_equal(bits(part), bits(y[-2:]))
