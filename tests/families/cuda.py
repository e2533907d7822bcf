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


def lowers(spec: MoESpec, dtype: str) -> None:
    """Lower a block with weights of a dtype; bfloat16 on tensor cores where its widths allow."""
    hopper, own = target.resolve("cuda:sm_90a"), backend("cuda")
    one = dataclasses.replace(spec, dtype=dtype, weight_dtypes=())
    name = "mma16" if own.schedules["mma16"].supports(one, hopper) is None else "plain"
    chosen = choose(own, (name,), one, hopper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lowering, "kernel", _shared(Lowering.kernel))
        made = lower("b0", one, hopper, own, chosen, Observer(CompileOptions()), None)
    assert {*made.variants} == {"route", "experts", "moe"}
    assert all([v.schedule.name for v in vs] == [name] for vs in made.variants.values())


def _shared(kernel: Callable[..., Kernel]) -> Callable[..., Kernel]:
    def get(self: Any, role: str, key: tuple[Any, ...], make: Callable[[str], Kernel]) -> Kernel:
        # What is the same in one block is not part of a kernel's key.
        whole = (role, key, self.spec.dtype, self.spec.experts.num_experts, self.spec.experts.top_k)

        def once(symbol: str) -> Kernel:
            if whole not in _made:
                _made[whole] = make(symbol)
            made = _made[whole]
            return dataclasses.replace(
                made, symbol=symbol, func=made.func.with_attr("global_symbol", symbol)
            )

        return kernel(self, role, key, once)

    return get
