"""Activations on vectors: every function, clamp and offset, with and without gate.

One tiny kernel for each, all in one library. Tolerance: exp is right to 3e-7 relative and erf
to 2e-7 absolute (both stated in emit.py), float32 products round at 6e-8 each; an error of erf
is multiplied by the gate.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tvm_ffi

from moec import target
from moec.artifact import aligned
from moec.ops import reference
from moec.schedules.buffers import Buf, PerToken
from moec.schedules.cpu.activate import activate
from moec.schedules.cpu.codegen import compile_module
from moec.schedules.cpu.emit import Emit, i64
from moec.schedules.cpu.isa import ISAS
from moec.schedules.cpu.kernel import build, loop
from moec.spec import ActivationSpec, Clamp, Nonlinearity

LIMIT = 2.5
SPECS = {
    f"{kind.value}-{clamp.value}-{alpha}-{offset}": ActivationSpec(
        kind, alpha, clamp, LIMIT if clamp is not Clamp.NONE else 0.0, offset
    )
    for kind in Nonlinearity
    for clamp in Clamp
    for alpha, offset in ((1.0, 0.0), (1.702, 1.0))
    if alpha == 1.0 or kind is Nonlinearity.SILU
}
SPECS |= {
    "silu-capped": ActivationSpec(gate_cap=3.0, up_cap=2.0),
    "silu-capped-alpha": ActivationSpec(alpha=1.5, gate_cap=0.7),
    "relu2-capped": ActivationSpec(Nonlinearity.RELU2, up_cap=5.0, up_offset=1.0),
}
KINDS = [(name, gated) for name in SPECS for gated in (True, False)]
Kernels = Callable[[str, bool, Any, Any], np.ndarray[Any, Any]]


def _kernel(symbol: str, spec: ActivationSpec, gated: bool) -> Any:
    isa = ISAS[target.resolve("cpu").isa]
    args = tuple(Buf(n, (PerToken(), isa.lanes), "float32") for n in ("gate", "up", "y"))

    def body(em: Emit, b: SimpleNamespace, tokens: Any, threads: Any) -> None:
        with loop(tokens) as t:
            gate = em.load(b.gate, [t, i64(0)], "float32")
            up = em.load(b.up, [t, i64(0)], "float32") if gated else None
            em.store(b.y, activate(em, spec, gate, up), [t, i64(0)], "float32")

    return build(symbol, isa, args, body).func


@pytest.fixture(scope="module")
def run() -> Kernels:
    """run(name of a spec, gated, gate, up) -> y, on the machine."""
    one = target.resolve("cpu")
    lanes = ISAS[one.isa].lanes
    symbols = {pair: f"act{n}" for n, pair in enumerate(KINDS)}
    module = compile_module(
        {s: _kernel(s, SPECS[name], gated) for (name, gated), s in symbols.items()}, one
    )

    def call(name: str, gated: bool, gate: Any, up: Any) -> np.ndarray[Any, Any]:
        rows = -(-len(gate) // lanes)
        arrays = [aligned((rows, lanes), "float32") for _ in range(3)]
        for array, values in zip(arrays, (gate, up), strict=False):
            array[...] = 0
            array.reshape(-1)[: len(gate)] = values
        module[symbols[name, gated]](*map(tvm_ffi.from_dlpack, arrays), rows, 1)
        return arrays[2].reshape(-1)[: len(gate)].copy()

    return call


def values() -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Gates dense around 0 and far out, the limit and its neighbours; ups of both signs."""
    limit = np.float32(LIMIT)
    edges = [np.nextafter(limit, np.float32(s)) for s in (0, 9)] + [limit, -limit]
    gate = np.concatenate(
        [np.linspace(-12, 12, 3001), np.logspace(-30, 4, 200), -np.logspace(-30, 4, 200),
         [0.0, -0.0, 1e4, -1e4], edges]
    ).astype(np.float32)  # fmt: skip
    up = np.random.default_rng(0).permutation(gate)
    return gate, up


@pytest.mark.parametrize(("name", "gated"), KINDS)
def test_values(run: Kernels, name: str, gated: bool) -> None:
    gate, up = values()
    got = run(name, gated, gate, up).astype(np.float64)
    row = np.stack([gate, up], 1) if gated else gate[:, None]
    want = reference.activation(SPECS[name], row.astype(np.float64), gated)[:, 0]
    scale = np.abs(gate.astype(np.float64)) * (np.abs(up) + 1.0 if gated else 1.0)
    scale = scale**2 if "relu2" in name else scale
    assert np.isfinite(got).all()
    np.testing.assert_array_less(np.abs(got - want), 1e-6 * np.abs(want) + 3e-7 * scale + 1e-37)


@pytest.mark.parametrize(("name", "gated"), KINDS)
def test_nan_and_infinity(run: Kernels, name: str, gated: bool) -> None:
    """NaN stays NaN; +inf is finite where there is a limit; no function turns -inf into +inf."""
    bad = np.array([np.nan, 1.0, np.inf, -np.inf], np.float32)
    good = np.array([1.0, np.nan, 1.0, 1.0], np.float32)
    got = run(name, gated, bad, good)
    assert np.isnan(got[0]) and (np.isnan(got[1]) if gated else np.isfinite(got[1]))
    spec = SPECS[name]
    if spec.clamp is Clamp.NONE and spec.gate_cap is None:
        assert got[2] == np.inf
    else:
        assert np.isfinite(got[2])
    assert not got[3] > 0
