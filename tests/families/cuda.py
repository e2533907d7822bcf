"""Every block of every family has CUDA kernels: lowered for Hopper, without compiling them.

What they compute is checked on a GPU (tests/gpu), that such kernels compile in
tests/schedules/test_cuda.py. Kernels of equal sizes are built once for all families.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from moec import target
from moec.compiler.instruments import Observer
from moec.compiler.lower import lower
from moec.compiler.options import CompileOptions
from moec.schedules import backend, choose
from moec.schedules.buffers import Kernel
from moec.schedules.program import Lowering
from moec.spec import MoESpec

_made: dict[tuple[Any, ...], Kernel] = {}


def lowers(spec: MoESpec) -> None:
    """Lower a block as it is, and in bfloat16 on tensor cores where its widths allow that."""
    hopper, own = target.resolve("cuda:sm_90a"), backend("cuda")
    wide = dataclasses.replace(spec, dtype="bfloat16", weight_dtypes=())
    tensor = own.schedules["mma16"].supports(wide, hopper) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lowering, "kernel", _shared(Lowering.kernel))
        for one, names in ((spec, ("fused", "loop")), (wide, ("mma16" if tensor else "plain",))):
            chosen = choose(own, names, one, hopper)
            made = lower("b0", one, hopper, own, chosen, Observer(CompileOptions()), None)
            assert {*made.variants} == {"route", "experts", "moe"}
            for variants in made.variants.values():
                assert [v.schedule.name for v in variants] == [s.name for s, _ in chosen]


def _shared(kernel: Callable[..., Kernel]) -> Callable[..., Kernel]:
    def get(self: Any, role: str, key: tuple[Any, ...], make: Callable[[str], Kernel]) -> Kernel:
        def once(symbol: str) -> Kernel:
            # A loop over experts names other kernels, which have to be there as well.
            if role == "loop":
                return make(symbol)
            # What is the same in one block is not part of a kernel's key.
            whole = (symbol, role, key, self.spec.dtype, self.spec.experts)
            if whole not in _made:
                _made[whole] = make(symbol)
            return _made[whole]

        return kernel(self, role, key, once)

    return get
