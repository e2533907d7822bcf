"""Bugs planted into moec's own kernels: each is caught by a check or by a wrong result."""

from __future__ import annotations

import numpy as np
import pytest

from moec.ops import reference
from moec.schedules.metal import kernel, source
from moec.spec import ExpertsSpec, MoESpec, RouterSpec
from tests.metal.block import Block, error

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
# name -> (file, what is there, what takes its place, which occurrence, words of the error)
BUGS = {
    "no barrier before a tile is staged again": ("tiles", BARRIER, "", 1, "race"),
    "no barrier between staging and product": ("tiles", BARRIER, "", 2, "race"),
    "no barrier before the result replaces the tiles": ("tiles", BARRIER, "", 3, "race"),
    "no barrier before the result is read": ("tiles", BARRIER, "", 4, "race"),
    "no barrier after the search of the tile": ("tiles", BARRIER, "", 0, "race"),
    "weight columns without a guard": ("tiles", "if (column < columns) {", "{", 0, "out of bounds"),
    "tiles without a guard of the grid": ("tiles", "if (e < 0) return;", "", 0, "out of bounds"),
    "the weight tile not transposed": (
        "tiles", "8, ulong2(0), true", "8, ulong2(0), false", 0, None,
    ),
    "rows of another expert": ("tiles", "e * stride * width", "0", 0, None),
    "parts of the result mixed up": (
        "tiles", "part * (C::PART / 8) + i", "i", 0, None,
    ),
    "a part of the result that is left out": (
        "tiles", "if (before >= rows) continue;", "if (part > 1) continue;", 0, None,
    ),
    "rows beyond those of a small tile not staged": (
        "tiles", "if (tid < C::ROWS) {", "if (tid < 32) {", 0, None,
    ),
    "the end of a row without a guard": ("tiles", "if (left > 0) {", "{", 0, "out of bounds"),
    "a barrier in a divergent branch": (
        "tiles", "  threadgroup_barrier(mem_flags::mem_threadgroup);  // the operands",
        "  if (tid < 64) threadgroup_barrier(mem_flags::mem_threadgroup);  //", 0,
        "divergence|race",
    ),
    "no barrier before the input is staged again": ("vector", BARRIER, "", 0, "race"),
    "no barrier after the input is staged": ("vector", BARRIER, "", 1, "race"),
    "rows of the weight without a guard": (
        "vector", "first + r < columns ? long(first + r) * width : -1", "long(first + r) * width",
        0, "out of bounds",
    ),
    "a SIMD sum in a divergent branch": (
        "sort", "place += simd_sum(mine);", "if (mine != 0) place += simd_sum(mine);", 0,
        "divergence",
    ),
    "the sort forgets what it placed": (
        "sort", "place += simd_sum(mine);", "", 0, "out of bounds",
    ),
    "no barrier after an expert is taken": (
        "route", "simdgroup_barrier(mem_flags::mem_threadgroup);", "", 1, "race",
    ),
    "a row's end without a guard": (
        "rows", "if (column >= width) return;", "", 0, "out of bounds",
    ),
}  # fmt: skip
# Tokens of a schedule; with 97 experts have more rows than the result has in threadgroup memory
# at a time.
TOKENS = {"tiles32": 37, "tiles64": 97, "gather": 3}
# A schedule that runs the kernels of a file.
RUNS = {"tiles": "tiles64", "vector": "gather", "sort": "tiles32", "route": "gather",
        "rows": "tiles32"}  # fmt: skip
SPEC = MoESpec("float32", RouterSpec(5, 2), ExpertsSpec(5, 2, 44, 20))


def planted(text: str, old: str, new: str, nth: int) -> str:
    """The text with the nth occurrence of `old` replaced."""
    parts = text.split(old)
    assert len(parts) > nth + 1, "the kernel changed: plant the bug anew"
    return old.join(parts[: nth + 1]) + new + old.join(parts[nth + 1 :])


def outcome(*schedules: str) -> float:
    """The largest error of the schedules; raises what the device raises."""
    block, random = Block(SPEC, schedules, ("route", "experts")), np.random.default_rng(4)
    worst = 0.0
    for schedule in schedules:
        tokens = TOKENS[schedule]
        x = random.normal(size=(tokens, 44)).astype(np.float32)
        routing = block.run("route", schedule, x=x)
        y = block.run("experts", schedule, x=x, **routing)["y"]
        want = reference.experts(SPEC, block.parameters, x, *routing.values())
        got = error(y, want)
        worst = np.inf if np.isnan(got) else max(worst, got)
    return float(worst)


def test_the_kernels_as_they_are_pass() -> None:
    assert outcome(*TOKENS) <= 2e-6


@pytest.mark.parametrize("name", BUGS)
def test_planted_bugs_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file, old, new, nth, words = BUGS[name]
    text = planted(source.part(file), old, new, nth)
    monkeypatch.setattr(kernel, "part", lambda p: text if p == file else source.part(p))
    if words is not None:
        with pytest.raises(RuntimeError, match=words):
            outcome(RUNS[file])
    else:
        assert outcome(RUNS[file]) > 1e-3
