"""Tensors of callers in GPU memory, in and out without a copy: torch, CuPy, any DLPack producer.

The counterpart of `tensors` for a model that was loaded on a CUDA device. What a tensor is of
also decides on whose stream a call runs and who allocates its results and its workspace.
torch and CuPy are used when the caller has imported them, never imported.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError
from . import cuda, dlpack
from .tensors import View, not_contiguous, not_dense, packed, wrong_device

ALIGNMENT = 16  # bytes: the kernels load activations in pieces of this size
# torch's stable C interface for code that was compiled ahead of time.
_LIBRARY = "libtorch_cuda.so"
_ALLOCATE = "aoti_torch_cuda_caching_allocator_raw_alloc"
_RELEASE = "aoti_torch_cuda_caching_allocator_raw_delete"
_NAMES = ("float32", "float16", "bfloat16", "int32", "int64", "uint8")


class GpuKind(Protocol):
    """A tensor library as seen by one call on a GPU."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        """A new tensor on the model's device, and the address of its memory."""

    def as_int32(self, tensor: Any, experts: int) -> Any:
        """A copy of int64 ids as int32; ids outside [0, experts) stay outside."""

    def stream(self) -> int:
        """The handle of the stream that the library is working on."""

    def take(self, size: int, stream: int) -> tuple[Any, int]:
        """Memory for work on a stream: what to give back, and its address."""

    def give(self, held: Any) -> None:
        """Give back what `take` took; the work on it may still be waiting on its stream."""


def view(tensor: Any, name: str, device: int, *, writable: bool = False) -> View:
    """The memory of argument `name`; InputError unless dense, contiguous, on this device."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(tensor, torch.Tensor):
        return _view_torch(tensor, name, torch, device)
    cupy = sys.modules.get("cupy")
    if cupy is not None and isinstance(tensor, cupy.ndarray):
        return _view_cupy(tensor, name, cupy, device)
    if hasattr(tensor, "__dlpack__"):
        return _view_dlpack(tensor, name, device, writable)
    raise InputError(
        f"{name} is of type {type(tensor).__name__}, not a tensor",
        where=name,
        need=f"a torch, CuPy or other DLPack tensor on cuda:{device}",
    )


class _Torch:
    """torch tensors in and out, on torch's current stream of the device."""

    def __init__(self, torch: Any, device: int) -> None:
        self.torch, self.index = torch, device
        self.device = torch.device("cuda", device)
        self.dtypes = {name: getattr(torch, name) for name in _NAMES}
        self.names = {dtype: name for name, dtype in self.dtypes.items()}
        # torch's allocator without a tensor around what it gives: a third of the time.
        self._alloc: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_alloc", None)
        self._free: Any = getattr(torch._C, "_cuda_cudaCachingAllocator_raw_delete", None)

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        # Not as a tuple: torch takes twice as long to read one.
        tensor = self.torch.empty(*shape, dtype=self.dtypes[dtype], device=self.device)
        return tensor, tensor.data_ptr()

    def as_int32(self, tensor: Any, experts: int) -> Any:
        # Clipped first: 2**32 must not come out as expert 0.
        return tensor.clamp(-1, experts).to(self.torch.int32)

    def stream(self) -> int:
        return stream_of(self.torch, self.index)

    def take(self, size: int, stream: int) -> tuple[Any, int]:
        if self._alloc is None or self._free is None:
            return self.empty((size,), "uint8")
        place = int(self._alloc(size, stream))
        return place, place

    def give(self, held: Any) -> None:
        if type(held) is int:
            self._free(held)

    def allocator(self) -> tuple[int, int] | None:
        """C functions that do the same on the current stream, if this torch has them."""
        try:
            library = ctypes.CDLL(str(Path(self.torch.__file__).parent / "lib" / _LIBRARY))
            found = library[_ALLOCATE], library[_RELEASE]
        except (AttributeError, OSError):
            return None
        take, give = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)
        return take, give


def torch_kind(torch: Any, device: int) -> _Torch:
    """torch's tensors on a device."""
    kind = _torch.get(device)
    if kind is None or kind.torch is not torch:
        kind = _torch[device] = _Torch(torch, device)
    return kind


def stream_of(torch: Any, device: int) -> int:
    """The handle of torch's current stream of a device."""
    # What Triton and torch.compile ask: a tenth of the time that a Stream object takes.
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw is None:
        return int(torch.cuda.current_stream(device).cuda_stream)
    return int(raw(device))


class _CuPy:
    """CuPy arrays in and out, on CuPy's current stream; bfloat16 as its bits (uint16)."""

    def __init__(self, cupy: Any, device: int) -> None:
        self.cupy, self.index = cupy, device

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        with self.cupy.cuda.Device(self.index):
            array = self.cupy.empty(shape, _cupy_dtype(dtype))
        return array, int(array.data.ptr)

    def as_int32(self, tensor: Any, experts: int) -> Any:
        return self.cupy.clip(tensor, -1, experts).astype(self.cupy.int32)

    def stream(self) -> int:
        return int(self.cupy.cuda.get_current_stream().ptr)

    def take(self, size: int, stream: int) -> tuple[Any, int]:
        return self.empty((size,), "uint8")

    def give(self, held: Any) -> None:
        """The array ends with its last name."""


class _Plain:
    """Other DLPack producers: on the legacy default stream; results go into `out` only."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> tuple[Any, int]:
        raise InputError(
            "there is no allocator for a result of this tensor's library",
            where="out",
            need="out=, or torch or CuPy tensors",
        )

    def as_int32(self, tensor: Any, experts: int) -> Any:
        raise InputError("topk_ids has dtype int64", where="topk_ids", need="int32")

    def stream(self) -> int:
        return 0

    def take(self, size: int, stream: int) -> tuple[Any, int]:
        place = cuda.take(size, stream)
        return place, place

    def give(self, held: Any) -> None:
        cuda.give(held, self.stream())


_torch: dict[int, _Torch] = {}


def _view_torch(tensor: Any, name: str, torch: Any, device: int) -> View:
    kind = torch_kind(torch, device)
    if tensor.layout is not torch.strided or tensor.is_nested:
        raise not_dense(tensor, name)
    if tensor.device != kind.device:
        raise wrong_device(name, str(tensor.device), str(kind.device))
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
    return _aligned(View(tensor.data_ptr(), tuple(tensor.shape), dtype, kind, tensor), name)


def _view_cupy(array: Any, name: str, cupy: Any, device: int) -> View:
    if array.device.id != device:
        raise wrong_device(name, f"cuda:{array.device.id}", f"cuda:{device}")
    if not array.flags.c_contiguous:
        raise not_contiguous(name, array.strides)
    dtype = str(array.dtype)
    found = View(int(array.data.ptr), array.shape, dtype, _CuPy(cupy, device), array)
    return _aligned(found, name)


def _view_dlpack(tensor: Any, name: str, device: int, writable: bool) -> View:
    borrowed = dlpack.borrow(tensor, name)
    if borrowed.device != f"cuda:{device}":
        raise wrong_device(name, borrowed.device, f"cuda:{device}")
    if borrowed.strides is not None and not packed(borrowed.shape, borrowed.strides):
        raise not_contiguous(name, borrowed.strides)
    if writable and borrowed.read_only:
        raise InputError(f"{name} is read-only", where=name, need="a tensor that can be written")
    found = View(borrowed.address, borrowed.shape, borrowed.dtype, _Plain(), borrowed.capsule)
    return _aligned(found, name)


def _cupy_dtype(dtype: str) -> str:
    if dtype == "bfloat16":
        raise InputError(
            "CuPy has no bfloat16 for the result", need="torch tensors for a bfloat16 model"
        )
    return dtype


def _aligned(found: View, name: str) -> View:
    if found.address % ALIGNMENT and found.shape and found.shape[0]:
        raise InputError(
            f"{name} starts at an address that is no multiple of {ALIGNMENT} bytes",
            where=name,
            need=f"memory aligned to {ALIGNMENT} bytes, as allocators give it",
            hint=f"{name}.clone()",
        )
    return found
