"""DLPack capsules read and relabelled with ctypes, for tensors that are not NumPy or torch.

A capsule that is only read stays the producer's: its destructor frees the tensor when the
call is over. A capsule of our own output may change its dtype field (NumPy's DLPack knows
no bfloat16) before another library takes it over.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputError
from .abi import DLTensor

_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 4: "opencl", 7: "vulkan", 8: "metal", 10: "rocm"}
_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 6: "bool"}
_BFLOAT = 4
_READ_ONLY = 1

_api = ctypes.pythonapi
_api.PyCapsule_IsValid.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.argtypes = (ctypes.py_object, ctypes.c_char_p)
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned up to the tensor."""

    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", DLTensor),
    )


class Borrowed(NamedTuple):
    """What a capsule says; its memory is valid while `capsule` lives."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    dtype: str
    device: str
    read_only: bool
    capsule: Any


def borrow(tensor: Any, name: str) -> Borrowed:
    """Read the memory of a DLPack producer; InputError if it does not export itself."""
    try:
        try:
            capsule = tensor.__dlpack__(max_version=(1, 0))
        except TypeError:  # a producer older than DLPack 1.0
            capsule = tensor.__dlpack__()
    except Exception as error:
        raise InputError(
            f"{name} does not export its memory: {error}",
            where=name,
            need="a tensor whose __dlpack__ works",
        ) from None
    raw, flags = _tensor(capsule, name)
    shape = tuple((ctypes.c_int64 * raw.ndim).from_address(raw.shape)) if raw.ndim else ()
    strides = None
    if raw.strides and raw.ndim:
        strides = tuple((ctypes.c_int64 * raw.ndim).from_address(raw.strides))
    known = _DEVICES.get(raw.device_type, f"of type {raw.device_type}")
    return Borrowed(
        address=(raw.data or 0) + raw.byte_offset,
        shape=shape,
        strides=strides,
        dtype=_dtype(raw),
        device=known if known == "cpu" else f"{known}:{raw.device_id}",
        read_only=bool(flags & _READ_ONLY),
        capsule=capsule,
    )


def hand_over(array: np.ndarray[Any, Any], origin: Any) -> Any:
    """`array` as a tensor of the library that `origin` is of, sharing memory.

    That library's own `from_dlpack` is used where the array API standard tells where it is;
    otherwise the result is a tvm_ffi.Tensor.
    """
    export = Export(array)
    if hasattr(origin, "__array_namespace__"):
        return origin.__array_namespace__().from_dlpack(export)
    import tvm_ffi  # only callers that use it, or have no other home, get here

    return tvm_ffi.from_dlpack(export)


class Export:
    """A NumPy array as a DLPack producer, bfloat16 included."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self._array = array

    def __dlpack__(self, **_: Any) -> Any:
        """A capsule that owns a reference to the array."""
        if self._array.dtype.name != "bfloat16":
            return self._array.__dlpack__()
        capsule = self._array.view(np.uint16).__dlpack__()
        tensor, _flags = _tensor(capsule, "the result")
        tensor.code = _BFLOAT
        return capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        """The CPU."""
        return (1, 0)


def _tensor(capsule: Any, name: str) -> tuple[DLTensor, int]:
    if _api.PyCapsule_IsValid(capsule, b"dltensor_versioned"):
        address = _api.PyCapsule_GetPointer(capsule, b"dltensor_versioned")
        managed = _Versioned.from_address(address)
        if managed.version[0] == 1:
            return managed.tensor, managed.flags
    elif _api.PyCapsule_IsValid(capsule, b"dltensor"):
        return DLTensor.from_address(_api.PyCapsule_GetPointer(capsule, b"dltensor")), 0
    raise InputError(
        f"{name} exports no DLPack capsule that moec can read", where=name, need="DLPack 0.x or 1.x"
    )


def _dtype(raw: DLTensor) -> str:
    plain = f"{_CODES.get(raw.code, f'type {raw.code} of ')}{raw.bits}"
    return plain if raw.lanes == 1 else f"{plain}x{raw.lanes}"
