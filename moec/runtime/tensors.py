"""Tensors of callers, in and out without a copy: NumPy, torch, and any DLPack producer.

`view` reduces a tensor to what a compiled function needs and refuses everything that would
make it crash or read the wrong memory. NumPy arrays (with ml_dtypes.bfloat16, read-only
ones too) and torch tensors are read directly; others go through a DLPack capsule that is
held until the call ends. torch is used when the caller has imported it, never imported.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any, NamedTuple, Protocol

import ml_dtypes
import numpy as np

from ..errors import InputError
from . import dlpack

NUMPY_DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int32": np.dtype(np.int32),
    "int64": np.dtype(np.int64),
    "uint8": np.dtype(np.uint8),
    "uint16": np.dtype(np.uint16),
}
_NUMPY_NAMES = {dtype: name for name, dtype in NUMPY_DTYPES.items()}


def _slow_address(array: np.ndarray[Any, Any]) -> int:
    return int(array.__array_interface__["data"][0])


def _fast_address(array: np.ndarray[Any, Any]) -> int:
    return _pointer(id(array) + object.__basicsize__).value or 0


_pointer = ctypes.c_void_p.from_address
_probe = np.zeros(1)
# Where an array's memory starts, read-only arrays included. The pointer is the first field
# behind the object header in NumPy's C ABI; reading it there takes a fifth of the time of
# building the __array_interface__ dict, which would be a third of a call's overhead.
address = _slow_address
if sys.implementation.name == "cpython" and _fast_address(_probe) == _slow_address(_probe):
    address = _fast_address


class View(NamedTuple):
    """Memory of a caller's tensor; `keep` owns it, `kind` makes others of the same kind."""

    address: int
    shape: tuple[int, ...]
    dtype: str
    kind: Kind
    keep: Any


class Kind(Protocol):
    """A tensor library as seen by one call."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """A new tensor of this kind, and the address of its memory."""

    def as_int32(self, tensor: Any, experts: int) -> Any:
        """A copy of int64 ids as int32; ids outside [0, experts) stay outside."""


def view(tensor: Any, name: str, *, writable: bool = False) -> View:
    """The memory of argument `name`; InputError unless it is a dense, contiguous CPU tensor."""
    if isinstance(tensor, np.ndarray):
        return _view_numpy(tensor, name, writable)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _view_torch(tensor, name, torch)
    if hasattr(tensor, "__dlpack__"):
        return _view_dlpack(tensor, name, writable)
    raise InputError(
        f"{name} is of type {type(tensor).__name__}, not a tensor",
        where=name,
        need="a NumPy array, a torch tensor, or another tensor with __dlpack__",
        hint=f"numpy.asarray({name}, dtype=...)",
    )


def not_dense(tensor: Any, name: str) -> InputError:
    """The error for a torch tensor that is nested, sparse or of a library's own layout."""
    nested = tensor.is_nested
    kind = "nested" if nested else str(tensor.layout).removeprefix("torch.")
    return InputError(
        f"{name} is a {kind} tensor",
        where=name,
        need="a dense (strided) tensor",
        hint=f"torch.cat({name}.unbind())" if nested else f"{name}.to_dense()",
    )


def not_contiguous(name: str, strides: Any) -> InputError:
    """The error for a tensor whose elements are not densely packed in row-major order."""
    return InputError(
        f"{name} is not C-contiguous (strides {strides})",
        where=name,
        need="a C-contiguous tensor",
        hint=f"numpy.ascontiguousarray({name}) or {name}.contiguous()",
    )


def wrong_device(name: str, device: str, home: str = "cpu") -> InputError:
    """The error for a tensor that is not in the memory of this model's device."""
    return InputError(
        f"{name} is on device {device}",
        where=name,
        need=f"a tensor on the {home}, where this model was loaded",
        hint=f"move it there ({name}.to({home!r})), or load the model on {device}",
    )


def read_only(name: str) -> InputError:
    """The error for an output that cannot be written."""
    return InputError(
        f"{name} is read-only", where=name, need="a tensor that can be written", hint="copy it"
    )


class _NumPy:
    """NumPy arrays in and out."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        array = np.empty(shape, NUMPY_DTYPES[dtype])
        return array, address(array)

    def as_int32(self, tensor: Any, experts: int) -> Any:
        # Clipped first: 2**32 must not come out as expert 0.
        return np.clip(tensor, -1, experts).astype(np.int32)


class _Torch:
    """torch tensors in and out; made once for a torch module."""

    def __init__(self, torch: Any) -> None:
        self.torch = torch
        self.strided = torch.strided
        self.cpu = torch.device("cpu")
        self.dtypes = {name: getattr(torch, name) for name in NUMPY_DTYPES if hasattr(torch, name)}
        self.names = {dtype: name for name, dtype in self.dtypes.items()}

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        tensor = self.torch.empty(shape, dtype=self.dtypes[dtype], device=self.cpu)
        return tensor, tensor.data_ptr()

    def as_int32(self, tensor: Any, experts: int) -> Any:
        return tensor.clamp(-1, experts).to(self.torch.int32)


class _Exported:
    """Tensors of another library, made by NumPy and handed over through DLPack."""

    def __init__(self, origin: Any) -> None:
        self.origin = origin

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        array, address = NUMPY.empty(shape, dtype)
        return dlpack.hand_over(array, self.origin), address

    def as_int32(self, tensor: Any, experts: int) -> Any:
        return NUMPY.as_int32(np.from_dlpack(tensor), experts)


NUMPY = _NumPy()
_torch: _Torch | None = None


def torch_kind(torch: Any) -> _Torch:
    """The kind of torch's tensors."""
    global _torch
    if _torch is None or _torch.torch is not torch:
        _torch = _Torch(torch)
    return _torch


def _view_numpy(array: np.ndarray[Any, Any], name: str, writable: bool) -> View:
    dtype = _NUMPY_NAMES.get(array.dtype)
    if dtype is None:
        dtype = array.dtype.str if array.dtype.kind == "V" else array.dtype.name
        if not array.dtype.isnative:
            dtype += " in foreign byte order"
    flags = array.flags
    if not flags.c_contiguous:
        raise not_contiguous(name, array.strides)
    if writable and not flags.writeable:
        raise read_only(name)
    return View(address(array), array.shape, dtype, NUMPY, array)


def _view_torch(tensor: Any, name: str, torch: Any) -> View:
    kind = torch_kind(torch)
    if tensor.layout is not kind.strided or tensor.is_nested:
        raise not_dense(tensor, name)
    if not tensor.is_cpu:
        raise wrong_device(name, str(tensor.device))
    if tensor.requires_grad and torch.is_grad_enabled():
        raise InputError(
            f"{name} requires a gradient, and compiled blocks compute none",
            where=name,
            need="a tensor outside of autograd",
            hint=f"call under torch.no_grad(), or pass {name}.detach()",
        )
    if not tensor.is_contiguous() or tensor.is_neg():
        raise not_contiguous(name, tuple(tensor.stride()))
    dtype = kind.names.get(tensor.dtype) or str(tensor.dtype).removeprefix("torch.")
    try:
        address = tensor.data_ptr()
    except RuntimeError as error:  # tensors without memory, as under torch.compile
        raise InputError(
            f"{name} has no memory of its own: {str(error).splitlines()[0]}",
            where=name,
            need="a plain torch tensor",
            hint="keep the call out of tracing (torch.compiler.disable)",
        ) from None
    return View(address, tuple(tensor.shape), dtype, kind, tensor)


def _view_dlpack(tensor: Any, name: str, writable: bool) -> View:
    borrowed = dlpack.borrow(tensor, name)
    if borrowed.device != "cpu":
        raise wrong_device(name, borrowed.device)
    if borrowed.strides is not None and not packed(borrowed.shape, borrowed.strides):
        raise not_contiguous(name, borrowed.strides)
    if writable and borrowed.read_only:
        raise read_only(name)
    kind = _Exported(tensor)
    return View(borrowed.address, borrowed.shape, borrowed.dtype, kind, borrowed.capsule)


def packed(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether strides (in elements) are those of row-major order, where they matter."""
    if 0 in shape:
        return True
    step = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != step:
            return False
        step *= length
    return True
