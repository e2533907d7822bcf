"""From functions to a shared library for a CPU: LLVM through TVM, then the system's linker.

The code is generated for the instruction set and not for a model of CPU, so that what the
artifact requires of a machine is exactly what the code may contain.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes

from ...target import Target
from ..linking import find_linker, link
from . import launcher
from .isa import ISAS

_PIPELINE = "moec_cpu"


def llvm_target(target: Target) -> tvm.target.Target:
    """The TVM target that generates code for `target`'s instruction set."""
    isa = ISAS[target.isa]
    described: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "mcpu": isa.mcpu}
    if isa.mattr:
        described["mattr"] = list(isa.mattr)
    return tvm.target.Target(described)


def compile_module(functions: Mapping[str, Any], target: Target) -> Any:
    """A runtime module of the functions; callable in this process when `target` runs here."""
    # A private name in TVM's own table, which is the only way in for a pipeline; set again
    # with the same value it changes nothing.
    tvm.tirx.register_tir_pipeline(_PIPELINE, _pipeline)
    module = tvm.IRModule(dict(functions))
    return tvm.tirx.build(module, target=llvm_target(target), pipeline=_PIPELINE)


def _pipeline() -> tuple[Any, Any, Any]:
    """The lowering passes that these kernels need, a fifth of what TVM runs by default.

    The kernels have no blocks, threads or shared memory, their vectors are written as
    vectors, and their loops as they should be; the omitted passes took most of the time.
    """

    def lower(module: tvm.IRModule, _: Any) -> tvm.IRModule:
        passes = (
            tirx.transform.FlattenBuffer(),
            tirx.transform.StmtSimplify(),
            tirx.transform.RemoveNoOp(),
            tirx.transform.CommonSubexprElim(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
            # An entry compares the dtype of a tensor with bfloat16; a pointer to it ends LLVM.
            tirx.transform.BF16StorageLegalize(),
        )
        return tvm.transform.Sequential(passes)(module)

    own = tvm.transform.module_pass(lower, opt_level=0, name="moec.LowerCpu")
    return own, finalize_host_passes, finalize_device_passes


def build(functions: Mapping[str, Any], target: Target, path: Path) -> None:
    """Compile the functions and link them into the shared library `path`.

    Raises TargetError when no linker for the target is installed, or the linker fails.
    """
    find_linker(target)  # before the code is generated
    link(compile_module(functions, target), target, path, [launcher.SOURCE])
