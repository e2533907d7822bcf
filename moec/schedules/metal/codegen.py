"""From functions to a library: host code by LLVM, kernels as MSL text inside of it.

TVM generates one text for each kernel. Before a text is stored, the part of moec's MSL library
that the kernel calls is put in front of it, by the callback that TVM has for this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi

from ...errors import TargetError
from ...target import Target
from . import macho
from .kernel import MSL, function_name

_CALLBACK = "tvm_callback_metal_compile"
_HEAD = "using namespace metal;\n"
_KERNEL = re.compile(r"\bkernel void (\w+?)_kernel(?:_\d+)?\(")
_CALL = re.compile(r"^\s*(moec_body(?:_\d+)?)\(", re.M)


def metal_target(target: Target) -> tvm.target.Target:
    """TVM's target: SIMD groups of 32, 1024 threads, 32 KB (its own defaults are smaller, and
    its default width of 16 makes wrong cross-thread reductions)."""
    host: dict[str, Any] = {"kind": "llvm", "mtriple": target.triple}
    if target.os == "macos":
        host["mcpu"] = "apple-m1"
    return tvm.target.Target(
        {
            "kind": "metal",
            "thread_warp_size": 32,
            "max_threads_per_block": 1024,
            "max_num_threads": 1024,
            "max_shared_memory_per_block": 32768,
        },
        host=host,
    )


def compile_module(functions: Mapping[str, Any], target: Target) -> Any:
    """A runtime module of the functions, whose import "metal" holds the complete MSL."""
    texts = {
        name: list(f.attrs[MSL]) for name, f in functions.items() if f.attrs and MSL in f.attrs
    }
    plain = {name: f.without_attr(MSL) if name in texts else f for name, f in functions.items()}

    def complete(code: str, _: Any) -> tuple[str, str]:
        return with_library(str(code), texts), "metal"

    with _registered(_CALLBACK, complete):
        return tvm.tirx.build(tvm.IRModule(plain), target=metal_target(target))


def with_library(code: str, texts: Mapping[str, list[Any]]) -> str:
    """The text of one kernel with the MSL that it calls in front of it."""
    kernel, called = _KERNEL.search(code), _CALL.search(code)
    if kernel is None or called is None or kernel[1] not in texts:
        raise TargetError("TVM generated a Metal kernel that no schedule made", where=code[:200])
    own = texts[kernel[1]]
    stage = next(i for i in range(len(own)) if function_name(i) == called[1])
    head, body = code.split(_HEAD, 1)
    return f"{head}{_HEAD}\n{own[stage]}\n{body}"


def build(functions: Mapping[str, Any], target: Target, path: Path) -> None:
    """Compile the functions into the library `path`: a signed Mach-O dylib for macOS, or for
    "metal:emulated" a library of this machine.

    Raises TargetError when no linker for the target is installed, or the linker fails.
    """
    module = compile_module(functions, target)
    if target.os == "macos":
        macho.export(module, path)
        return
    try:
        module.export_library(str(path), cc="cc", options=["-s"])
    except (RuntimeError, OSError) as error:
        raise TargetError(
            f"linking for {target.name} failed: {str(error).strip().splitlines()[-1]}",
            need="a C compiler that links shared libraries",
        ) from None


@contextmanager
def _registered(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """A global function of TVM while the block runs; what was there before comes back."""
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, function, override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.registry.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, before, override=True)
