"""The CUDA half of the native runtime: its library, and the stream that launches go to.

libtvm_runtime_cuda.so needs the CUDA runtime (libcudart.so.13), which comes from PyTorch's
wheels, from PyPI or from a toolkit; whichever is in the process already is used.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from ..errors import TargetError
from . import libraries

DEVICE_TYPE = 2  # DLPack's kDLCUDA
_CUDART = "libcudart.so.13"
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
    if prepare().TVMFFIEnvSetStream(DEVICE_TYPE, device, stream, None):
        raise TargetError(f"the runtime refused stream {stream:#x} of device {device}")


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
