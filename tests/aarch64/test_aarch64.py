"""Kernels for aarch64: cross-compiled, linked, run by QEMU, compared with float64 NumPy.

What needs neither QEMU nor a cross compiler is in tests/compiler/test_compile.py: that the code
is generated, has the instructions that it should, and no others.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moec.ops import reference
from tests.aarch64.emulator import Emulator, missing
from tests.blocks import Small, build, error, inputs
from tests.compiler.cases import CASES, FUSED, GATHER, LOOP, TOLERANCE, tolerance

TOKENS = (1, 2, 7, 13)
# (target, CPU that QEMU emulates, blocks with the schedules that they are compiled with). The
# first CPU is of Armv8.0: an instruction that came later would stop it.
MACHINES = {
    "cpu:aarch64": ("cortex-a57", {"all experts": LOOP, "bfloat16": GATHER, "float16": FUSED}),
    "cpu:armv8.6-a": ("max", {"bfloat16": (*FUSED, *GATHER), "mixed dtypes": FUSED}),
}

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulator"))


@pytest.mark.parametrize("target", MACHINES)
def test_blocks(emulator: Emulator, tmp_path: Path, target: str) -> None:
    cpu, wanted = MACHINES[target]
    blocks = [replace(CASES[name], schedules=schedules) for name, schedules in wanted.items()]
    path = tmp_path / "cross.moec"
    blocks = build(blocks, path, target)
    cells = [(n, s, t) for n, b in enumerate(blocks) for s in b.schedules for t in TOKENS]
    given = {cell: inputs(blocks[cell[0]].spec, cell[2], cell[2]) for cell in cells}
    calls = [
        (n, name, schedule, given[n, schedule, t][: 1 if name != "experts" else 3])
        for n, schedule, t in cells
        for name in ("experts", "route", "moe")
    ]
    results = emulator.call(path, cpu, calls)
    for number, (n, schedule, t) in enumerate(cells):
        check(blocks[n], given[n, schedule, t], results[3 * number : 3 * number + 3])


def check(small: Small, given: tuple[np.ndarray, ...], results: list[list[np.ndarray]]) -> None:
    """Results of experts, route and moe against the reference."""
    spec, parameters = small.spec, small.parameters
    (experts,), route, (moe,) = results
    allowed = tolerance(spec)
    assert error(experts, reference.experts(spec, parameters, *given)) <= allowed
    want_ids, want_weights = reference.route(spec, parameters, given[0])
    np.testing.assert_array_equal(route[0], want_ids)
    assert error(route[1], want_weights) <= TOLERANCE["float32"]
    assert error(moe, reference.moe(spec, parameters, given[0], tuple(route))) <= allowed
