"""From functions to a shared library for a CPU: LLVM through TVM, then the system's linker.

The code is generated for the instruction set and not for a model of CPU, so that what the
artifact requires of a machine is exactly what the code may contain.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import finalize_device_passes, finalize_host_passes

from ...errors import TargetError
from ...target import Target
from . import launcher
from .isa import ISAS

# A linker by the architecture that it links for; the system's own compiler links for itself.
_CROSS = {"aarch64": "aarch64-linux-gnu-gcc", "x86_64": "x86_64-linux-gnu-gcc"}
_OWN = ("cc", "gcc", "clang")
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
    linker = find_linker(target)
    module = compile_module(functions, target)
    try:
        link(module, path, linker)
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"linking for {target.name} failed: {_last_words(str(error))}",
            where=linker,
            need="a C compiler that links shared libraries",
        ) from None


def link(module: Any, path: Path, linker: str) -> None:
    """Write the shared library of a compiled module, and the launcher of its loops with it.

    Raises RuntimeError or OSError where the linker fails.
    """
    source = path.with_suffix(".c")
    source.write_text(launcher.SOURCE)
    try:
        options = ["-s", "-O2", "-fvisibility=hidden", str(source)]
        module.export_library(str(path), cc=linker, options=options)
    finally:
        source.unlink()


def _last_words(text: str) -> str:
    """The last line that a linker wrote, without the command line that TVM puts after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith(("Command line:", "Compilation error"))]
    return (said or lines or ["it said nothing"])[-1]


def find_linker(target: Target) -> str:
    """The compiler driver that links for `target`; TargetError when there is none."""
    names = _OWN if target.runs_here else (_CROSS[target.arch],)
    for name in names:
        if shutil.which(name):
            return name
    raise TargetError(
        f"no linker for {target.name} was found",
        need=" or ".join(names),
        hint="install a C compiler, for instance the Debian package "
        + ("gcc" if target.runs_here else f"gcc-{target.arch.replace('_', '-')}-linux-gnu"),
    )
