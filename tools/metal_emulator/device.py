"""A device "metal" for TVM's runtime in this process, its options and its log of launches.

`install` builds the device once from `runtime/device.cc` (a C++ compiler and the headers in
TVM's wheels are enough) and loads it. What ran afterwards is read from `launches`.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from . import msl


@dataclass(frozen=True)
class Counters:
    """What one launch did. Bytes are counted at every access; `distinct` ones once a launch."""

    kernel: str
    device_read: int
    device_written: int
    device_read_distinct: int
    device_written_distinct: int
    threadgroup_bytes: int
    barriers: int
    threadgroups: int
    mma: int
    threadgroup_memory: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]


@cache
def install() -> None:
    """Make the device known to TVM's runtime in this process; harmless when called again."""
    import tvm_ffi

    folder = _package("tvm")
    # The runtime must be global before the device is loaded: it resolves symbols there.
    ctypes.CDLL(str(_package("tvm_ffi") / "lib" / "libtvm_ffi.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / "lib" / "libtvm_runtime.so"), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(_built()), mode=ctypes.RTLD_GLOBAL)
    tvm_ffi.register_global_func("metal_emulator.announce", announce, override=True)
    tvm_ffi.register_global_func("metal_emulator.compile", _compile, override=True)


# Texts that were announced and are not compiled yet, in order; and what was compiled.
_announced: dict[str, None] = {}
_compiled: dict[str, msl.Built] = {}


def announce(source: str) -> None:
    """Compile the text of a kernel together with others when one of them is launched."""
    if str(source) not in _compiled:
        _announced[str(source)] = None


def _compile(source: str) -> str:
    announce(source)
    if str(source) not in _compiled:
        together = [*_announced]
        _announced.clear()
        try:
            _compiled.update(zip(together, msl.compile_together(together), strict=True))
        except msl.MSLError:  # it may be about another kernel
            _compiled[str(source)] = msl.compile_msl(str(source))
    built = _compiled[str(source)]
    return f"{built.library} {built.entry}"


@contextlib.contextmanager
def options(
    order: msl.Order = msl.ORDERS[0], threads: int = 2, trace: bool = False
) -> Iterator[None]:
    """Run what is launched inside in `order`; `trace` finds races between threadgroups and
    counts distinct bytes, on one OS thread."""
    _call("metal_emulator.options", order.number, order.seed, threads, trace)
    try:
        yield
    finally:
        _call("metal_emulator.options", 0, 0, threads, False)


@contextlib.contextmanager
def launches() -> Iterator[list[Counters]]:
    """The launches made inside, in order; the list is filled when the block ends."""
    found: list[Counters] = []
    _call("metal_emulator.log")
    _call("metal_emulator.keep", True)
    try:
        yield found
    finally:
        _call("metal_emulator.keep", False)
        for line in str(_call("metal_emulator.log")).splitlines():
            name, *numbers = line.split()
            n = [int(x) for x in numbers]
            found.append(Counters(name, *n[:9], tuple(n[9:12]), tuple(n[12:15])))  # type: ignore[arg-type]


def _call(name: str, *args: Any) -> Any:
    import tvm_ffi

    install()
    return tvm_ffi.get_global_func(name)(*args)


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise msl.MSLError(f"package {name} is not installed")
    return Path(spec.submodule_search_locations[0])


def _built() -> Path:
    """The device's library, built when its source or a package changed."""
    source = msl.HERE / "runtime" / "device.cc"
    tvm, ffi = _package("tvm"), _package("tvm_ffi")
    command = [
        *msl._compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-w",
        f"-I{msl.HERE / 'runtime'}", f"-I{tvm}", f"-I{tvm / 'include'}", f"-I{ffi / 'include'}",
    ]  # fmt: skip
    files = sorted((msl.HERE / "runtime").rglob("*.[ch]*"))
    key = hashlib.sha256(" ".join(command).encode())
    for file in [*files, tvm / "_version.py", ffi / "_version.py"]:
        key.update(file.read_bytes())
    library = msl._cache() / f"device-{key.hexdigest()[:24]}.so"
    with msl.alone():
        if not library.exists():
            made = library.with_suffix(f".{os.getpid()}")
            result = subprocess.run(
                [*command, str(source), "-o", str(made)],
                capture_output=True,
                text=True,
                check=False,
            )
            if result.returncode:
                raise msl.MSLError(f"the emulated device cannot be built:\n{result.stderr[:4000]}")
            made.rename(library)
    return library
