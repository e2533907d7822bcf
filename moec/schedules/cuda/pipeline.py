"""Lower PrimFuncs of CUDA kernels and of host entries; programmatic dependent launch.

The front end has no switch for programmatic dependent launch: the runtime reads a tag among
a device function's launch parameters, which this pipeline puts there for every kernel that
`dependent` names.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline as stock

_DEPENDENT = "tirx.use_programtic_dependent_launch"  # the runtime's own spelling
_PARAMS = "tirx.kernel_launch_params"
_SUFFIX = "_kernel"


def build(module: tvm.IRModule, arch: str, dependent: Collection[str]) -> Any:
    """Compile kernels and host entries into one executable (tvm.runtime.Executable).

    Call inside `toolchain.compiling(arch)`.
    """
    target = tvm.target.Target({"kind": "cuda", "arch": arch}, host="llvm")
    stock.register_tir_pipeline("moec.cuda", lambda: _pipeline(frozenset(dependent)))
    with target:
        return tvm.compile(module, target=target, tir_pipeline="moec.cuda")


def _pipeline(dependent: frozenset[str]) -> tuple[Any, Any, Any]:
    base, finish_host, finish_device = stock.tirx_pipeline()

    def transform(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        module = base(module)
        out = {}
        for var, function in module.functions.items():
            name = var.name_hint
            if name.endswith(_SUFFIX) and name.removesuffix(_SUFFIX) in dependent:
                function = _tagged(function)
            out[var] = function
        return tvm.IRModule(out, attrs=module.attrs)

    whole = tvm.transform.module_pass(transform, opt_level=0, name="moec.CudaPipeline")
    return whole, finish_host, finish_device


def _tagged(function: tirx.PrimFunc) -> tirx.PrimFunc:
    # The tag goes first: the runtime wants the shared-memory tag to stay the last one.
    params = [str(p) for p in function.attrs[_PARAMS]]
    return function.with_attr(_PARAMS, [_DEPENDENT, *params])
