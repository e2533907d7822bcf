"""CUDA cross-compilation on a machine with no GPU, driver or toolkit: NVRTC from PyPI.

An architecture "sm_XY" becomes machine code (a cubin), "compute_XY" becomes PTX, which the
driver of any GPU from that one on translates when the library is loaded.

TVM's CUDA runtime library needs libcuda.so.1 and libcudart.so.13 to load. Where they are
absent TVM silently writes modules that carry CUDA source and compile on the user's GPU
machine. `prepare` loads the wheel's libcudart and, without a driver, a stub libcuda, then the
library itself, and registers a compile callback that calls NVRTC: what an artifact carries is
always machine code or PTX. Nothing that is loaded here ever touches a device.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
import tvm_ffi
from tvm.support import cc

from ...errors import TargetError

# What libtvm_runtime_cuda.so looks up in the driver. The stub's versions fail when called.
_DRIVER = (
    "cuDeviceGetName", "cuFuncSetAttribute", "cuGetErrorName", "cuGetErrorString",
    "cuLaunchKernelEx", "cuModuleGetFunction", "cuModuleLoadData", "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)  # fmt: skip
HOPPER = 90
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
_EXTRA = "pip install 'moec[cuda]'"
_FLAGS = ("-std=c++17", "-default-device", "-diag-suppress=177,550")
# Before Hopper a kernel begins when the one before it has ended: both instructions mean nothing.
_DEPENDENT = re.compile(r'asm volatile\("griddepcontrol\.[^)]*\);')
# cuda.h needs a host's headers; of it, generated code uses this one type.
_PRELUDE = """struct alignas(64) CUtensorMap_st { unsigned long long opaque[16]; };
typedef struct CUtensorMap_st CUtensorMap;
"""
_state = threading.local()


@dataclass(frozen=True)
class Resources:
    """What ptxas reports of a kernel; spills are bytes of stores plus loads."""

    registers: int
    spills: int
    stack: int
    static_shared: int


@functools.cache
def prepare() -> None:
    """Make this process able to build CUDA modules; TargetError when a wheel is missing."""
    folder = _wheels()
    _global(folder / "lib", "libcudart.so.13")
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        # An already loaded SONAME satisfies the library's NEEDED entry.
        with tempfile.TemporaryDirectory() as place:
            ctypes.CDLL(_stub(Path(place)), mode=ctypes.RTLD_GLOBAL)
    _global(folder / "lib", "libnvrtc-builtins.so.13.0")
    _global(Path(tvm.__file__).parent / "lib", "libtvm_runtime_cuda.so")
    tvm_ffi.register_global_func("tvm_callback_cuda_compile", _compile, override=True)


@contextmanager
def compiling(arch: str) -> Iterator[dict[str, Resources]]:
    """Compile for `arch` ("sm_90a") inside; yields the resources of every kernel, by symbol.

    PTX has no resources yet: there the report stays empty.

    Raises TargetError when the code that is generated inside does not compile.
    """
    prepare()
    _state.arch, _state.report = arch, {}
    try:
        yield _state.report
    finally:
        del _state.arch, _state.report


def assert_cubin(library: bytes) -> None:
    """Raise TargetError unless a linked library carries machine code (or PTX), and no source."""
    compiled = b".nv.info" in library or b"\n.target sm_" in library
    if b"__CUDACC_RTC__" in library or not compiled:
        raise TargetError(
            "the CUDA module holds source instead of machine code",
            hint=f"the CUDA compiler was not found: {_EXTRA}",
        )


def _stub(place: Path) -> str:
    source, library = place / "stub.c", place / "libcuda.so.1"
    body = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in _DRIVER)
    source.write_text(
        f'#ifdef __cplusplus\nextern "C" {{\n#endif\n{body}#ifdef __cplusplus\n}}\n#endif\n'
    )
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1"]
    cc.create_shared(str(library), [str(source)], options=options)
    return str(library)


def _wheels() -> Path:
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations if spec else None) or ():
        folder = Path(base) / "cu13"
        if (folder / "lib" / "libnvrtc.so.13").is_file():
            return folder
    raise TargetError("the CUDA compiler (NVRTC 13) is not installed", hint=_EXTRA)


def _global(folder: Path, name: str) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(f"{name} cannot be loaded: {error}", hint=_EXTRA) from None


def _compile(code: str) -> bytes:
    """TVM's callback: CUDA C++ to a cubin, or to PTX."""
    folder = _wheels()
    nvrtc = ctypes.CDLL(str(folder / "lib" / "libnvrtc.so.13"))
    include = folder / "include"
    ptx = _state.arch.startswith("compute_")
    options = [f"-arch={_state.arch}", *_FLAGS, f"-I{include}", f"-I{include / 'cccl'}"]
    if not ptx:
        options.append("--ptxas-options=-v")
    if generation(_state.arch) < HOPPER:
        code = _DEPENDENT.sub("", code)
    program = ctypes.c_void_p()
    _check(nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), (_PRELUDE + code).encode(), b"moec.cu", 0, None, None))  # fmt: skip
    raw = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    failed = nvrtc.nvrtcCompileProgram(program, len(options), raw)
    log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode()
    if failed:
        raise TargetError("a CUDA kernel does not compile", where=_complaints(log))
    if "wgmma" in log and "serialized" in log:
        raise TargetError("ptxas serialises the wgmma of a kernel", where=_complaints(log))
    _state.report.update(resources(log))
    if ptx:
        made = _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    else:
        made = _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return made


def generation(arch: str) -> int:
    """The number of an architecture: 90 for "sm_90a", 80 for "compute_80"."""
    return int("".join(c for c in arch.partition("_")[2] if c.isdigit()))


def _complaints(log: str) -> str:
    """The lines of a compiler's log that are not the resource report, as many as help."""
    lines = [line for line in log.splitlines() if not _REPORT.match(line)]
    return "\n".join(lines)[:4000]


def _text(size: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    count = ctypes.c_size_t()
    _check(size(program, ctypes.byref(count)))
    buffer = ctypes.create_string_buffer(count.value)
    _check(read(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise TargetError(f"NVRTC failed with error {code}", hint=_EXTRA)


_REPORT = re.compile(r"ptxas (info )? *[:.] *(Compil|Func|Used|\d+ bytes)")
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def resources(log: str) -> dict[str, Resources]:
    """Parse ptxas' verbose report: kernel symbol -> Resources."""
    found: dict[str, Resources] = {}
    name, stack, spills = "", 0, 0
    for line in log.splitlines():
        if match := _ENTRY.search(line):
            name = match[1]
        elif match := _STACK.search(line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif (match := _USED.search(line)) and name:
            shared = _SHARED.search(line)
            found[name] = Resources(int(match[1]), spills, stack, int(shared[1]) if shared else 0)
            name = ""
    return found
