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

from ...errors import TargetError
from ...target import Target
from .isa import ISAS

# A linker by the architecture that it links for; the system's own compiler links for itself.
_CROSS = {"aarch64": "aarch64-linux-gnu-gcc", "x86_64": "x86_64-linux-gnu-gcc"}
_OWN = ("cc", "gcc", "clang")


def llvm_target(target: Target) -> tvm.target.Target:
    """The TVM target that generates code for `target`'s instruction set."""
    isa = ISAS[target.isa]
    described: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple, "mcpu": isa.mcpu}
    if isa.mattr:
        described["mattr"] = list(isa.mattr)
    return tvm.target.Target(described)


def compile_module(functions: Mapping[str, Any], target: Target) -> Any:
    """A runtime module of the functions; callable in this process when `target` runs here."""
    return tvm.tirx.build(tvm.IRModule(dict(functions)), target=llvm_target(target))


def build(functions: Mapping[str, Any], target: Target, path: Path) -> None:
    """Compile the functions and link them into the shared library `path`.

    Raises TargetError when no linker for the target is installed, or the linker fails.
    """
    linker = find_linker(target)
    module = compile_module(functions, target)
    try:
        module.export_library(str(path), cc=linker, options=["-s"])
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"linking for {target.name} failed: {str(error).strip().splitlines()[-1]}",
            where=linker,
            need="a C compiler that links shared libraries",
        ) from None


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
