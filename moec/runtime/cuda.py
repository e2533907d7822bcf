"""The CUDA half of the native runtime: its library, devices, memory, and the current stream.

libtvm_runtime_cuda.so needs the CUDA runtime (libcudart.so.13), which comes from PyTorch's
wheels, from PyPI or from a toolkit; whichever is in the process already is used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..errors import ResourceError, TargetError
from . import libraries
from .native import Device

DEVICE_TYPE = 2  # DLPack's kDLCUDA
_CUDART = "libcudart.so.13"
_MAJOR, _MINOR = 75, 76  # cudaDevAttrComputeCapabilityMajor, Minor
_TO_DEVICE = 1  # cudaMemcpyHostToDevice
_HINT = "pip install nvidia-cuda-runtime==13.0.96, or PyTorch built for CUDA 13"


@functools.cache
def prepare() -> ctypes.CDLL:
    """Load the CUDA runtime library into this process; returns libtvm_ffi.

    Raises TargetError without a driver or without the CUDA runtime library.
    """
    libraries.runtime()
    try:
        ctypes.CDLL("libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise TargetError(
            f"there is no NVIDIA driver here: {error}", hint="load the artifact on a GPU machine"
        ) from None
    _cudart()
    libraries.load_native("tvm", "libtvm_runtime_cuda.so")
    ffi = libraries.load_native("tvm_ffi", "libtvm_ffi.so")
    ffi.TVMFFIEnvSetStream.argtypes = (
        ctypes.c_int32,
        ctypes.c_int32,
        ctypes.c_void_p,
        ctypes.c_void_p,
    )
    return ffi


def use_stream(device: int, stream: int) -> None:
    """Launches of the calling thread on `device` go to the CUDA stream with this handle."""
    if _set_stream()(DEVICE_TYPE, device, stream, None):
        raise TargetError(f"the runtime refused stream {stream:#x} of device {device}")


@functools.cache
def _set_stream() -> Any:
    return prepare().TVMFFIEnvSetStream


@functools.cache
def functions(allocate: int, release: int) -> Device:
    """What C needs of a device, given the functions of an allocator."""
    current, stream = (
        ctypes.cast(f, ctypes.c_void_p).value for f in (_cudart().cudaGetDevice, _set_stream())
    )
    return Device(current, stream, allocate, release)


class Memory:
    """A parameter in the memory of a device, freed with this value."""

    __slots__ = ("address", "dtype", "shape")

    def __init__(self, array: Any, dtype: str) -> None:
        """Copy a C-contiguous NumPy array to the current device; ResourceError if it is full."""
        place = ctypes.c_void_p()
        size = ctypes.c_size_t(array.nbytes)
        if _cudart().cudaMalloc(ctypes.byref(place), size):
            _cudart().cudaGetLastError()
            raise ResourceError(f"{array.nbytes / 1e9:.2f} GB of GPU memory cannot be allocated")
        self.address, self.shape, self.dtype = place.value or 0, tuple(array.shape), dtype
        source = ctypes.c_void_p(array.__array_interface__["data"][0])
        _check(_cudart().cudaMemcpy(place, source, size, _TO_DEVICE), "copying to the GPU")

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            _cudart().cudaFree(ctypes.c_void_p(self.address))


def take(size: int, stream: int) -> int:
    """Address of memory of the current device for work on a stream; ResourceError if it is full."""
    place = ctypes.c_void_p()
    if _cudart().cudaMallocAsync(
        ctypes.byref(place), ctypes.c_size_t(size), ctypes.c_void_p(stream)
    ):
        _cudart().cudaGetLastError()
        raise ResourceError(f"{size / 1e9:.2f} GB of GPU memory cannot be allocated")
    return place.value or 0


def give(place: int, stream: int) -> None:
    """Free memory that `take` gave, once the work before on that stream is done."""
    _cudart().cudaFreeAsync(ctypes.c_void_p(place), ctypes.c_void_p(stream))


@contextmanager
def current(device: int) -> Iterator[None]:
    """`device` is the calling thread's current one inside, and the former one afterwards."""
    before = ctypes.c_int()
    _check(_cudart().cudaGetDevice(ctypes.byref(before)), "asking for the current device")
    if before.value == device:
        yield
        return
    _check(_cudart().cudaSetDevice(device), f"choosing device {device}")
    try:
        yield
    finally:
        _cudart().cudaSetDevice(before)


def architecture(device: int) -> str:
    """The compute capability of a device as an architecture name, "sm_90".

    Raises TargetError when there is no such device.
    """
    prepare()
    values = []
    for attribute in (_MAJOR, _MINOR):
        value = ctypes.c_int()
        code = _cudart().cudaDeviceGetAttribute(ctypes.byref(value), attribute, device)
        if code:
            # The error would stay behind, and the next call of the caller's library report it.
            _cudart().cudaGetLastError()
            raise TargetError(f"there is no CUDA device {device} (error {code})")
        values.append(value.value)
    return f"sm_{values[0]}{values[1]}"


def missing(built_for: str, device: int) -> str | None:
    """Why `device` cannot run code built for an architecture such as "sm_90a", or None.

    Code of an architecture with the suffix "a" runs on exactly that compute capability, other
    machine code on this and the later ones of its generation (8.0 on 8.6), PTX ("compute_80")
    on every later one.
    """
    here = architecture(device)
    kind, _, number = built_for.removesuffix("a").partition("_")
    ours = int(here.partition("_")[2])
    theirs = int(number) if number.isdigit() else ours + 1
    if kind == "compute":
        fits = theirs <= ours
    elif built_for.endswith("a"):
        fits = theirs == ours
    else:
        fits = theirs <= ours and theirs // 10 == ours // 10
    return None if fits else f"holds code for {built_for}, cuda:{device} is {here}"


def _check(code: int, what: str) -> None:
    if code:
        _cudart().cudaGetLastError()
        raise TargetError(f"{what} failed with CUDA error {code}")


@functools.cache
def _cudart() -> ctypes.CDLL:
    for name in _candidates():
        try:
            return ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
    raise TargetError(f"{_CUDART} was not found", hint=_HINT)


def _candidates() -> Iterator[str]:
    yield _CUDART
    spec = importlib.util.find_spec("nvidia")
    for base in (spec.submodule_search_locations if spec else None) or ():
        yield str(Path(base) / "cu13" / "lib" / _CUDART)
    yield f"/usr/local/cuda/lib64/{_CUDART}"
